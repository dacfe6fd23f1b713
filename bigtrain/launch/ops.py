"""DeepSpeed's native ops: where they are built, built ahead of the ranks, and locks that a killed build left behind.

DeepSpeed compiles an op at first use inside the rank, silently, and a lock left by a killed compiler makes every
later run wait for ever. Here the parent builds what is missing, with a line that says so, before any rank starts.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from bigtrain.config import AdamWConfig, Config, DeepSpeedConfig, LionConfig
from bigtrain.errors import BigtrainError
from bigtrain.files import user_cache

CPU_ADAM, ASYNC_IO = "cpu_adam", "async_io"
CPU_LION, FUSED_LION = "cpu_lion", "fused_lion"
BUILDERS = {
    CPU_ADAM: "CPUAdamBuilder", ASYNC_IO: "AsyncIOBuilder",
    CPU_LION: "CPULionBuilder", FUSED_LION: "FusedLionBuilder",
}  # fmt: skip
NEEDS = {ASYNC_IO: "libaio-dev (Debian) or libaio-devel"}
BUILD_TIMEOUT_SECONDS = 900
LACKING = 3  # exit status of a build that DeepSpeed's own check of headers and libraries refused


def extensions_dir() -> Path:
    """Where compiled ops are kept: one folder for each environment and torch, never shared between two.

    TORCH_EXTENSIONS_DIR if set; else inside the virtual environment; else in the user's cache.
    """
    if chosen := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(chosen).expanduser()
    torch = importlib.metadata.version("torch")
    prefix = Path(sys.prefix)
    isolated = sys.prefix != sys.base_prefix or (prefix / "conda-meta").is_dir()
    if isolated and os.access(prefix, os.W_OK):
        return prefix / "torch_extensions" / torch
    key = hashlib.sha256(f"{sys.prefix} {sys.version} {torch}".encode()).hexdigest()[:12]
    return user_cache() / f"torch_extensions-{key}"


def needed(config: Config, device: str) -> list[str]:
    """The ops that this run will use."""
    engine, optimizer, names = config.engine, config.optimizer, []
    offloaded = isinstance(engine, DeepSpeedConfig) and engine.offload_optimizer != "none"
    if isinstance(engine, DeepSpeedConfig) and "nvme" in (engine.offload_optimizer, engine.offload_parameters):
        names.append(ASYNC_IO)
    if isinstance(optimizer, LionConfig):
        names.append(CPU_LION if offloaded or device == "cpu" else FUSED_LION)
    if isinstance(optimizer, AdamWConfig) and offloaded and device == "cuda":
        names.append(CPU_ADAM)
    return names


def missing(names: list[str], directory: Path) -> list[str]:
    return [
        name for name in names
        if not (directory / name / f"{name}.so").exists() and not (directory / name / "installed").exists()
    ]  # fmt: skip


def build(name: str, directory: Path, device: str) -> None:
    """Compile one op into `directory`. Raises BigtrainError with what is missing, or the compiler's first error."""
    from rich.console import Console

    directory.mkdir(parents=True, exist_ok=True)
    remove_stale_locks(directory)
    environment = dict(os.environ, PATH=search_path(), TORCH_EXTENSIONS_DIR=str(directory), DS_ACCELERATOR=device)
    code = (
        "import sys; from deepspeed.accelerator import get_accelerator;"
        f"builder = get_accelerator().create_op_builder({BUILDERS[name]!r});"
        f"builder.is_compatible(verbose=False) or sys.exit({LACKING});"
        "builder.load(verbose=False)"
    )
    started = time.monotonic()
    with Console(stderr=True).status(f"building DeepSpeed's native op {name} (the first time only)"):
        try:
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True,
                timeout=BUILD_TIMEOUT_SECONDS, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise BigtrainError(f"building {name} took more than {BUILD_TIMEOUT_SECONDS} s") from None
    if done.returncode:
        log = directory / f"{name}.log"
        log.write_text(done.stdout + done.stderr)
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "error:" in line.lower()]
        reason = _lacking(name) if done.returncode == LACKING else (lines or ["the compiler failed"])[0].strip()
        raise BigtrainError(f"DeepSpeed's native op {name} cannot be built: {reason}; the whole output is in {log}")
    if missing([name], directory):  # a DeepSpeed that was installed with its ops built
        (directory / name).mkdir(exist_ok=True)
        (directory / name / "installed").touch()
    Console(stderr=True).print(f"built DeepSpeed's native op {name} in {time.monotonic() - started:.0f} s")


def search_path() -> str:
    """PATH with this environment's scripts in front: ninja lies there when the environment is not activated."""
    scripts, path = os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)
    return path if scripts in path.split(os.pathsep) else f"{scripts}{os.pathsep}{path}"


def prepare(config: Config, device: str) -> None:
    """Make sure that the run's ops are there and that no dead builder's lock holds them up."""
    directory = extensions_dir()
    for name in missing(needed(config, device), directory):
        build(name, directory, device)
    remove_stale_locks(directory)


def remove_stale_locks(directory: Path) -> list[Path]:
    """Remove each op's `lock` that no process holds open: a live builder keeps its lock file open (torch FileBaton)."""
    removed = []
    for lock in directory.glob("*/lock"):
        if not _is_open(lock):
            lock.unlink(missing_ok=True)
            removed.append(lock)
    return removed


def _is_open(path: Path) -> bool:
    wanted = str(path.resolve())
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if any(opened.path == wanted for opened in process.open_files()):
                return True
    return False


# ------------------------------------------------------------------------------------ what could be built here


def report() -> dict[str, str]:
    """{op: "built", "can be built" or why not} of the ops that a run may need, by DeepSpeed's own checks (headers,
    libraries) and the tools at hand. Imports torch and deepspeed."""
    from deepspeed.accelerator import get_accelerator

    lacks = [] if shutil.which("ninja") else ["ninja is missing"]
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        lacks.append("a C++ compiler is missing")
    found = {}
    for name, builder_name in BUILDERS.items():
        builder = get_accelerator().create_op_builder(builder_name)
        if not missing([name], extensions_dir()):
            found[name] = "built"
        elif builder is None or type(builder).__name__ == "NotImplementedBuilder":
            found[name] = f"not for {get_accelerator().device_name()}"
        elif lacks:
            found[name] = ", ".join(lacks)
        else:
            with contextlib.redirect_stdout(sys.stderr):  # what a failed check prints is no part of the answer
                fits = builder.is_compatible(verbose=False)
            found[name] = "can be built" if fits else _lacking(name)
    return found


def _lacking(name: str) -> str:
    return f"{NEEDS.get(name, 'what DeepSpeed wants for it')} is missing"
