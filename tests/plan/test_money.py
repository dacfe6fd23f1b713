"""Bills, checkpoints and latency."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bigtrain.config import (
    AccelerateConfig,
    Config,
    DecoderConfig,
    DeepSpeedConfig,
    EncoderConfig,
    LoRAConfig,
    TrainConfig,
)
from bigtrain.errors import ConfigError
from bigtrain.plan import clusters, money, sizes

LLAMA = DecoderConfig(
    dim=4096, n_layers=32, n_heads=32, ffn_dim=11008, vocab_size=32000, max_seq_len=4096, positions="rotary",
    norm="rmsnorm", activation="swiglu", bias=False, tie_embeddings=False,
)  # fmt: skip
CONFIG = Config(model=LLAMA, engine=DeepSpeedConfig(stage=3), train=TrainConfig(global_batch=64))
H100 = clusters.find("h100x64")


def test_a_bill_is_devices_times_hours_times_price() -> None:
    bill = money.bill(10, 64, H100)
    assert (bill.device_hours, bill.cost) == (640, pytest.approx(640 * 2.99))
    assert bill.energy_kwh == pytest.approx(640 * 0.7 * 1.1)
    assert bill.kg_co2 == pytest.approx(bill.energy_kwh * 0.385)


@pytest.mark.parametrize("tokens", [0, -1, float("nan")])
def test_no_tokens_are_refused(tokens: float) -> None:
    with pytest.raises(ConfigError, match="tokens"):
        money.hours_for(tokens, 1000)


def test_hours_for_tokens() -> None:
    assert money.hours_for(3600e6, 1e6) == 1


def test_a_checkpoint_is_fourteen_bytes_a_parameter() -> None:
    built = sizes.of_run(CONFIG)
    total = built.total
    found = money.checkpoint(CONFIG, H100, 64, built)
    assert found.gib == pytest.approx(14 * total / 2**30)
    assert found.write_seconds == pytest.approx(
        money.SAVE_SECONDS + 14 * total / (8 * 40e9)
    )  # eight nodes write at once
    # Each device copies its share to the host.
    assert found.stall_seconds == pytest.approx(money.SAVE_SECONDS + 14 * total / 64 / 64e9)
    waiting = replace(CONFIG, train=replace(CONFIG.train, async_save=False))
    assert money.checkpoint(waiting, H100, 64, built).stall_seconds == found.write_seconds


def test_accelerates_weights_are_their_own_master() -> None:
    """12 bytes a parameter in bf16 as in fp32 (model.safetensors and optimizer.bin of engine/accelerate.py)."""
    built = sizes.of_run(CONFIG)
    total = built.total
    for precision in ("bf16", "fp32"):
        train = replace(CONFIG.train, precision=precision)
        ddp = money.checkpoint(replace(CONFIG, engine=AccelerateConfig(), train=train), H100, 64, built)
        assert ddp.gib == pytest.approx(12 * total / 2**30)
        by_one_rank = money.SAVE_SECONDS + 12 * total / 40e9
        assert ddp.stall_seconds == ddp.write_seconds == pytest.approx(by_one_rank)
    sharded = money.checkpoint(replace(CONFIG, engine=AccelerateConfig(parallel="fsdp2")), H100, 64, built)
    assert sharded.write_seconds == pytest.approx(money.SAVE_SECONDS + 12 * total / (8 * 40e9))


def test_of_frozen_weights_no_states_are_saved() -> None:
    config = replace(CONFIG, train=replace(CONFIG.train, lora=LoRAConfig(rank=8)))
    found = sizes.of_run(config)
    saved = money.checkpoint(config, H100, 64, found)
    assert saved.gib == pytest.approx((2 * found.total + 12 * found.trained) / 2**30)


def test_decoding_waits_for_memory_until_the_batch_is_large() -> None:
    total = sizes.of_run(CONFIG).total
    one = money.inference(CONFIG, H100, total)
    assert (one.devices, one.bound) == (1, "memory")
    assert one.kv_cache_gib == pytest.approx(2 * 2 * 32 * 4096 * 4096 / 2**30)  # 2 GiB: 0.5 MiB a token
    # 13.5 GB of weights at 3.35 TB/s are 4 ms; no kernel reaches all of it.
    assert 2 * total / 3.35e12 < one.decode_seconds < 2.5 * 2 * total / 3.35e12
    eight = money.inference(CONFIG, H100, total, batch=8)
    assert eight.decode_seconds < 2.5 * one.decode_seconds
    assert eight.tokens_per_second > 3 * one.tokens_per_second
    assert eight.prefill_seconds > 5 * one.prefill_seconds  # arithmetic: eight prompts are eight times the work


def test_a_model_is_split_where_one_device_is_too_small() -> None:
    assert money.inference(CONFIG, H100, 70_000_000_000).devices == 2
    with pytest.raises(ConfigError, match="devices"):
        money.inference(CONFIG, clusters.find("h100x1"), 70_000_000_000)


def test_a_model_of_several_nodes_talks_over_the_network() -> None:
    """Llama 405B in 16 bits is on 11 H100, three more than a node has."""
    wide = replace(LLAMA, dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, ffn_dim=53248, vocab_size=128256)
    config = replace(CONFIG, model=wide)
    total = sizes.of_run(config).total
    real = money.inference(config, H100, total)
    slow = money.inference(config, replace(H100, inter_node_gb_per_second=5.0, inter_node_latency_us=100.0), total)
    assert real.devices > 8
    assert slow.decode_seconds > 1.5 * real.decode_seconds
    assert slow.prefill_seconds > 1.5 * real.prefill_seconds
    inside = clusters.find("h100x8")
    slower = replace(inside, inter_node_gb_per_second=5.0, inter_node_latency_us=100.0)
    assert money.inference(CONFIG, inside, 70_000_000_000) == money.inference(CONFIG, slower, 70_000_000_000)


def test_what_has_no_inference_is_refused() -> None:
    encoder = replace(CONFIG, model=EncoderConfig(vocab_size=30522))
    with pytest.raises(ConfigError, match="generates no text"):
        money.inference(encoder, H100, 110_000_000)
    with pytest.raises(ConfigError, match="batch"):
        money.inference(CONFIG, H100, 1, batch=0)
