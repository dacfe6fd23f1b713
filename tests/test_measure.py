"""`bigtrain doctor --cluster-file` measures this very machine, and what it writes can be planned with."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bigtrain import hardware, measure
from bigtrain.config import Config, DecoderConfig, DeepSpeedConfig, LaunchConfig, TrainConfig
from bigtrain.errors import BigtrainError
from bigtrain.plan import clusters, sizes, step_time
from bigtrain.plan.efficiency import CPU, of


def test_measures_and_plans_with_it(tmp_path: Path) -> None:
    file = tmp_path / "here.yaml"
    measure.write_cluster_file(file, budget_seconds=0.05)
    cluster = clusters.find(str(file))
    placement = hardware.place(LaunchConfig())
    assert cluster.devices_per_node == placement.ranks
    device = cluster.device
    assert device.peak_tflops["fp32"] > 0.001
    assert device.peak_tflops["bf16"] > 0.3 * device.peak_tflops["fp32"], "as ranks multiply it, on any CPU"
    if device.is_cpu:
        assert set(device.peak_tflops) == {"fp32", "bf16", *(["fp16"] if hardware.cpu_has_fp16() else [])}
    assert 0.1 < device.memory_gb_per_second < 10_000
    assert 0.001 < cluster.intra_node_gb_per_second < 10_000
    assert 0 < cluster.disk_gb_per_second < 1000
    assert set(device.efficiency) == {
        "matmul", "matmul_fp32", "matmul_narrow", "matmul_narrow_fp32", "attention", "attention_fp32",
        "memory", "memory_fp32", "optimizer", "all_gather", "reduce_scatter", "layer_seconds", "layer_step_seconds",
        "step_seconds", "layer_seconds_gathered", "layer_step_seconds_gathered", "step_seconds_gathered",
    }  # fmt: skip
    assert all(value > 0 for value in device.efficiency.values())
    # What is not measured says so.
    source = yaml.safe_load(file.read_text())["source"]
    assert source["device.peak_tflops"] == "measured on this machine"
    assert source["device.watts"].startswith("not measured")
    config = Config(
        model=DecoderConfig(vocab_size=4096), engine=DeepSpeedConfig(stage=2),
        train=TrainConfig(global_batch=4 * placement.ranks, precision="fp32"),
    )  # fmt: skip
    found = step_time.estimate(config, cluster, placement.ranks, sizes.of_run(config))
    assert found.seconds > 0
    assert not any("not measured" in note for note in found.notes)
    assert of(device, "fp32").matmul == pytest.approx(device.efficiency["matmul_fp32"])
    assert of(device, "fp32").optimizer == device.efficiency["optimizer"]
    if device.is_cpu:
        assert of(device).exposed == CPU.exposed  # cannot be measured: no streams


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BigtrainError, match="no such directory"):
        measure.write_cluster_file(tmp_path / "none" / "here.yaml")
