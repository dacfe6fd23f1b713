"""`bigtrain reproduce` and `bigtrain diff`, on real runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bigtrain.diff import compare_curves
from bigtrain.provenance import code_sha256
from tests.runs import TINY, bigtrain, losses, result


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory, data_cache: Path) -> Path:
    run = tmp_path_factory.mktemp("past") / "run"
    bigtrain("train", *TINY, "model.dropout=0.1", "train.steps=8", f"run_dir={run}", f"data.cache_dir={data_cache}")
    return run


def test_a_past_run_comes_out_the_same_bit_for_bit(past: Path, tmp_path: Path) -> None:
    output = bigtrain("reproduce", str(past), "--steps", "5", "--out", str(tmp_path / "again"))
    assert "train/loss: the same bits at all 5 steps" in output
    assert "train/grad_norm: the same bits at all 5 steps" in output
    assert losses(tmp_path / "again") == {step: loss for step, loss in losses(past).items() if step <= 5}
    assert result(tmp_path / "again")["train/steps"] == 5
    assert json.loads((past / "launch.json").read_text())["code_sha256"] == code_sha256()

    output = bigtrain("diff", str(past), str(tmp_path / "again"))
    assert "train.stop_at" in output
    assert "code and libraries: the same" in output
    assert "train/loss: the same bits at all 5 steps" in output
    assert "optimizer" not in output


def test_other_code_is_refused_and_another_curve_is_found(past: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(past, changed)
    launch = json.loads((changed / "launch.json").read_text())
    launch["code_sha256"] = "0" * 64
    launch["versions"]["torch"] = "2.0.0"
    (changed / "launch.json").write_text(json.dumps(launch))
    out = tmp_path / "again"
    output = bigtrain("reproduce", str(changed), "--out", str(out), expect=1)
    assert "made by other code" in output
    assert "--other-code" in output
    assert not out.exists()

    rows = [json.loads(line) for line in (changed / "metrics.jsonl").read_text().splitlines()]
    rows[1]["train/loss"] += 1e-6
    (changed / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = bigtrain("reproduce", str(changed), "--out", str(out), "--steps", "3", "--other-code", expect=1)
    assert "torch was 2.0.0" in output
    assert "not reproduced" in output
    assert "from step 2 on" in output

    output = bigtrain("diff", str(past), str(changed))
    assert "config: the same" in output
    assert "bigtrain's sources" in output
    assert "other ones from step 2 on" in output
    assert compare_curves(past, changed, "train/loss").same_bits == 7


@pytest.mark.parametrize("arguments", [["reproduce", "."], ["diff", ".", "."]])
def test_a_directory_that_is_no_run(arguments: list[str], tmp_path: Path) -> None:
    output = bigtrain(*arguments, cwd=tmp_path, expect=2 if arguments[0] == "reproduce" else 1)
    assert output.count("\n") == 1
    assert "config" in output


def test_more_steps_than_the_run_has(past: Path) -> None:
    output = bigtrain("reproduce", str(past), "--steps", "9", expect=2)
    assert "steps=9" in output
    assert "take at most 8" in output
    assert not past.with_name("run-reproduced").exists()
