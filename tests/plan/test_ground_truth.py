"""The planner against what others measured: these figures are in the README, and must stay as good."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import plan_ground_truth as truth

from bigtrain.plan import flops, sizes
from bigtrain.plan.efficiency import AMPERE, HOPPER


@pytest.fixture(scope="module")
def throughput() -> tuple[list[truth.Row], truth.Errors]:
    return truth.throughput_errors()


def test_throughput_of_models_that_nothing_was_fitted_on(throughput: tuple[list[truth.Row], truth.Errors]) -> None:
    rows, errors = throughput
    assert len(rows) == 201  # all of the tables
    assert errors.mean <= 0.05
    assert errors.p90 <= 0.10
    assert errors.mean < truth.rule_of_thumb_errors(rows).mean / 5


def test_the_constants_that_ship_are_those_of_the_fit(throughput: tuple[list[truth.Row], truth.Errors]) -> None:
    fitted = truth.fit(throughput[0])
    for generation, shipped in (("A", AMPERE), ("H", HOPPER)):
        assert shipped.matmul == pytest.approx(1 / fitted[f"matmul {generation}"], abs=0.01)
        assert shipped.memory == pytest.approx(1 / fitted["memory"], abs=0.01)
        assert shipped.optimizer == pytest.approx(1 / fitted["optimizer"], abs=0.02)
        assert shipped.layer_seconds == pytest.approx(fitted[f"layer {generation}"], abs=2e-4)
        assert shipped.exposed == pytest.approx(fitted["exposed"], abs=0.02)


def test_rows_say_the_utilisation_that_follows_from_their_throughput() -> None:
    """Holds the copied table to itself: their MFU is 6 P + 12 L d T over the peak."""
    peaks = {"a100_40gb": 312e12, "a100_80gb": 312e12, "h100_80gb": 989.4e12}
    for line in truth.read("llm_foundry"):
        dim, layers, heads = truth.MPT[line["model"]]
        length = int(line["seq_len"])
        config = truth.decoder_config(dim, layers, heads, truth.MPT_VOCABULARY, length, 1, 1, False)
        model = flops.our_model(config.model)
        assert truth.gpt_parameters(config) == sizes.of_model(model).total
        operations = 6 * truth.gpt_parameters(config) + 12 * layers * dim * length
        peak = peaks[line["gpu"]] * (2 if line["precision"] == "fp8" else 1) * int(line["gpus"])
        mfu = operations * float(line["tokens_per_second"]) / peak
        assert mfu == pytest.approx(float(line["mfu_percent"]) / 100, rel=0.004), line


def test_zero3_on_hundreds_of_gpus() -> None:
    errors = truth.zero3_errors()
    assert len(errors.values) == 6
    assert errors.mean <= 0.08


def test_utilisation_from_iteration_times() -> None:
    assert truth.korthikanti_errors().worst <= 0.005


def test_energy_and_co2_of_llama() -> None:
    errors = truth.energy_errors()
    assert len(errors.values) == 12
    assert errors.worst <= 0.01


def test_zero_papers_table_exactly() -> None:
    pairs = truth.zero_table()
    assert len(pairs) == 54
    assert [pair for pair in pairs if not truth.as_printed(*pair)] == []


def test_no_peer_is_nearer_to_any_figure_of_zeros_table() -> None:
    rows = truth.peers_on_zero_table()
    assert len(rows) == 54
    for row in rows:
        ours, *theirs = row.errors
        assert ours is not None
        assert abs(ours) < min(abs(error) for error in theirs if error is not None), row
    assert [len(truth.of_peer(rows, peer).values) for peer in truth.PEERS] == [54, 36, 54, 54]
    printed = truth.peers_table(rows).splitlines()
    assert printed[0].split() == ["truth", "bigtrain", "plan", "DeepSpeed", "accelerate", "EleutherAI"]
    assert printed[1].split()[-4:] == ["+0.0%", "-", "-50.0%", "+12.5%"]  # stage 1 on one rank: 16 bytes, 8 and 18


def test_what_as_printed_means() -> None:
    assert truth.as_printed("41.3", 41.25)
    assert truth.as_printed("4187", 4187.5)
    assert not truth.as_printed("41.3", 41.4)
    assert not truth.as_printed("4187", 4188.1)


def test_parameters_of_megatrons_table() -> None:
    for published, counted in truth.megatron_parameters():
        assert round(counted, 1) == published
