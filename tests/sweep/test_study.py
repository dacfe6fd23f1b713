"""Optuna's part: what is drawn, told, pruned and taken up again. The study is real, the trials a line of Python."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from bigtrain.errors import ConfigError
from bigtrain.sweep import study, trials
from bigtrain.sweep.prune import Pruning
from bigtrain.sweep.study import Dimension

SPACE = {
    "optimizer.lr": Dimension("++optimizer.lr", low=1e-4, high=1e-1, log=True),
    "model": Dimension("model", choices=("gpt_1m", "gpt_mini")),
    "train.steps": Dimension("++train.steps", low=2, high=8, step=2, whole=True),
}


def options(sweep: Path, **changed: Any) -> dict[str, Any]:
    return {"n_trials": 12, "sampler": "tpe", "seed": 0, "startup_trials": 3, "pruner": "median", "steps": 10,
            "storage": f"sqlite:///{sweep}/study.db", **changed}  # fmt: skip


def launcher(sweep: Path, ends: Callable[[int, dict[str, str]], Any], asked: list[dict[str, str]]) -> study.Launch:
    def launch(batch: list[list[str]], first: int) -> None:
        for job, overrides in enumerate(batch, first):
            overrides = [text.lstrip("+") for text in overrides]
            values = dict(text.split("=") for text in overrides)
            asked.append(values)
            with trials.claim(sweep, job, os.environ[trials.COMMAND], overrides, list(SPACE)) as trial:
                outcome = ends(job, values)
                status = outcome if isinstance(outcome, str) else "finished"
                objectives = {} if isinstance(outcome, str) else {f"o{at}": one for at, one in enumerate(outcome)}
                trials.write(sweep, replace(trial, status=status, objectives=objectives))  # type: ignore[arg-type]

    return launch


@pytest.fixture(autouse=True)
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trials.COMMAND, "c")


def far_from(values: dict[str, str]) -> list[float]:
    return [abs(math.log10(float(values["optimizer.lr"])) + 2) + (values["model"] == "gpt_1m")]


def states(sweep: Path) -> list[str]:
    return [
        trial.state.name for trial in optuna.load_study(study_name="sweep", storage=options(sweep)["storage"]).trials
    ]


def test_a_failed_trial_does_not_end_the_sweep_and_is_tried_again_by_the_next_command(tmp_path: Path) -> None:
    asked: list[dict[str, str]] = []
    study.optimise(tmp_path, SPACE, ["train.seed=1"], 1, options(tmp_path), 1, launcher(
        tmp_path, lambda job, values: "failed" if job == 4 else "pruned" if job == 7 else far_from(values), asked
    ))  # fmt: skip
    assert len(asked) == 12
    assert all(1e-4 <= float(values["optimizer.lr"]) <= 1e-1 for values in asked)
    assert {values["train.steps"] for values in asked} <= {"2", "4", "6", "8"}
    assert all(values["train.seed"] == "1" for values in asked)
    assert [states(tmp_path).count(name) for name in ("COMPLETE", "FAIL", "PRUNED")] == [10, 1, 1]
    again: list[dict[str, str]] = []
    finish = launcher(tmp_path, lambda job, values: far_from(values), again)
    study.optimise(tmp_path, SPACE, ["train.seed=1"], 1, options(tmp_path), 1, finish)
    assert again == [asked[4]]
    study.optimise(tmp_path, SPACE, ["train.seed=1"], 1, options(tmp_path), 1, finish)
    assert len(again) == 1  # all is done
    study.optimise(tmp_path, SPACE, ["train.seed=1"], 1, options(tmp_path, n_trials=15), 1, finish)
    assert len(again) == 4
    assert not any(values in asked for values in again[1:])  # a sampler that began anew would draw the same
    assert len(trials.read(tmp_path)) == 15


def test_what_a_kill_left_running_comes_first(tmp_path: Path) -> None:
    asked: list[dict[str, str]] = []

    def killed(job: int, values: dict[str, str]) -> Any:
        if job == 2:
            raise KeyboardInterrupt
        return far_from(values)

    with pytest.raises(KeyboardInterrupt):
        study.optimise(tmp_path, SPACE, [], 1, options(tmp_path), 1, launcher(tmp_path, killed, asked))
    again: list[dict[str, str]] = []
    study.optimise(
        tmp_path, SPACE, [], 1, options(tmp_path), 1, launcher(tmp_path, lambda job, values: far_from(values), again)
    )
    assert again[0] == asked[2]
    assert len(again) == 10
    assert [trial.number for trial in trials.read(tmp_path)][:3] == [0, 1, 2]  # in the directory that it had


def test_tpe_finds_the_good_end_of_the_space(tmp_path: Path) -> None:
    asked: list[dict[str, str]] = []
    study.optimise(
        tmp_path, SPACE, [], 1, options(tmp_path, n_trials=25), 1,
        launcher(tmp_path, lambda job, values: far_from(values), asked),
    )  # fmt: skip
    late = asked[15:]
    assert sum(values["model"] == "gpt_mini" for values in late) >= 7
    assert min(far_from(values)[0] for values in late) < 0.2


def test_two_objectives_in_batches(tmp_path: Path) -> None:
    asked: list[dict[str, str]] = []
    study.optimise(
        tmp_path, SPACE, [], 2, options(tmp_path, n_trials=7), 3,
        launcher(tmp_path, lambda job, values: [*far_from(values), float(values["train.steps"])], asked),
    )  # fmt: skip
    found = optuna.load_study(study_name="sweep", storage=options(tmp_path)["storage"])
    assert len(found.trials) == 7
    assert found.best_trials
    with pytest.raises(ConfigError, match="has 2"):
        study.optimise(tmp_path, SPACE, [], 1, options(tmp_path), 1, launcher(tmp_path, lambda j, v: [0.0], asked))


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"pruner": "medain"}, "one of median"), ({"sampler": "x"}, "one of tpe"), ({"n_trials": 0}, "at least 1")],
)
def test_wrong_options_are_one_line(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        study.optimise(tmp_path, SPACE, [], 1, options(tmp_path, **changed), 1, launcher(tmp_path, far_from, []))  # type: ignore


def test_a_bad_trial_is_stopped_by_a_signal_and_a_good_one_is_not(tmp_path: Path) -> None:
    """metrics.jsonl grows while the thread watches; the signal is caught here as the supervisor catches it."""
    settings = options(tmp_path, startup_trials=2, prune_after_steps=1)
    known = optuna.create_study(study_name="sweep", storage=settings["storage"])
    for _ in range(8):
        trial = known.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
        for step in range(1, 11):
            trial.report(5.0 - 0.1 * step, step)
        known.tell(trial, 4.0)
    stopped = {}
    for name, level in (("bad", 9.0), ("good", 4.0)):
        known.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
        run_dir = tmp_path / name
        run_dir.mkdir()
        number = len(known.trials) - 1
        caught: list[int] = []
        with Pruning(run_dir, "eval/loss", settings, settings["storage"], number) as pruning:
            signal.signal(signal.SIGTERM, lambda *_, caught=caught: caught.append(1))
            with (run_dir / "metrics.jsonl").open("a") as file:
                for step in range(1, 11):
                    file.write(json.dumps({"step": step, "time": 0, "eval/loss": level}) + "\n")
            limit = time.monotonic() + (20 if name == "bad" else 2)
            while not caught and time.monotonic() < limit:
                time.sleep(0.05)
        stopped[name] = (bool(caught), pruning.problem)
    assert stopped["good"] == (False, "")
    assert stopped["bad"][0]
    assert "eval/loss was 9 at step" in stopped["bad"][1]
    assert len(known.trials[-1].intermediate_values) == 10  # later trials are compared with all of it


def test_hyperband_stops_what_is_behind_in_its_bracket(tmp_path: Path) -> None:
    settings = options(tmp_path, pruner="hyperband", steps=9, prune_after_steps=1)
    known = optuna.create_study(study_name="sweep", storage=settings["storage"])
    pruned = []
    for level in range(30):  # each worse than all before it
        trial = known.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
        watched = study.Reported(settings["storage"], trial.number, settings)
        for step in range(1, 10):
            watched.report(step, float(level))
            if watched.should_be_pruned():
                pruned.append(level)
                break
        known.tell(trial, float(level))
    assert 0 not in pruned
    assert len(pruned) > 10
