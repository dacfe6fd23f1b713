"""Ranks on this machine, through the real deepspeed launcher."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from bigtrain.config import Config, dump, held_back
from bigtrain.errors import BigtrainError
from bigtrain.files import write_atomic
from bigtrain.hardware import Placement
from bigtrain.launch import ops
from bigtrain.launch.run_dir import last_step, read_result, readable_errors
from bigtrain.launch.supervise import LAUNCH_ID, WORKER, Ending, supervise
from bigtrain.provenance import code_sha256, versions
from bigtrain.redact import HELD_BACK, redact

ADDRESS = "127.0.0.1"

# glibc maps each large tensor anew and gives it back when it is freed, so that every step faults all its pages in
# again: a fifth of a GPT-2 step on CPUs. Keep freed memory instead, in one arena.
_KEEP_FREED_MEMORY = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.top_pad=268435456"
_KEEP_FREED_MEMORY += ":glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"

# What another launcher (Slurm, torchrun, a surrounding run) may have left in the environment would mislead this one.
# GPUs are named to the launcher by number instead of CUDA_VISIBLE_DEVICES, which it ignores with a warning.
_FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE",
            "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "HYDRA_FULL_ERROR")  # fmt: skip


@dataclass(frozen=True)
class Start:
    """Exactly what starts a run's processes on one node."""

    command: list[str]
    environment: dict[str, str]  # what is set; everything else is inherited
    removed: tuple[str, ...]  # inherited variables that are taken away
    port: int


