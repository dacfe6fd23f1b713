"""What this machine has: cores, memory, GPUs, and which precisions they compute in. Asks the system, never torch."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import psutil

from bigtrain.config import Config, DeepSpeedConfig, LaunchConfig
from bigtrain.errors import BigtrainError, ConfigError

MOST_RANKS_PER_CORE = 4  # on the CPU; beyond it ranks only wait for one another


@dataclass(frozen=True)
class Gpu:
    index: int  # nvidia-smi's number, which the launcher wants
    uuid: str
    name: str
    capability: tuple[int, int]  # compute capability, (8, 0) for an A100
    memory_gib: float


@dataclass(frozen=True)
class Placement:
    """Where the ranks of one node run, and of how many such nodes."""

    device: Literal["cpu", "cuda"]
    ranks: int
    threads_per_rank: int
    gpus: tuple[Gpu, ...]  # one per rank, of the node whose GPUs have least memory; empty on the CPU, or not known
    nodes: int = 1
    memory_gib: float | None = None  # RAM of the node that has least; None: not known
    swap_gib: float = 0.0

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks


# ------------------------------------------------------------------------------------------ cores and memory


def cores() -> int:
    """Cores that this process may use: its affinity mask, and a container's CPU quota (cgroup v2 cpu.max)."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        available = min(available, max(1, math.ceil(int(quota) / int(period))))
    return available


def memory_bytes() -> int:
    """Memory of this machine, or of this container where that is less (cgroup v2 memory.max)."""
    total = int(psutil.virtual_memory().total)
    limit = _read("/sys/fs/cgroup/memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def swap_bytes() -> int:
    return int(psutil.swap_memory().total)


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


@lru_cache(maxsize=1)
def cpu_flags() -> frozenset[str]:
    """The instruction sets that the kernel reports: `flags` on x86, `Features` on ARM; empty where unknown."""
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, values = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(values.split())
    return frozenset()


# ----------------------------------------------------------------------------------------------------- GPUs


@lru_cache(maxsize=1)
def installed_gpus() -> tuple[Gpu, ...]:
    """Every NVIDIA GPU that the driver shows, whatever CUDA_VISIBLE_DEVICES says."""
    fields = "index,uuid,name,compute_cap,memory.total"
    try:
        listing = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=30, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ()
    gpus = []
    for line in listing.splitlines():
        index, uuid, name, capability, memory = (part.strip() for part in line.split(","))
        major, _, minor = capability.partition(".")
        gpus.append(Gpu(int(index), uuid, name, (int(major), int(minor)), float(memory) / 1024))
    return tuple(gpus)


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that this process may use, in CUDA_VISIBLE_DEVICES's order.

    Raises BigtrainError if that variable names a device that is not there or a slice of one (MIG): the deepspeed
    launcher takes whole GPUs by number only.
    """
    installed = installed_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not installed:
        return installed
    chosen = []
    for name in filter(None, (part.strip() for part in visible.split(","))):
        if name == "-1":  # CUDA's own rule: what follows an invalid number is not visible
            break
        match = [gpu for gpu in installed if str(gpu.index) == name or (name[:1] == "G" and gpu.uuid.startswith(name))]
        if len(match) != 1:
            raise BigtrainError(
                f"CUDA_VISIBLE_DEVICES={visible}: {name} is not one of this machine's {len(installed)} whole GPUs"
            )
        chosen.append(match[0])
    return tuple(chosen)


def torch_is_cpu_build() -> bool:
    """Whether the installed torch can use no GPU, by its version's tag (2.13.0+cpu)."""
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


# --------------------------------------------------------------------------------------- placing a run here


def place(launch: LaunchConfig) -> Placement:
    """Fill in what `launch` leaves open. Raises ConfigError for a device or a number of ranks that is not here."""
    available = gpus() if launch.device != "cpu" else ()
    if torch_is_cpu_build():
        if launch.device == "cuda":
            raise ConfigError("launch.device", "cuda", "the installed torch is a CPU build", "install one with CUDA")
        available = ()
    if launch.device == "cuda" and not available:
        raise ConfigError("launch.device", "cuda", "no NVIDIA GPU is visible", "take launch.device=cpu")
    device: Literal["cpu", "cuda"] = "cuda" if available else "cpu"
    core_count = cores()
    if device == "cuda":
        ranks = launch.ranks or len(available)
        if ranks > len(available):
            raise ConfigError("launch.ranks", ranks, f"more than the {len(available)} visible GPUs")
    else:
        ranks = launch.ranks or min(2, core_count)
        if ranks > MOST_RANKS_PER_CORE * core_count:
            raise ConfigError(
                "launch.ranks", ranks, f"too many for {core_count} cores",
                f"at most {MOST_RANKS_PER_CORE * core_count} ({MOST_RANKS_PER_CORE} per core)",
            )  # fmt: skip
    threads = launch.threads_per_rank or max(1, core_count // ranks)
    memory_gib = memory_bytes() / 2**30
    return Placement(device, ranks, threads, available[:ranks], memory_gib=memory_gib, swap_gib=swap_bytes() / 2**30)


def check_precision(config: Config, placement: Placement) -> None:
    """Raises ConfigError where the hardware cannot compute in train.precision."""
    precision = config.train.precision
    if precision == "bf16":
        for gpu in placement.gpus:
            if gpu.capability < (8, 0):
                raise ConfigError(
                    "train.precision", precision, f"GPU {gpu.index} ({gpu.name}) has no bf16", "take fp16 or fp32"
                )
    if precision == "fp16" and placement.device == "cpu" and not cpu_has_fp16():
        raise ConfigError("train.precision", precision, "this CPU has no fp16 arithmetic", "take bf16 or fp32")
    _check_float8(config, placement)
    _check_quantized_communication(config, placement)


def _check_float8(config: Config, placement: Placement) -> None:
    if config.compress.float8 is None:
        return
    lacking = next((gpu for gpu in placement.gpus if gpu.capability < (8, 9)), None)
    if placement.device == "cpu" or lacking is not None:
        what = "this run is on the CPU" if lacking is None else f"GPU {lacking.index} ({lacking.name}) has none"
        problem = f"needs float8 arithmetic (compute capability 8.9: Ada, Hopper, Blackwell), and {what}"
        raise ConfigError("compress.float8", config.compress.float8.recipe, problem, "take compress=none")


def _check_quantized_communication(config: Config, placement: Placement) -> None:
    """ZeRO++'s kernels are CUDA's; DeepSpeed would find out at the first gather."""
    engine = config.engine
    if not isinstance(engine, DeepSpeedConfig) or placement.device != "cpu":
        return
    passed = engine.deepspeed.get("zero_optimization")
    named = [key for key, value in passed.items() if "quantized" in key and value] if isinstance(passed, dict) else []
    if engine.quantized_communication or named:
        key = f"engine.deepspeed.zero_optimization.{named[0]}" if named else "engine.quantized_communication"
        problem = "ZeRO++ quantizes what it sends with CUDA kernels, and this run is on the CPU"
        raise ConfigError(key, True, problem, "set it to false")


def cpu_has_fp16() -> bool:
    """Whether torch's CPU kernels (oneDNN) compute in fp16 here; bf16 works on every CPU, in software if need be."""
    if platform.machine() in ("aarch64", "arm64"):
        return "asimdhp" in cpu_flags() or platform.system() == "Darwin"
    return bool({"avx512_fp16", "avx_ne_convert"} & cpu_flags())
