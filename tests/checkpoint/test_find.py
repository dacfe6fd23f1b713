"""What counts as a checkpoint, and which one a run continues from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bigtrain.checkpoint import checkpoints, newest, resolve_resume
from bigtrain.errors import ConfigError


def make(run: Path, step: int) -> Path:
    path = run / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"12345")
    manifest = {"format": 1, "step": step, "world_size": 1, "files": {"model.safetensors": 5}}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_newest_is_by_step_and_only_whole_ones_count(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    first, second, third, fourth = (make(tmp_path, step) for step in (5, 10, 100, 200))
    (third / "model.safetensors").write_bytes(b"123")  # truncated
    (fourth / "manifest.json").write_text('{"step": 200, ')
    (tmp_path / "checkpoints" / ".staging-00000300").mkdir()
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [5, 10]
    assert newest(tmp_path) == second
    (second / "model.safetensors").unlink()
    assert newest(tmp_path) == first


def test_resolve_resume(tmp_path: Path) -> None:
    run, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()
    path = make(run, 7)
    for resume in ("auto", "required", str(run), str(path)):
        found = resolve_resume(run, resume)
        assert found is not None
        assert found.path == path
    assert resolve_resume(run, "never") is None
    assert resolve_resume(empty, "auto") is None
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        resolve_resume(empty, "required")
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        resolve_resume(run, str(empty))
