"""TensorBoard, CSV and MLflow: each test reads back what they really wrote."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest

from bigtrain.config import Config
from bigtrain.hooks import build_hooks
from bigtrain.hooks.jsonl import JsonlHook
from bigtrain.hooks.trackers import TrackersHook
from tests.hooks.runs import run_info


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("MLFLOW_"):
            monkeypatch.delenv(name)


def train(run_dir: Path, tracker: str, first: int, last: int, state: dict[str, Any] | None = None) -> dict[str, Any]:
    hook, jsonl = TrackersHook([tracker]), JsonlHook()
    hook.load_state(state or {})
    config = Config(run_dir=str(run_dir))
    config.launch.env = {"HF_TOKEN": "hidden-1"}
    info = run_info(run_dir, start_step=first - 1, config=config)
    for each in (jsonl, hook):
        each.on_start(info)
    for step in range(first, last + 1):
        for each in (jsonl, hook):
            each.on_step(step, {"train/loss": 10.0 - step})
    for each in (jsonl, hook):
        each.on_evaluate(last, {"eval/loss": 2.5})
        each.close()
    return hook.state()


def from_csv(run_dir: Path) -> tuple[list[int], list[float], list[str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    evaluated = [row["step"] for row in rows if row["eval/loss"]]
    return [int(row["step"]) for row in rows], [float(row["train/loss"]) for row in rows], evaluated


def from_tensorboard(run_dir: Path) -> tuple[list[int], list[float], list[str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    losses = events.Scalars("train/loss")
    evaluated = [str(event.step) for event in events.Scalars("eval/loss")]
    return [event.step for event in losses], [event.value for event in losses], evaluated


def from_mlflow(run_dir: Path) -> tuple[list[int], list[float], list[str]]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{run_dir}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments(filter_string="name='bigtrain'")])
    assert run.data.params["train.global_batch"] == "32"
    assert "hidden-1" not in str(run.data.params)
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    evaluated = [str(point.step) for point in client.get_metric_history(run.info.run_id, "eval/loss")]
    return [point.step for point in losses], [point.value for point in losses], evaluated


READERS = {"csv": from_csv, "tensorboard": from_tensorboard, "mlflow": from_mlflow}


@pytest.mark.parametrize("tracker", READERS)
def test_a_resumed_run_has_each_step_once(tmp_path: Path, tracker: str) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    state = train(run_dir, tracker, 1, 5)
    steps, losses, evaluated = READERS[tracker](run_dir)
    assert steps == [1, 2, 3, 4, 5]
    assert losses == [9, 8, 7, 6, 5]
    assert evaluated == ["5"]
    train(run_dir, tracker, 4, 7, state)  # from a checkpoint of step 3
    steps, losses, evaluated = READERS[tracker](run_dir)
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert losses == [9, 8, 7, 6, 5, 4, 3]
    assert evaluated[-1] == "7"


def test_they_are_chosen_by_config(tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path))
    config.logger.trackers = ["csv"]
    assert [type(hook).__name__ for hook in build_hooks(config, 0).hooks][-1] == "TrackersHook"
    assert build_hooks(config, 1).hooks == []
