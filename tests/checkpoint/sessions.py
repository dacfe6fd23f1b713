"""Real sessions of a run, ranks and all, through bigtrain.worker.main, in forked processes: a second or two each.

A session can be told to be killed, with SIGKILL, at a named point inside a save: the point is patched in here, the
product has none.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.distributed import ranks

DISK_FULL = "disk full"  # no kill: writing the state refuses once
STOP = "evaluation"  # no kill: the rank is asked to stop in the middle of an evaluation


def start(
    config_file: Path, world_size: int, kill_at: str | None = None, kill_step: int = 0, victim: int = 0
) -> list[BaseProcess]:
    """One process per rank. `kill_at`: the point at which rank `victim` kills itself while it saves `kill_step`."""
    return ranks.start(_rank, world_size, config_file, os.getpid(), kill_at, kill_step, victim)


def end(processes: list[BaseProcess], timeout: float = 120) -> list[int | None]:
    """Wait until the ranks end; once one has died the others are killed, as the launcher does. Their exit codes."""
    deadline = time.monotonic() + timeout
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode for process in processes) or time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.01)
    return [process.exitcode for process in processes]


def doing(config_file: Path, rank: int) -> str:
    """The phase that a rank was last in."""
    try:
        return str(json.loads((config_file.parent / "heartbeats" / f"rank-{rank}.json").read_text())["phase"])
    except (OSError, ValueError):
        return "not begun"


def _rank(rank: int, config_file: Path, parent: int, kill_at: str | None, kill_step: int, victim: int) -> None:
    from bigtrain import worker

    if kill_at is not None and rank == victim:
        (POINTS | {DISK_FULL: _fill_disk, STOP: _stop})[kill_at](kill_step)
    os.environ["BIGTRAIN_PARENT_PID"] = str(parent)
    sha256 = hashlib.sha256(config_file.read_bytes()).hexdigest()
    sys.argv = ["bigtrain.worker", str(config_file), "--sha256", sha256]
    worker.main()


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


def _stop(step: int) -> None:
    """SIGTERM after the second batch of an evaluation at `step`."""
    from bigtrain import heartbeat

    original, batches = heartbeat.beat, []

    def patched() -> None:
        original()
        if (heartbeat._phase, heartbeat._step) == (heartbeat.EVALUATING, step):
            batches.append(step)
            if len(batches) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    heartbeat.beat = patched


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
