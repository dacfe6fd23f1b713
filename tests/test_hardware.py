"""What the machine is asked, and how ranks are placed on what it answers."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bigtrain import hardware
from bigtrain.config import Config, LaunchConfig, TrainConfig
from bigtrain.errors import BigtrainError, ConfigError

LISTING = """\
0, GPU-aaaa1111, NVIDIA A100-SXM4-80GB, 8.0, 81920
1, GPU-bbbb2222, NVIDIA A100-SXM4-80GB, 8.0, 81920
2, GPU-cccc3333, Tesla V100-SXM2-32GB, 7.0, 32768
"""


@pytest.fixture
def three_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that answers like nvidia-smi does: the answer is all that this code sees of a GPU."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTING}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(hardware, "torch_is_cpu_build", lambda: False)
    hardware.installed_gpus.cache_clear()
    yield
    hardware.installed_gpus.cache_clear()


def test_cores_follow_the_affinity_mask() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from bigtrain.hardware import cores; print(cores())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n"


def test_memory_is_at_most_the_machines() -> None:
    assert 2**28 < hardware.memory_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_fp16_on_the_cpu_is_what_torch_says() -> None:
    assert hardware.cpu_has_fp16() == torch.ops.mkldnn._is_mkldnn_fp16_supported()


def test_gpus_are_read_from_nvidia_smi(three_gpus: None) -> None:
    first = hardware.gpus()[0]
    assert (first.index, first.name, first.capability) == (0, "NVIDIA A100-SXM4-80GB", (8, 0))
    assert first.memory_gib == 80


@pytest.mark.parametrize(
    ("visible", "indices"), [("1,0", [1, 0]), ("GPU-cccc", [2]), ("", []), ("0,-1,1", [0]), ("2", [2])]
)
def test_visible_devices(three_gpus: None, monkeypatch: pytest.MonkeyPatch, visible: str, indices: list[int]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.index for gpu in hardware.gpus()] == indices


@pytest.mark.parametrize("visible", ["7", "MIG-aaaa", "GPU-nothing"])
def test_a_visible_device_that_is_not_there(three_gpus: None, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(BigtrainError, match=visible):
        hardware.gpus()


def test_ranks_on_gpus(three_gpus: None) -> None:
    assert hardware.place(LaunchConfig()).ranks == 3
    placement = hardware.place(LaunchConfig(ranks=2))
    assert (placement.device, [gpu.index for gpu in placement.gpus]) == ("cuda", [0, 1])
    with pytest.raises(ConfigError, match="more than the 3 visible GPUs"):
        hardware.place(LaunchConfig(ranks=4))
    assert hardware.place(LaunchConfig(device="cpu", ranks=1)).gpus == ()


def test_bf16_needs_a_gpu_that_has_it(three_gpus: None) -> None:
    config = replace(Config(), train=TrainConfig(precision="bf16"))
    hardware.check_precision(config, hardware.place(LaunchConfig(ranks=2)))
    with pytest.raises(ConfigError, match=r"V100.*no bf16"):
        hardware.check_precision(config, hardware.place(LaunchConfig()))


def test_a_cpu_build_of_torch_uses_no_gpu(three_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "torch_is_cpu_build", lambda: True)
    assert hardware.place(LaunchConfig()).device == "cpu"
    with pytest.raises(ConfigError, match="CPU build"):
        hardware.place(LaunchConfig(device="cuda"))


def test_ranks_on_the_cpu() -> None:
    cores = hardware.cores()
    placement = hardware.place(LaunchConfig(device="cpu"))
    assert (placement.ranks, placement.threads_per_rank) == (min(2, cores), max(1, cores // min(2, cores)))
    assert hardware.place(LaunchConfig(device="cpu", ranks=4 * cores)).threads_per_rank == 1
    assert hardware.place(LaunchConfig(device="cpu", ranks=1, threads_per_rank=3)).threads_per_rank == 3
    with pytest.raises(ConfigError, match="too many"):
        hardware.place(LaunchConfig(device="cpu", ranks=4 * cores + 1))
