"""What makes a step longer must, by as much as it should; and the estimate says where it is unsure."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

import pytest

from bigtrain.compress_config import CompressConfig, DistilConfig, Float8Config, PruneConfig, QuantizeConfig
from bigtrain.config import (
    ClassificationConfig,
    Config,
    DecoderConfig,
    DeepSpeedConfig,
    EncoderConfig,
    MuonConfig,
    PrivacyConfig,
    TrainConfig,
)
from bigtrain.plan import clusters, sizes, step_time
from bigtrain.plan.step_time import StepTime

LLAMA = DecoderConfig(
    dim=4096, n_layers=32, n_heads=32, ffn_dim=11008, vocab_size=32000, max_seq_len=4096, positions="rotary",
    norm="rmsnorm", activation="swiglu", bias=False, tie_embeddings=False,
)  # fmt: skip
BASE = Config(
    model=LLAMA, engine=DeepSpeedConfig(stage=3),
    train=TrainConfig(global_batch=512, micro_batch=8, activation_checkpointing=True),
)  # fmt: skip


def estimate(config: Config = BASE, cluster: str = "h100x8") -> StepTime:
    found = clusters.find(cluster)
    return step_time.estimate(config, found, found.devices, sizes.of_run(config))


def with_train(**changes: object) -> Config:
    return replace(BASE, train=replace(BASE.train, **changes))


def test_parts_add_up_and_rates_follow() -> None:
    found = estimate()
    assert set(found.parts) == set(step_time.FORMULAS) - {"teacher"}
    assert found.seconds == pytest.approx(sum(found.parts.values()))
    assert found.tokens == 512 * 4096
    assert found.tokens_per_second == pytest.approx(found.tokens / found.seconds)
    peak = 8 * 989.4e12
    assert found.mfu == pytest.approx(found.model_flops / (found.seconds * peak))
    assert 0.3 < found.mfu < found.hfu < 0.6  # what such runs report
    assert found.low < found.seconds < found.high


def test_recomputation_costs_a_forward_pass() -> None:
    without, again = estimate(with_train(activation_checkpointing=False)), estimate()
    assert without.parts["recompute"] == 0
    assert 0.7 < again.parts["recompute"] / again.parts["forward"] <= 1
    assert without.mfu > again.mfu


def test_twice_the_batch_takes_twice_as_long() -> None:
    once, twice = estimate(), estimate(with_train(global_batch=1024))
    assert twice.parts["forward"] == pytest.approx(2 * once.parts["forward"])
    assert twice.parts["optimizer"] == once.parts["optimizer"]


def test_small_micro_batches_are_bound_by_the_network() -> None:
    small = with_train(global_batch=256, micro_batch=1)
    slow = replace(clusters.find("h100x256"), inter_node_gb_per_second=1.0)
    found = step_time.estimate(small, slow, 256, sizes.of_run(small))
    computing = sum(found.parts[name] for name in ("forward", "backward", "recompute"))
    assert found.parts["communication"] == pytest.approx(found.communication - computing)
    assert found.parts["communication"] > computing


def test_what_does_not_overlap_is_paid_in_full() -> None:
    overlapped = estimate(cluster="h100x64")
    serial = estimate(replace(BASE, engine=DeepSpeedConfig(stage=3, overlap_comm=False)), "h100x64")
    assert serial.parts["communication"] == pytest.approx(serial.communication)
    assert overlapped.parts["communication"] < serial.parts["communication"]


def test_offload_takes_the_update_to_the_host() -> None:
    engine = DeepSpeedConfig(stage=3, offload_optimizer="cpu")
    found = estimate(replace(BASE, engine=engine))
    assert found.parts["optimizer"] == 0
    assert found.parts["offload"] > 10 * estimate().parts["optimizer"]
    slower = estimate(replace(BASE, engine=replace(engine, offload_optimizer="nvme", nvme_path="/nvme")))
    assert slower.parts["offload"] > found.parts["offload"]


def test_muon_multiplies_matrices() -> None:
    assert estimate(replace(BASE, optimizer=MuonConfig())).parts["optimizer"] > estimate().parts["optimizer"]


def test_an_estimate_outside_of_what_was_validated_says_so_and_is_wider() -> None:
    def width(found: StepTime) -> float:
        return found.high / found.low

    inside = estimate()
    assert inside.notes == []
    for what, outside in {
        "stage": estimate(replace(BASE, engine=DeepSpeedConfig(stage=2))),
        "ranks": estimate(with_train(global_batch=4096), "h100x512"),
        "B200": estimate(cluster="b200x8"),
        "compile": estimate(with_train(compile=True)),
        "decoders": estimate(
            Config(
                model=EncoderConfig(dim=1024, n_layers=24, n_heads=16, vocab_size=30522, max_seq_len=512),
                engine=DeepSpeedConfig(stage=3), train=TrainConfig(global_batch=256, micro_batch=32),
            )
        ),
        "not measured": estimate(cluster="laptop"),
        "optimizer=muon": estimate(replace(BASE, optimizer=MuonConfig())),
        "compress.quantize": estimate(replace(BASE, compress=CompressConfig(quantize=QuantizeConfig()))),
        "compress.prune": estimate(replace(BASE, compress=CompressConfig(prune=PruneConfig()))),
        "compress.float8": estimate(replace(BASE, compress=CompressConfig(float8=Float8Config()))),
        "compress.distil": estimate(replace(BASE, compress=CompressConfig(distil=DistilConfig(teacher="/nowhere")))),
        "engine.quantized_communication": estimate(
            replace(BASE, engine=DeepSpeedConfig(stage=3, quantized_communication=True))
        ),
        "train.privacy": estimate(with_train(privacy=PrivacyConfig(noise_multiplier=1.0))),
    }.items():  # fmt: skip
        assert width(outside) > width(inside), what
        assert outside.notes, what
        assert "." not in what or any(what in note for note in outside.notes), what
    bert = Config(
        model=EncoderConfig(dim=1024, n_layers=24, n_heads=16, vocab_size=30522, max_seq_len=512),
        task=ClassificationConfig(), train=TrainConfig(global_batch=256, micro_batch=32),
    )  # fmt: skip
    plain = estimate(bert)
    assert isinstance(bert.model, EncoderConfig)
    for what, outside in {
        "task.adversarial=fgm: 2 more passes": estimate(replace(bert, task=ClassificationConfig(adversarial="fgm"))),
        "task.adversarial=pgd: 4 more passes": estimate(replace(bert, task=ClassificationConfig(adversarial="pgd"))),
        "model.unpadded": estimate(replace(bert, model=replace(bert.model, unpadded=True))),
    }.items():
        assert width(outside) > width(plain), what
        assert [note for note in outside.notes if what in note], what
        assert not [note for note in plain.notes if what in note], what
    assert any("512 ranks" in note for note in estimate(with_train(global_batch=4096), "h100x512").notes)


def test_the_largest_plan_is_made_at_once_and_without_torch() -> None:
    """405B on 16,384 H100: within a second, imports not counted."""
    script = """
import sys, time
from bigtrain.config import Config, DecoderConfig, DeepSpeedConfig, TrainConfig
from bigtrain.plan import clusters, money, recommend, simulate, sizes, step_time
model = DecoderConfig(dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, ffn_dim=53248, vocab_size=128256,
    max_seq_len=8192, positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, tie_embeddings=False)
train = TrainConfig(global_batch=16384, micro_batch=1, activation_checkpointing=True)
config = Config(model=model, engine=DeepSpeedConfig(stage=3), train=train)
started = time.perf_counter()
cluster, found = clusters.find("h100x16384"), sizes.of_run(config)
assert found.total == 405_853_388_800
estimate = step_time.estimate(config, cluster, 16384, found)
assert estimate.seconds > 1
assert time.perf_counter() - started < 1
assert "torch" not in sys.modules, "torch was imported"
"""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    assert time.perf_counter() - started < 60


def test_a_figure_between_two_widths() -> None:
    for width, value in ((64, 0.2), (256, 0.2), (443.4, 0.3), (768, 0.4), (4096, 0.4)):
        assert step_time.between(width, (256, 768), (0.2, 0.4)) == pytest.approx(value, abs=1e-3)
