"""Run a function on several real gloo ranks, each a process of its own, and collect what each returns.

The processes are forked from one that has imported everything (tests/zygote.py): ranks in a tenth of a second.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bigtrain.launch import ops

ROOT = Path(__file__).parents[2]
ZYGOTE = "tests.zygote"
_FORKS = multiprocessing.get_context("forkserver")


def start(function: Callable[..., None], world_size: int, *arguments: Any) -> list[BaseProcess]:
    """One process per rank, which calls `function(rank, *arguments)` in the environment that a launcher gives it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_EXTENSIONS_DIR": str(ops.extensions_dir()), "PATH": ops.search_path(),
    }  # fmt: skip
    _serve()
    processes = []
    for rank in range(world_size):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = _FORKS.Process(target=_rank, args=(function, rank, own, arguments))
        process.start()
        processes.append(process)
    return processes


def fork(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """One process that calls `function(*arguments)` where everything is imported."""
    _serve()
    process = _FORKS.Process(target=function, args=arguments)
    process.start()
    return process


def _serve() -> None:
    """Have the fork server run, which finds modules from where it is started."""
    _FORKS.set_forkserver_preload([ZYGOTE])
    here = os.getcwd()
    os.chdir(ROOT)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.chdir(here)


def _rank(function: Callable[..., None], rank: int, environment: dict[str, str], arguments: tuple[Any, ...]) -> None:
    if ZYGOTE not in sys.modules:  # the fork server passes over what it cannot import
        raise RuntimeError(f"{ZYGOTE} was not imported before the fork")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    function(rank, *arguments)


def run_ranks(target: str, world_size: int, arguments: dict[str, Any] | None = None, timeout: float = 300) -> list[Any]:
    """`target` is "module:function"; it gets `arguments` (JSON-able) as keywords and returns something JSON-able.

    Raises AssertionError with the ranks' output if any of them fails.
    """
    ops.remove_stale_locks(ops.extensions_dir())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = start(_call, world_size, target, json.dumps(arguments or {}), folder)
        deadline = time.monotonic() + timeout
        try:
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in processes:
                process.kill()
                process.join()
        codes = [process.exitcode for process in processes]
        logs = [folder / f"{rank}.log" for rank in range(world_size)]
        output = "\n".join(f"--- {log.stem}\n{log.read_text()[-4000:]}" for log in logs if log.exists())
        assert codes == [0] * world_size, f"exit codes {codes}\n{output}"
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


def _call(rank: int, target: str, arguments: str, folder: Path) -> None:
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    module, function = target.split(":")
    value = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    (folder / f"{rank}.json").write_text(json.dumps(value))
    sys.stderr.flush()
    distributed = sys.modules["torch.distributed"]
    if distributed.is_initialized():
        distributed.barrier()  # or a rank that is still in its last collective would lose its peer
    os._exit(0)  # as bigtrain's own ranks end
