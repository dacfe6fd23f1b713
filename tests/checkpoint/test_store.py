"""A save that fails on one rank leaves what was there, on every rank, and says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bigtrain.checkpoint import checkpoints, store
from bigtrain.errors import BigtrainError
from tests.distributed.curves import ZERO, build, join, make
from tests.distributed.ranks import run_ranks


def failing(folder: str, stage: str) -> list[Any]:
    """Runs in each rank: a good save, then one whose writing fails on rank 1, then a good one again."""
    host = join()
    built = build(make(ZERO[stage], "fp32"))
    run = Path(folder)
    store.save(run, 1, built, host, {"tokens": 5}, keep=2)
    writer: Any = built.engine.checkpoint_engine  # type: ignore[attr-defined]
    write = writer.save

    def full(*arguments: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    if host.rank == 1:
        writer.save = full
    try:
        store.save(run, 2, built, host, {}, keep=2)
        message = ""
    except BigtrainError as error:
        message = str(error)
    writer.save = write
    after_failure = [checkpoint.step for checkpoint in checkpoints(run)]
    host.gather(None)
    for step in (3, 4):
        store.save(run, step, built, host, {}, keep=2)
    host.gather(None)  # rank 0 removes old ones last
    return [message, after_failure, [checkpoint.step for checkpoint in checkpoints(run)]]


def test_a_failed_save_is_undone_and_named(tmp_path: Path) -> None:
    arguments = {"folder": str(tmp_path), "stage": "zero3"}
    for message, after_failure, kept in run_ranks("tests.checkpoint.test_store:failing", 2, arguments):
        assert "checkpoint of step 2 was not written: rank 1" in message
        assert "No space left on device" in message
        assert after_failure == [1]
        assert kept == [3, 4]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]
    manifest = checkpoints(tmp_path)[0].manifest
    assert manifest["world_size"] == 2
    assert any(name.startswith("engine/") for name in manifest["files"])
