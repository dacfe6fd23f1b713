"""A sweep's bookkeeping: which trial is which, where it runs, who may run it."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bigtrain.errors import BigtrainError
from bigtrain.sweep import trials
from bigtrain.sweep.trials import Trial

FIXED = ["experiment=tiny", "train.steps=4"]


def claim(sweep: Path, job: int, *varied: str, fixed: list[str] = FIXED, ends: str = "finished") -> Trial:
    keys = [text.partition("=")[0] for text in varied]
    with trials.claim(sweep, job, "c", [*fixed, *varied], keys) as trial:
        trials.write(sweep, replace(trial, status=ends))  # type: ignore[arg-type]
    return trial


def test_a_trial_is_found_by_its_overrides_whatever_its_number(tmp_path: Path) -> None:
    assert [claim(tmp_path, job, f"optimizer.lr={lr}").number for job, lr in enumerate((1, 2))] == [0, 1]
    # another grid: a value in front, so that every job has another number
    again = [claim(tmp_path, job, f"optimizer.lr={lr}") for job, lr in enumerate((0.5, 1, 2))]
    assert [trial.number for trial in again] == [2, 0, 1]
    assert [trial.status for trial in again] == ["running", "finished", "finished"]  # as they were before
    assert len(trials.read(tmp_path)) == 3


def test_what_may_change_within_a_run_makes_no_other_trial(tmp_path: Path) -> None:
    claim(tmp_path, 0, "optimizer.lr=1")
    assert (
        claim(tmp_path, 0, "optimizer.lr=1", fixed=["experiment=tiny", "train.steps=9", "launch.ranks=1"]).number == 0
    )
    assert claim(tmp_path, 0, "optimizer.lr=1", fixed=["experiment=tiny", "train.seed=1"]).number == 1


def test_unless_it_is_what_the_sweep_varies(tmp_path: Path) -> None:
    found = [claim(tmp_path, job, f"train.steps={steps}", fixed=[]) for job, steps in enumerate((2, 4, 2))]
    assert [trial.number for trial in found] == [0, 1, 0]


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "notes.txt").write_text("mine")
    (tmp_path / "1").mkdir()  # as Hydra makes it, empty
    assert claim(tmp_path, 0, "a=1").number == 1
    assert claim(tmp_path, 1, "a=2").number == 2


def test_a_trial_that_runs_elsewhere_is_not_run_twice(tmp_path: Path) -> None:
    refused = pytest.raises(BigtrainError, match="another command runs this trial")
    with trials.claim(tmp_path, 0, "one", ["a=1"], ["a"]):
        with refused, trials.claim(tmp_path, 0, "two", ["a=1"], ["a"]):
            pass
        assert trials.read(tmp_path)[0].command == "one"


def _claim_one(job: int, sweep: str, out: Any) -> None:
    out.put(claim(Path(sweep), 0, f"a={job}").number)


def test_trials_that_start_together_take_different_directories(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    children = [context.Process(target=_claim_one, args=(job, str(tmp_path), out)) for job in range(6)]
    for child in children:
        child.start()
    assert sorted(out.get(timeout=60) for _ in children) == list(range(6))
    for child in children:
        child.join()


def test_secrets_do_not_get_into_a_record(tmp_path: Path) -> None:
    claim(tmp_path, 0, "a=1", fixed=["launch.env.MY_TOKEN=open-sesame"])
    assert "open-sesame" not in (tmp_path / "trials" / "0.json").read_text()


def test_a_broken_record_is_left_out(tmp_path: Path) -> None:
    claim(tmp_path, 0, "a=1")
    (tmp_path / "trials" / "1.json").write_text("{")
    assert [trial.number for trial in trials.read(tmp_path)] == [0]
