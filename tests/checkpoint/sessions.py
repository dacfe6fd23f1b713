"""Real sessions of a run, ranks and all, in processes forked from one that has imported everything: a second each.

`start` begins a session through bigtrain.worker.run, as the launcher does. A session can be told to be killed, with
SIGKILL, at a named point inside a save: the point is patched in here, the product has none.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bigtrain.config import Config, load
from bigtrain.launch import ops

DISK_FULL = "disk full"  # no kill: writing the state refuses once
PRELOADED = ["torch", "deepspeed", "accelerate", "bigtrain.worker", "bigtrain.trainer", "bigtrain.engine.deepspeed"]
_FORKS = multiprocessing.get_context("forkserver")


def start(config_file: Path, ranks: int, kill_at: str | None = None, kill_step: int = 0) -> list[BaseProcess]:
    """One process per rank. `kill_at`: the point at which rank 0 kills itself while it saves `kill_step`."""
    _FORKS.set_forkserver_preload(PRELOADED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "TORCH_EXTENSIONS_DIR": str(ops.extensions_dir()),
        "PATH": ops.search_path(), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    processes = []
    for rank in range(ranks):
        process = _FORKS.Process(target=_rank, args=(config_file, rank, environment, kill_at, kill_step))
        process.start()
        processes.append(process)
    return processes


def end(processes: list[BaseProcess], timeout: float = 120) -> list[int | None]:
    """Wait until the ranks end; once one has died the others are killed, as the launcher does. Their exit codes."""
    deadline = time.monotonic() + timeout
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode for process in processes) or time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.01)
    return [process.exitcode for process in processes]


def _rank(config_file: Path, rank: int, environment: dict[str, str], kill_at: str | None, kill_step: int) -> None:
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    import torch

    from bigtrain import worker

    torch.set_num_threads(1)
    config: Config = load(config_file)
    terminal = worker.redirect_output(config_file.parent, rank)
    if kill_at is not None and rank == 0:
        (_fill_disk if kill_at == DISK_FULL else POINTS[kill_at])(kill_step)
    try:
        worker.run(config, config_file.parent, terminal, threading.Event(), time.time())
    except BaseException as error:
        worker.record_failure(config_file.parent, rank, error)
        os._exit(1)
    os._exit(0)


# ------------------------------------------------------------------------------------------------ named points


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before(module: Any, name: str, when: Callable[..., bool]) -> None:
    original = getattr(module, name)

    def patched(*arguments: Any, **keywords: Any) -> Any:
        if when(*arguments, **keywords):
            _die()
        return original(*arguments, **keywords)

    setattr(module, name, patched)


def _after(module: Any, name: str, when: Callable[..., bool]) -> None:
    original = getattr(module, name)

    def patched(*arguments: Any, **keywords: Any) -> Any:
        result = original(*arguments, **keywords)
        if when(*arguments, **keywords):
            _die()
        return result

    setattr(module, name, patched)


def _of(step: int) -> Callable[..., bool]:
    """Whether the first path among the arguments belongs to the save of `step`."""

    def matches(*arguments: Any, **_: Any) -> bool:
        paths = [argument for argument in arguments if isinstance(argument, (str, Path))]
        return bool(paths) and f"{step:08d}" in str(paths[0])

    return matches


def _half_written(step: int) -> None:
    import torch

    original = torch.save

    def patched(value: Any, path: Any, *arguments: Any, **keywords: Any) -> None:
        original(value, path, *arguments, **keywords)
        if f"{step:08d}" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            _die()

    torch.save = patched  # type: ignore[assignment]


def _half_manifest(step: int) -> None:
    original = Path.write_text

    def patched(self: Path, text: str, *arguments: Any, **keywords: Any) -> int:
        if self.name == "manifest.json" and f"{step:08d}" in str(self):
            original(self, text[: len(text) // 2], *arguments, **keywords)
            _die()
        return original(self, text, *arguments, **keywords)

    Path.write_text = patched  # type: ignore[method-assign]


def _fill_disk(step: int) -> None:
    import torch

    original = torch.save

    def patched(value: Any, path: Any, *arguments: Any, **keywords: Any) -> None:
        if f"{step:08d}" in str(path):
            raise OSError(28, "No space left on device")
        original(value, path, *arguments, **keywords)

    torch.save = patched  # type: ignore[assignment]


def _store() -> Any:
    from bigtrain.checkpoint import store

    return store


def _integrity() -> Any:
    from bigtrain.checkpoint import integrity

    return integrity


def _torch() -> Any:
    import torch

    return torch


POINTS: dict[str, Callable[[int], None]] = {
    "before staging": lambda step: _before(
        _store().Saver, "_make_room", lambda _, staging: staging.name.endswith(f"{step:08d}")
    ),
    "before a file is opened": lambda step: _before(_torch(), "save", lambda _, path, **k: f"{step:08d}" in str(path)),
    "half written": _half_written,
    "before the hash": lambda step: _before(_integrity(), "sha256", _of(step)),
    "after the hash": lambda step: _after(_integrity(), "sha256", _of(step)),
    "all written, nothing agreed": lambda step: _after(_store(), "_write", _of(step)),
    "before the manifest": lambda step: _before(_integrity(), "seal", _of(step)),
    "half a manifest": _half_manifest,
    "before the rename": lambda step: _after(_integrity(), "seal", _of(step)),
    "after the rename": lambda step: _after(_store(), "_publish", _of(step)),
    "while old ones are removed": lambda step: _before(
        __import__("shutil"), "rmtree", lambda path, **k: "removed-" in str(path) and Path(path).exists()
    ),
}
