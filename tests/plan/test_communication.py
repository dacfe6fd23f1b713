"""Volumes against the ZeRO paper, and what rings need for them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bigtrain.config import AccelerateConfig, Config, DecoderConfig, DeepSpeedConfig, TrainConfig
from bigtrain.plan import clusters, communication

PARAMETERS = 7_000_000_000


def config(stage: int, accumulation: int = 1, **engine: object) -> Config:
    return Config(
        model=DecoderConfig(),
        engine=DeepSpeedConfig(stage=stage, **engine),
        train=TrainConfig(global_batch=64 * accumulation, micro_batch=1),
    )


def sent(config: Config, ranks: int = 64) -> float:
    found = communication.collectives(config, ranks, PARAMETERS, PARAMETERS, 32)
    return sum(each.sent_per_rank(ranks) for each in found)


def test_volumes_are_those_of_the_paper() -> None:
    """arXiv 1910.02054, section 7: 2 P for plain data parallelism, 3 P for stage 3, in elements of two bytes."""
    share = 63 / 64
    assert sent(config(0)) == pytest.approx(2 * 2 * PARAMETERS * share)
    assert sent(config(3)) == pytest.approx(3 * 2 * PARAMETERS * share)
    # The paper's stages 1 and 2 send 2 P; DeepSpeed's reduce by all-reduce, which sends 3 P.
    assert sent(config(1)) == sent(config(2)) == pytest.approx(3 * 2 * PARAMETERS * share)


def test_accumulation_multiplies_what_every_micro_batch_sends() -> None:
    assert sent(config(0, 4)) == sent(config(0))
    assert sent(config(1, 4)) == sent(config(1))
    assert sent(config(3, 4)) == pytest.approx(4 * sent(config(3)))
    gathered = 2 * PARAMETERS * 63 / 64
    assert sent(config(2, 4)) == pytest.approx(4 * 2 * gathered + gathered)


def test_a_small_model_stays_gathered_from_forward_to_backward() -> None:
    found = communication.collectives(config(3), 64, 100_000_000, 100_000_000, 12)
    assert [each.kind for each in found] == ["all_gather", "reduce_scatter"]


def test_one_rank_sends_nothing() -> None:
    assert communication.collectives(config(3), 1, PARAMETERS, PARAMETERS, 32) == []
    assert communication.collective_seconds("all_reduce", 1e9, clusters.find("h100"), 1) == 0


def test_accelerate_sends_fp32_gradients() -> None:
    plain = replace(config(0), engine=AccelerateConfig(parallel="ddp"))
    assert sent(plain) == pytest.approx(2 * 4 * PARAMETERS * 63 / 64)
    sharded = replace(config(0), engine=AccelerateConfig(parallel="fsdp2"))
    assert sent(sharded) == pytest.approx((2 * 2 + 4) * PARAMETERS * 63 / 64)


def test_a_ring_in_a_node_and_rings_between_nodes() -> None:
    node = clusters.find("h100x8")
    inside = communication.collective_seconds("all_gather", 8e9, node, 8)
    assert inside == pytest.approx(8e9 * 7 / 8 / 450e9 + 7 * 5e-6)
    assert communication.collective_seconds("all_reduce", 8e9, node, 8) == pytest.approx(2 * inside)
    # Between nodes the eight network links of a node carry an eighth each: 400 GB/s, less than a link inside.
    four = communication.collective_seconds("all_gather", 8e9, clusters.find("h100x32"), 32)
    assert four == pytest.approx(max(8e9 * 31 / 32 / 450e9, 8e9 * 3 / 4 / 400e9) + 7 * 5e-6 + 3 * 10e-6)


def test_many_small_calls_wait_for_latency() -> None:
    cluster = clusters.find("h100x1024")
    once = communication.collective_seconds("all_gather", 1e6, cluster, 1024, calls=1)
    assert communication.collective_seconds("all_gather", 1e6, cluster, 1024, calls=100) > 50 * once


def test_offload_moves_gradients_out_and_parameters_back() -> None:
    found = communication.transfers(config(2, 4, offload_optimizer="cpu"), 64, PARAMETERS, PARAMETERS)
    shard = 2 * PARAMETERS / 64
    assert [(each.link, each.bytes) for each in found] == [("host", 4 * shard), ("host", shard)]
    nvme = config(3, 1, offload_optimizer="nvme", offload_parameters="nvme", nvme_path="/nvme")
    disk = [each for each in communication.transfers(nvme, 64, PARAMETERS, PARAMETERS) if each.link == "disk"]
    assert sum(each.bytes for each in disk) == pytest.approx((24 + 2 * 2 + 2) * PARAMETERS / 64)
    # A node's eight devices share its disk.
    assert communication.transfer_seconds(disk[0], clusters.find("h100")) == pytest.approx(disk[0].bytes * 8 / 40e9)
    assert communication.transfers(config(2), 64, PARAMETERS, PARAMETERS) == []