def start_of(config: Config, placement: Placement, sha256: str) -> Start:
    """The command and environment for `config`, whose launch section says what `placement` resolved."""
    port = config.launch.master_port or free_port()
    if placement.device == "cuda":
        devices = ["--include=localhost:" + ",".join(str(gpu.index) for gpu in placement.gpus)]
    else:
        devices = [f"--num_accelerators={placement.ranks}"]
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner",
        "--hostfile=/dev/null",  # no file: a stray /job/hostfile is not ours
        *devices, f"--master_addr={ADDRESS}", f"--master_port={port}",
        "--no_local_rank", "--log_level=critical",
        "--module", WORKER, str(Path(config.run_dir) / "config.yaml"), "--sha256", sha256,
    ]  # fmt: skip
    environment = {
        "DS_ACCELERATOR": placement.device,
        "OMP_NUM_THREADS": str(placement.threads_per_rank),
        "PATH": ops.search_path(),
        "TORCH_EXTENSIONS_DIR": str(ops.extensions_dir()),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "BIGTRAIN_PARENT_PID": str(os.getpid()),
        LAUNCH_ID: uuid.uuid4().hex,
    }
    if placement.device == "cuda":
        environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # nvidia-smi's numbers
    else:
        environment["GLIBC_TUNABLES"] = os.environ.get("GLIBC_TUNABLES", _KEEP_FREED_MEMORY)
        if "GLOO_SOCKET_IFNAME" not in os.environ and "lo" in psutil.net_if_addrs():
            environment["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo looks up the host's own name, which may lead nowhere
    return Start(command, environment | config.launch.env, _FOREIGN, port)


def run(config: Config, placement: Placement) -> tuple[dict[str, Any], bool]:
    """Write the config, start the ranks on it, watch them to the end.

    Returns result.json and whether somebody asked the run to stop (it may have finished all the same).

    Raises BigtrainError, in one line, for the first cause if they fail, and KeyboardInterrupt if somebody stopped
    them before there was a result.
    """
    run_dir, text = Path(config.run_dir), dump(config)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    start = start_of(config, placement, sha256)
    with readable_errors(run_dir):
        write_atomic(run_dir / "config.yaml", text)
        write_atomic(run_dir / "config.sha256", f"{sha256}\n")
        write_atomic(run_dir / "launch.json", json.dumps(_record(start, placement), indent=1) + "\n")
        _clear_failures(run_dir)
    environment = {name: value for name, value in os.environ.items() if name not in start.removed} | start.environment
    environment[HELD_BACK] = json.dumps(held_back(config))  # config.yaml has none of them
    before = _identity(run_dir / "result.json")
    ending = supervise(
        start.command, environment, placement.ranks, config.launch.stop_seconds,
        failed=lambda: any(_failure_files(run_dir)),
    )  # fmt: skip
    result = read_result(run_dir) if _identity(run_dir / "result.json") != before else None
    if result is not None and not any(_failure_files(run_dir)) and not any(ending.ranks.values()):
        return result, ending.signals > 0
    if ending.signals and not any(_failure_files(run_dir)):
        raise KeyboardInterrupt
    raise BigtrainError(first_cause(run_dir, ending))


def resolved(config: Config, placement: Placement) -> Config:
    """`config` with what `placement` decided filled in, for the ranks to read."""
    launch = replace(
        config.launch, device=placement.device, ranks=placement.ranks, threads_per_rank=placement.threads_per_rank
    )
    return replace(config, launch=launch)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((ADDRESS, 0))
        return int(listener.getsockname()[1])


def check_port(port: int) -> None:
    """Raises BigtrainError if a chosen master port is taken."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((ADDRESS, port))
        except OSError as error:
            raise BigtrainError(
                f"launch.master_port={port}: cannot be used ({error.strerror}); leave it null for a free one"
            ) from None


def _record(start: Start, placement: Placement) -> dict[str, Any]:
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "directory": os.getcwd(),
        "command": start.command,
        "environment": redact(start.environment, start.environment),
        "removed_from_environment": [name for name in start.removed if name in os.environ],
        "placement": asdict(placement),
        "code_sha256": code_sha256(),
        "versions": versions(),
    }


# ----------------------------------------------------------------------------------------------- what failed


def first_cause(run_dir: Path, ending: Ending) -> str:
    """One line for the failure that came first; the others are its echo.

    A rank that a signal killed says nothing itself, while its peers report lost connections: so a killing goes
    first, then what a rank reported, then a bare exit status. SIGTERM is how the launcher ends the peers.
    """
    step = last_step(run_dir)
    at = f" after step {step}" if step else " before the first step"
    killed = [
        (rank, -code) for rank, code in ending.ranks.items()
        if code is not None and code < 0 and code != -signal.SIGTERM and not _failure_file(run_dir, rank).exists()
    ]  # fmt: skip
    if not killed and 128 < ending.exit_code < 256:  # the launcher passes a rank's -9 on as 247
        unseen = [rank for rank, code in ending.ranks.items() if code is None]
        number = 256 - ending.exit_code
        if unseen and number in {*signal.Signals} and number != signal.SIGTERM:
            killed = [(unseen[0], number)]
    if killed:
        rank, number = killed[0]
        return (
            f"rank {rank} was killed by {_signal_name(number)}{at}{_guess(number)}; "
            f"last lines in {run_dir}/logs/rank-{rank}.log; the same run_dir continues from the last checkpoint"
        )
    failures = sorted(_read_failures(run_dir), key=lambda failure: failure.get("time", 0.0))
    rank, code = next(iter(ending.ranks.items()), (0, 0))  # the first to end
    if failures and code is None and not _failure_file(run_dir, rank).exists():
        return (  # the launcher took its exit status before we saw it; what the others report is an echo
            f"rank {rank} was killed{at}{_guess(signal.SIGKILL)}; last lines in {run_dir}/logs/rank-{rank}.log; "
            "the same run_dir continues from the last checkpoint"
        )
    if failures:
        first = failures[0]
        if first.get("expected"):
            return str(first.get("error"))
        return (
            f"rank {first['rank']} failed{at}: {first['error']}; traceback in {_failure_file(run_dir, first['rank'])}"
        )
    for rank, code in ending.ranks.items():
        if code:
            what = _signal_name(-code) if code < 0 else f"exit status {code}"
            return f"rank {rank} ended with {what}{at}; last lines in {run_dir}/logs/rank-{rank}.log"
    if ending.launcher_lost:
        return f"the deepspeed launcher was killed{at}; the ranks were ended"
    if not ending.ranks:
        return f"the deepspeed launcher ended with exit status {ending.exit_code} before any rank started"
    return f"the ranks ended without a result{at}; last lines in {run_dir}/logs/"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _guess(number: int) -> str:
    if number == signal.SIGKILL:
        return " (out of memory? see dmesg)"
    if number == signal.SIGBUS:
        return " (is /dev/shm full?)"
    return ""


def _failure_file(run_dir: Path, rank: object) -> Path:
    return run_dir / "failures" / f"rank-{rank}.json"


def _failure_files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "failures").glob("rank-*.json"))


def _read_failures(run_dir: Path) -> list[dict[str, Any]]:
    failures = []
    for path in _failure_files(run_dir):
        try:
            failure = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            failure = {"rank": path.stem.removeprefix("rank-"), "error": "its report cannot be read"}
        failures.append(failure)
    return failures


def _clear_failures(run_dir: Path) -> None:
    for path in _failure_files(run_dir):
        path.unlink()


def _identity(path: Path) -> tuple[int, int] | None:
    """Changes whenever the file is written anew."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
