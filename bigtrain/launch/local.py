"""Ranks on this machine, through the real deepspeed launcher: the part of it that starts the ranks of one host."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from bigtrain import foreign
from bigtrain.config import Config, dump, held_back
from bigtrain.errors import BigtrainError
from bigtrain.files import write_atomic
from bigtrain.hardware import Placement
from bigtrain.launch import ops
from bigtrain.launch.cause import failure_files, first_cause
from bigtrain.launch.hang import Hang, HangDetector
from bigtrain.launch.restart import Restarts
from bigtrain.launch.run_dir import read_result, readable_errors
from bigtrain.launch.shared_memory import Segments
from bigtrain.launch.supervise import LAUNCH_ID, WORKER, Ending, supervise
from bigtrain.provenance import code_sha256, versions
from bigtrain.redact import HELD_BACK, redact

ADDRESS = "127.0.0.1"
RESTARTS = "BIGTRAIN_RESTARTS"  # in the ranks' environment: how often the run was started again, for result.json

# glibc maps each large tensor anew and gives it back when it is freed, so that every step faults all its pages in
# again: a fifth of a GPT-2 step on CPUs. Keep freed memory instead, in one arena. The small rests of aligned blocks
# must not wait in the caches for small blocks: the freed tensor beside them could not grow back to its size with
# them, and the next one like it would find no room but at the end of the heap, step after step.
KEEP_FREED_MEMORY = ":".join(
    f"glibc.malloc.{name}"
    for name in (
        "mmap_max=0", "trim_threshold=1099511627776", "top_pad=268435456", "arena_max=1", "hugetlb=1",
        "tcache_count=0", "mxfast=0",
    )
)  # fmt: skip
# Who offloads to the disk is short of memory: the holes that kept memory gets are a fifth of such a run's, and its
# steps wait for the disk, not for pages.
GIVE_FREED_MEMORY_BACK = "glibc.malloc.mmap_threshold=1048576:glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"

# GPUs are named to the launcher by number instead of CUDA_VISIBLE_DEVICES, which it ignores with a warning.
_OURS = ("CUDA_VISIBLE_DEVICES", "HYDRA_FULL_ERROR")


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
    devices = [gpu.index for gpu in placement.gpus] if placement.device == "cuda" else list(range(placement.ranks))
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    command = [
        # What `deepspeed` itself starts on a single host, once it has found out what is known here, and without what
        # takes them seconds each: to import torch and all of DeepSpeed.
        sys.executable, "-u", "-m", "bigtrain.launch.light_launcher", f"--world_info={world}",
        f"--master_addr={ADDRESS}", f"--master_port={port}", "--no_local_rank", "--log_level=critical",
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
        environment["GLIBC_TUNABLES"] = os.environ.get("GLIBC_TUNABLES", heap_settings(config))
        if "GLOO_SOCKET_IFNAME" not in os.environ and "lo" in psutil.net_if_addrs():
            environment["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo looks up the host's own name, which may lead nowhere
    return Start(command, environment | config.launch.env, taken_away(), port)


def taken_away() -> tuple[str, ...]:
    """The variables of this process that would mislead a launcher or a rank: other launchers' (foreign.py)."""
    return (*foreign.found({*os.environ, *foreign.IDENTITY}), *_OURS)


def heap_settings(config: Config) -> str:
    """GLIBC_TUNABLES of a rank on CPUs."""
    offloaded = {getattr(config.engine, f"offload_{what}", "none") for what in ("optimizer", "parameters")}
    return GIVE_FREED_MEMORY_BACK if "nvme" in offloaded else KEEP_FREED_MEMORY


def run(
    config: Config, placement: Placement, say: Callable[[str], None],
    launch_once: Callable[[Config, Placement, int], Launch] | None = None,
) -> tuple[dict[str, Any], bool]:  # fmt: skip
    """Start the ranks, watch them to the end, and if they fail start them again, as launch.restarts allows.

    Returns result.json and whether the run was asked to stop (it may have finished all the same). `say` takes a line
    for each restart. `launch_once` starts them another way than on this machine.

    Raises BigtrainError, in one line, for the first cause if they fail, and KeyboardInterrupt if somebody stopped
    them before there was a result.
    """
    run_dir = Path(config.run_dir)
    restarts = Restarts(config)
    while True:
        launch = (launch_once or _launch)(config, placement, restarts.total)
        ending, result = launch.ending, launch.result
        failed = any(failure_files(run_dir)) or any(ending.ranks.values()) or ending.hang is not None
        asked = ending.signals > 0
        if result is not None and not failed:
            ordered = config.train.stop_at is not None and result.get("train/steps", 0) >= config.train.stop_at
            stopped = result.get("status") == "stopped" and not ordered  # train.stop_at is as good an end as any
            if asked or not (stopped and ending.launcher_lost):
                return result, asked or stopped  # a rank may have been asked, not this process
        if asked and not any(failure_files(run_dir)):
            raise KeyboardInterrupt
        cause = first_cause(run_dir, ending)
        if asked:
            raise BigtrainError(cause.line)
        with readable_errors(run_dir):
            say(restarts.again(cause, launch.ran))
        config = restarts.resumed(config)
        ops.remove_stale_locks(ops.extensions_dir())  # a rank may have been killed while it compiled


@dataclass(frozen=True)
class Launch:
    ending: Ending
    result: dict[str, Any] | None  # result.json if this launch wrote it
    ran: bool  # the ranks took a step


def _launch(config: Config, placement: Placement, restarts: int) -> Launch:
    """Write the config and start the ranks on it, once, on a port of its own."""
    run_dir, text = Path(config.run_dir), dump(config)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    start = start_of(config, placement, sha256)
    with readable_errors(run_dir):
        write_atomic(run_dir / "config.yaml", text)
        write_atomic(run_dir / "config.sha256", f"{sha256}\n")
        write_atomic(run_dir / "launch.json", json.dumps(_record(start, placement), indent=1) + "\n")
        for path in failure_files(run_dir):
            path.unlink()
        hangs = HangDetector(run_dir, placement.ranks, config.launch.hang_seconds)
    environment = {name: value for name, value in os.environ.items() if name not in start.removed} | start.environment
    environment[HELD_BACK] = json.dumps(held_back(config))  # config.yaml has none of them
    environment[RESTARTS] = str(restarts)
    before = identity(run_dir / "result.json")
    segments = Segments(start.port)

    def look(alive: Mapping[int, psutil.Process], ended: set[int]) -> Hang | None:
        segments.sample(alive.values())
        return hangs.look(alive, ended)

    ending = supervise(
        start.command, environment, placement.ranks, config.launch.stop_seconds,
        failed=lambda: any(failure_files(run_dir)), look=look,
    )  # fmt: skip
    segments.remove()
    result = read_result(run_dir) if identity(run_dir / "result.json") != before else None
    return Launch(ending, result, hangs.past_first_step())


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


def identity(path: Path) -> tuple[int, int] | None:
    """Changes whenever the file is written anew."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
