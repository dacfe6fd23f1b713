"""`bigtrain checkpoint list|verify|prune`."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from bigtrain.checkpoint import checkpoints
from bigtrain.cli import command
from bigtrain.config import Config, dump
from tests.checkpoint.test_find import make


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = Config()
    config.train.keep_checkpoints, config.train.keep_best = 1, True
    (tmp_path / "config.yaml").write_text(dump(config))
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0)):
        make(tmp_path, step, stage=2, time="2026-01-02T03:04:05+0000", metric={"name": "eval/loss", "value": loss})
    return tmp_path


def call(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(command, ["checkpoint", *map(str, arguments)], standalone_mode=False)
    assert done.exception is None, done.exception
    return int(done.return_value or 0), done.output


def test_list_says_why_each_is_kept(run: Path) -> None:
    (run / "checkpoints" / "step-00000030" / "model.safetensors").write_bytes(b"1")
    _, output = call("list", run)
    title, first, second, broken = output.splitlines()
    assert title.split()[:3] == ["step", "saved", "MiB"]
    assert first.split() == ["10", "2026-01-02", "03:04:05", "0.0", "1", "ZeRO-2", "eval/loss", "3"]
    assert second.endswith("eval/loss 1  newest 1, best")
    assert broken == "step-00000030 is damaged: model.safetensors: 1 bytes, not 5"


def test_verify_names_the_bad_files(run: Path) -> None:
    assert call("verify", run)[0] == 0
    (run / "checkpoints" / "step-00000030" / "model.safetensors").write_bytes(b"12346")
    status, output = call("verify", run)
    assert status == 1
    assert "step-00000030: damaged (model.safetensors: SHA-256 differs)" in output
    status, output = call("verify", run, "--set-aside")
    assert output.rstrip().endswith("kept as step-00000030.bad")
    assert call("verify", run)[0] == 0


def test_prune_keeps_what_the_config_keeps(run: Path) -> None:
    assert call("prune", run, "--dry-run")[1] == "would remove step-00000010 (0.0 MiB)\n"
    assert len(checkpoints(run)) == 3
    call("prune", run)
    assert [one.step for one in checkpoints(run)] == [20, 30]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000020", "step-00000030"]
    assert "nothing to remove" in call("prune", run, "--keep", 5)[1]
