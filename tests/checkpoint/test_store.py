"""A save that fails on one rank leaves what was there, on every rank, and says why."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bigtrain.checkpoint import checkpoints, store
from bigtrain.checkpoint.integrity import read_manifest
from bigtrain.errors import BigtrainError
from tests.distributed.curves import ZERO, build, join, make
from tests.distributed.ranks import run_ranks


def raising(number: int) -> Callable[..., None]:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


FAULTS = {  # what is refused -> on which rank, and what is said of it
    "a full disk": (1, "No space left on device"),
    "a failing disk": (1, "Input/output error"),
    "a read-only disk": (0, "Read-only file system"),
    "too little room, seen ahead": (0, "no space: 0 MiB free in "),
}


def failing(folder: str, stage: str) -> list[Any]:
    """Runs in each rank: a good save, then some that fail, each on one rank, then good ones again."""
    host = join()
    built = build(make(ZERO[stage], "fp32"))
    run = Path(folder)
    store.save(run, 1, built, host, {"tokens": 5}, keep=2)
    writer: Any = built.engine.checkpoint_engine  # type: ignore[attr-defined]
    messages = []
    for fault, (rank, _) in FAULTS.items():
        with pytest.MonkeyPatch.context() as patch:
            if host.rank != rank:
                pass
            elif fault == "a full disk":
                patch.setattr(writer, "save", raising(errno.ENOSPC))
            elif fault == "a failing disk":
                patch.setattr(writer, "save", raising(errno.EIO))
            elif fault == "a read-only disk":
                patch.setattr(Path, "mkdir", raising(errno.EROFS))
            else:
                patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
            with pytest.raises(BigtrainError) as refused:
                store.save(run, 2, built, host, {}, keep=2)
            messages.append(str(refused.value))
    after_failure = [checkpoint.step for checkpoint in checkpoints(run)]
    host.gather(None)
    for step in (3, 4):
        store.save(run, step, built, host, {}, keep=2)
    host.gather(None)  # rank 0 removes old ones last
    return [messages, after_failure, [checkpoint.step for checkpoint in checkpoints(run)]]


def damage(path: Path, reader: int) -> str:
    """Flip a bit in a file that of two ranks only `reader` looks at: each reads every other one. The file's name."""
    name = sorted(read_manifest(path)["files"])[reader]
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    return name


def choosing(folder: str) -> list[Any]:
    """In each rank: of three checkpoints the newest are damaged, then all; what is chosen, what is said, the error."""
    host = join()
    built = build(make(ZERO["zero2"], "fp32"))
    run = Path(folder)
    paths = [store.save(run, step, built, host, {}, keep=3) for step in (1, 2, 3)]
    host.gather(None)
    names = [damage(paths[2], reader=1), damage(paths[1], reader=0)] if host.rank == 0 else None
    names = host.broadcast(names)
    chosen, said = store.choose(run, "auto", host)
    assert chosen is not None
    store.load(chosen, built)
    host.gather(None)
    if host.rank == 0:
        damage(paths[0], reader=1)
    host.gather(None)
    with pytest.raises(BigtrainError) as refused:
        store.choose(run, "auto", host)
    return [names, chosen.step, said, str(refused.value)]


def test_damaged_newest_checkpoints_are_set_aside_by_all_ranks_alike(tmp_path: Path) -> None:
    first, second = run_ranks(f"{__name__}:choosing", 2, {"folder": str(tmp_path)})
    assert first == second
    names, step, said, refusal = first
    assert step == 1
    for line, name, bad in zip(said, names, (3, 2), strict=True):
        kept = tmp_path / "checkpoints" / f"step-{bad:08d}.bad"
        assert line == f"step-{bad:08d} is damaged ({name}: SHA-256 differs) and not used; it is kept as {kept}"
        assert kept.is_dir()
    assert "every checkpoint in" in refusal
    assert "step-00000001 is damaged" in refusal
    assert checkpoints(tmp_path) == []


def test_a_failed_save_is_undone_and_named(tmp_path: Path) -> None:
    arguments = {"folder": str(tmp_path), "stage": "zero3"}
    for messages, after_failure, kept in run_ranks(f"{__name__}:failing", 2, arguments):
        for message, (rank, said) in zip(messages, FAULTS.values(), strict=True):
            assert message.startswith(f"checkpoint of step 2 was not written: rank {rank}: ")
            assert said in message
        assert after_failure == [1]
        assert kept == [3, 4]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]
    manifest = checkpoints(tmp_path)[0].manifest
    assert manifest["world_size"] == 2
    assert any(name.startswith("engine/") for name in manifest["files"])
