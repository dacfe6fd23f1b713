"""What is shown of a sweep: the best, the table, the page, and a recipe that composes to what the best trial was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from bigtrain import compose
from bigtrain.launch.train import checked
from bigtrain.sweep import results, trials
from bigtrain.sweep.trials import Trial
from tests.test_config import composed

LOSSES = {0: 3.5, 1: 2.5, 2: None, 3: 4.5}


def sweep_of(folder: Path, second: dict[int, float] | None = None) -> list[Trial]:
    (folder / "trials").mkdir(parents=True)
    found = []
    for number, loss in LOSSES.items():
        varied = {"optimizer.lr": f"{(number + 1) * 1e-3:g}", "model": "gpt_1m" if number % 2 else "gpt_mini"}
        overrides = ["experiment=tiny", "run_dir=here", "train.steps=9", *(f"{k}={v}" for k, v in varied.items())]
        trial = Trial(number, number, "c", overrides, varied, steps=9, parameters=1000, started=1.0, seconds=2.0)
        if loss is None:
            trial = replace(trial, status="failed", problem="rank 0: <boom>")
        else:
            objectives: dict[str, float | None] = {"eval/loss": loss}
            if second is not None:
                objectives["time/train_seconds"] = second[number]
            trial = replace(trial, status="finished", objectives=objectives)
        trials.write(folder, trial)
        found.append(trial)
    return found


def test_table_page_and_recipe(tmp_path: Path) -> None:
    sweep_of(tmp_path / "sweep")
    said: list[str] = []
    assert not results.show(tmp_path / "sweep", "c", said.append)  # one has failed
    assert said[0] == "sweep: 3 of 4 jobs finished"
    assert said[1].split() == ["trial", "optimizer.lr", "model", "steps", "time", "eval/loss"]
    assert said[2].split() == ["0", "0.001", "gpt_mini", "9", "0:00:02", "3.5"]
    assert said[4].endswith("failed: rank 0: <boom>")
    assert said[6] == (
        f"best: trial 1 (eval/loss 2.5); to train it: bigtrain train --config-dir {tmp_path}/sweep experiment=best"
    )
    page = (tmp_path / "sweep/report/index.html").read_text()
    assert "&lt;boom&gt;" in page
    assert "data:image/png" in page
    assert (tmp_path / "sweep/report/parallel.png").read_bytes().startswith(b"\x89PNG")
    recipe = composed("experiment=best", "--config-dir", str(tmp_path / "sweep"), "run_dir=r")
    assert recipe == composed("experiment=tiny", "train.steps=9", "optimizer.lr=2e-3", "model=gpt_1m", "run_dir=r")


def test_only_this_commands_trials_are_judged(tmp_path: Path) -> None:
    sweep_of(tmp_path)
    assert results.show(tmp_path, "another", lambda line: None)


def test_of_two_objectives_there_is_a_front(tmp_path: Path) -> None:
    every = sweep_of(tmp_path, second={0: 1.0, 1: 9.0, 3: 1.5})
    assert [trial.number for trial in results.best(every)] == [1, 0]  # 3 is worse than 0 in both
    assert results.draw(every, results.best(every)).keys() == {"parallel", "tradeoff"}


def test_more_can_be_better(tmp_path: Path) -> None:
    every = [
        Trial(number, number, "c", [], {"a": str(number)}, "finished", {"-eval/accuracy": -value})
        for number, value in enumerate((0.5, 0.75))
    ]
    assert results.best(every)[0].number == 1
    assert results.table(every)[-1].split()[-1] == "0.75"
    assert "scatter" in results.draw(every, results.best(every))


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=tagging", "model.dropout=0.25", "optimizer=lion"],
        ["launch.env.A='its, a=b'", "engine=zero3", "logger.wandb.tags=[a,b]"],
        ["train.freeze=[backbone.*]", "train.stop_at=null", "optimizer.lr=1e-4"],
    ],
)
def test_a_recipe_composes_to_the_same_run(tmp_path: Path, overrides: list[str]) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\n" + compose.experiment(overrides)
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    assert yaml.safe_load(text)["defaults"][-1] == "_self_"
    found: list[object] = []
    for arguments in (overrides, ["experiment=mine", "--config-dir", str(tmp_path)]):
        compose.run([*arguments, "run_dir=r"], lambda job: found.append(checked(job.data)) or 0.0)
    assert found[0] == found[1]


def test_a_sweep_of_failures_has_a_table_too() -> None:
    failed = Trial(0, 0, "c", [], {"a": "1"}, "failed", problem="boom")
    dry = replace(failed, number=1, status="finished", problem="")
    assert [line.split() for line in results.table([failed, dry])] == [
        ["trial", "a", "steps", "time", "result"],
        ["0", "1", "-", "-", "failed:", "boom"],
        ["1", "1", "-", "-", "finished"],
    ]  # fmt: skip
    both = replace(failed, number=2, status="finished", objectives={"eval/loss": 1.0, "time/train_seconds": 2.0})
    assert [line.split()[-1] for line in results.table([failed, both])] == ["time/train_seconds", "boom", "2"]
