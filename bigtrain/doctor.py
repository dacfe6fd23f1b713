"""`bigtrain doctor`: what this machine has for training, and what to install where something is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bigtrain import hardware
from bigtrain.errors import BigtrainError
from bigtrain.launch import gpu_health, ops

PACKAGES = ("torch", "deepspeed", "accelerate", "transformers", "tokenizers", "safetensors", "hydra-core", "omegaconf",
            "wandb", "matplotlib")  # fmt: skip
OPTIONAL_PACKAGES = {
    "datasets": "Hugging Face datasets", "pyarrow": "parquet files", "zstandard": ".zst files",
    "torchao": "optimizer=adamw8bit, compress=qat_*",
    "opacus": "train.privacy",
}  # fmt: skip
LEAST_SHARED_MEMORY = 64 * 2**20  # what a container gets by default, and NCCL finds short
LEAST_DISK = 2 * 2**30

Status = Literal["good", "note", "missing"]


@dataclass(frozen=True)
class Finding:
    name: str
    status: Status  # note: training works, something is slower or unavailable
    value: str
    way_out: str = ""


def examine(build: bool) -> bool:
    """Print the table; with `build`, compile the native ops first. Returns whether everything needed is there."""
    from rich.console import Console
    from rich.table import Table

    findings = list(findings_here(build))
    table = Table(box=None, pad_edge=False)
    for heading in ("", "what", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    marks = {"good": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[red]missing[/]"}
    for finding in findings:
        table.add_row(marks[finding.status], finding.name, finding.value, finding.way_out)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return all(finding.status != "missing" for finding in findings)


def findings_here(build: bool = False) -> Iterator[Finding]:
    """Everything that is looked at, in the order of the table."""
    yield _python()
    yield from _packages()
    yield from _compilers()
    yield from _processor()
    yield from _storage()
    yield _port()
    yield from _ops(build)


def _python() -> Finding:
    version, supported = platform.python_version(), (3, 10) <= sys.version_info[:2] <= (3, 13)
    return Finding(
        "python", "good" if supported else "missing", version, "" if supported else "use Python 3.10 to 3.13"
    )


def _packages() -> Iterator[Finding]:
    for name in PACKAGES:
        version = _version(name)
        way_out = "" if version else "pip install bigtrain"
        yield Finding(name, "good" if version else "missing", version or "not installed", way_out)
    for name, use in OPTIONAL_PACKAGES.items():
        version = _version(name)
        way_out = "" if version else f"pip install {name}, for {use}"
        yield Finding(name, "good" if version else "note", version or "not installed", way_out)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compilers() -> Iterator[Finding]:
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    needed = "install a C++ compiler: apt-get install g++ (Debian), dnf install gcc-c++ (Fedora)"
    yield Finding(
        "C++ compiler", "good" if compiler else "missing", compiler or "not found", "" if compiler else needed
    )
    scripts = os.path.dirname(sys.executable)
    ninja = shutil.which("ninja") or shutil.which("ninja", path=scripts)
    yield Finding("ninja", "good" if ninja else "missing", ninja or "not found", "" if ninja else "pip install ninja")


def _processor() -> Iterator[Finding]:
    yield Finding("cores", "good", str(hardware.cores()))
    yield Finding("memory", "good", _gib(hardware.memory_bytes()))
    try:
        gpus = hardware.gpus()
    except BigtrainError as error:
        yield Finding("GPUs", "missing", str(error), "correct CUDA_VISIBLE_DEVICES")
        gpus = ()
    for gpu in gpus:
        capability = ".".join(map(str, gpu.capability))
        bf16 = "bf16" if gpu.capability >= (8, 0) else "no bf16: take train.precision=fp16"
        yield Finding(
            f"GPU {gpu.index}", "good", f"{gpu.name}, {gpu.memory_gib:.0f} GiB, compute capability {capability}, {bf16}"
        )
    for line in gpu_health.problems():
        name, _, problem = line.partition(": ")
        yield Finding(name, "note", problem, "nvidia-smi -q, dmesg")
    if gpus and hardware.torch_is_cpu_build():
        yield Finding("torch for GPUs", "missing", "a CPU build", "pip install torch from an index with CUDA builds")
    if not gpus:
        yield Finding("GPUs", "good", "none visible: ranks run on the CPU")
        flags = hardware.cpu_flags()
        fast = [name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in flags]
        slow = "" if fast else "train.precision=fp32 may be faster here"
        yield Finding("bf16 on the CPU", "good" if fast else "note", fast[0] if fast else "in software", slow)
        yield Finding("fp16 on the CPU", "good", "yes" if hardware.cpu_has_fp16() else "no: take bf16 or fp32")


def _storage() -> Iterator[Finding]:
    free = shutil.disk_usage(".").free
    way_out = "free some space: checkpoints take about 14 bytes per parameter"
    yield Finding("disk here", *_at_least(free, LEAST_DISK, way_out))
    shared = Path("/dev/shm")
    if shared.is_dir():
        way_out = "NCCL and data workers pass data through it (docker run --shm-size=1g)"
        yield Finding("/dev/shm", *_at_least(shutil.disk_usage(shared).free, LEAST_SHARED_MEMORY, way_out))
    cache = Path("~/.cache/bigtrain").expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
        yield Finding("data cache", "good", str(cache))
    except OSError as error:
        yield Finding("data cache", "note", f"{cache}: {error.strerror}", "name another with data.cache_dir=DIR")


def _at_least(free: int, wanted: int, way_out: str) -> tuple[Status, str, str]:
    return ("good", f"{_gib(free)} free", "") if free >= wanted else ("note", f"only {_gib(free)} free", way_out)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _port() -> Finding:
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
        return Finding("ports", "good", "a free one on 127.0.0.1")
    except OSError as error:
        return Finding("ports", "missing", f"none can be opened on 127.0.0.1 ({error.strerror})", "check the firewall")


def _ops(build: bool) -> Iterator[Finding]:
    """DeepSpeed's native ops; without `build` it is only said whether they are compiled already."""
    if not _version("torch") or not _version("deepspeed"):
        return
    directory = ops.extensions_dir()
    device = "cuda" if hardware.installed_gpus() else "cpu"
    for name in (ops.CPU_ADAM if device == "cuda" else ops.CPU_LION, ops.ASYNC_IO):
        if build and ops.missing([name], directory):
            try:
                ops.build(name, directory, device)
            except BigtrainError as error:
                yield Finding(f"op {name}", "missing", "cannot be built", str(error))
                continue
        if ops.missing([name], directory):
            yield Finding(f"op {name}", "good", "not built yet", "bigtrain doctor --build, or at first use")
        else:
            yield Finding(f"op {name}", "good", f"built in {directory}")
