"""What counts as a checkpoint, which one a run continues from, and which ones stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bigtrain.checkpoint import Keep, checkpoints, newest, resolve_resume
from bigtrain.checkpoint.find import set_aside
from bigtrain.checkpoint.integrity import seal
from bigtrain.errors import BigtrainError, ConfigError


def make(run: Path, step: int, **facts: Any) -> Path:
    path = run / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"12345")
    seal(path, {"step": step, "world_size": 1, **facts})
    return path


def test_only_whole_ones_count_in_order_of_step(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    first, second, third, fourth = (make(tmp_path, step) for step in (5, 10, 100, 123456789))
    assert newest(tmp_path) == fourth
    (third / "model.safetensors").write_bytes(b"123")  # truncated
    (fourth / "manifest.json").write_text('{"step": 200, ')
    (tmp_path / "checkpoints" / ".staging-00000300").mkdir()
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path)] == [5, 10]
    with pytest.raises(BigtrainError, match=r"step-123456789: damaged .*verify .* --set-aside"):
        newest(tmp_path)  # an older model must not silently take its place
    assert set_aside(fourth).name == "step-123456789.bad"
    set_aside(third)
    assert newest(tmp_path) == second
    set_aside(second)
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


def test_never_a_silent_start_from_scratch(tmp_path: Path) -> None:
    path = make(tmp_path, 7)
    (path / "model.safetensors").unlink()
    for resume in ("auto", "required"):
        with pytest.raises(ConfigError, match=r"every checkpoint .* is damaged .*another run_dir"):
            resolve_resume(tmp_path, resume)
    with pytest.raises(ConfigError, match=r"model\.safetensors: missing"):
        resolve_resume(tmp_path / "new", str(path))
    set_aside(path)
    with pytest.raises(ConfigError, match=r"step-00000007\.bad"):
        resolve_resume(tmp_path, "auto")


def test_what_stays(tmp_path: Path) -> None:
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, None), (50, 4.0)):
        make(tmp_path, step, metric=None if loss is None else {"name": "eval/loss", "value": loss})
    found = checkpoints(tmp_path)

    def kept(keep: Keep) -> dict[str, str]:
        return {path.name.lstrip("step-0"): why for path, why in keep.reasons(found).items()}

    assert kept(Keep(1)) == {"50": "newest 1"}
    assert kept(Keep(2, best=True)) == {"20": "best", "40": "newest 2", "50": "newest 2"}
    assert kept(Keep(1, every=20)) == {"20": "every 20", "40": "every 20", "50": "newest 1"}
    assert kept(Keep(1, 25, True)) == {"20": "best", "50": "newest 1, every 25"}


@pytest.mark.parametrize(
    "other",
    [
        {"fingerprints": {"corpus": "b"}},
        {"metric": {"name": "eval_sample/loss", "value": 2.0, "share": 0.5}},
        {"metric": {"name": "-eval/accuracy", "value": 2.0}},
    ],
)
def test_the_best_is_of_what_the_newest_was_judged_on(tmp_path: Path, other: dict[str, Any]) -> None:
    same = {"fingerprints": {"corpus": "a"}, "metric": {"name": "eval/loss", "value": 2.0}}
    make(tmp_path, 10, **same | {"metric": {"name": "eval/loss", "value": 1.0}})
    make(tmp_path, 20, **same)
    assert list(Keep(1, best=True).reasons(checkpoints(tmp_path)).values()) == ["best", "newest 1"]
    make(tmp_path, 30, **same | other)
    assert [path.name for path in Keep(1, best=True).reasons(checkpoints(tmp_path))] == ["step-00000030"]
