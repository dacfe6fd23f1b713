"""The rules of a run directory, without starting anything."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

import pytest

from bigtrain.errors import BigtrainError
from bigtrain.launch import run_dir


def test_a_directory_is_held_by_one_process(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    with run_dir.claim(path), pytest.raises(BigtrainError, match=f"in use by process {os.getpid()}"):  # noqa: SIM117
        with run_dir.claim(path):
            pass
    with run_dir.claim(path):
        pass
    with open(path / run_dir.LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_what_claim_made_goes_again_if_nothing_came_of_it(tmp_path: Path) -> None:
    (tmp_path / "was here").mkdir()
    with pytest.raises(RuntimeError), run_dir.claim(tmp_path / "was here" / "a" / "b"):
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["was here"]
    started = tmp_path / "was here" / "a" / "config.yaml"
    with contextlib.suppress(RuntimeError), run_dir.claim(started.parent):
        started.touch()
        raise RuntimeError
    assert started.exists()


def test_the_last_step_of_a_torn_file(tmp_path: Path) -> None:
    assert run_dir.last_step(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert run_dir.last_step(tmp_path) == 2
