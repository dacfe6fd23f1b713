"""TensorBoard, CSV and MLflow, through the trackers that accelerate has (and a CSV one of its kind).

metrics.jsonl stays the source of truth: a resumed run shows each step once in all of them, and what a killed session
had not passed on is passed on from there.
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import tracking
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker

from bigtrain.config import flatten, to_dict
from bigtrain.files import write_atomic
from bigtrain.hooks.base import Hook, Metrics, RunInfo
from bigtrain.hooks.jsonl import read_metrics
from bigtrain.redact import redact


class TrackersHook(Hook):
    def __init__(self, names: list[str]) -> None:
        self.names, self.name = names, ", ".join(names)
        self._trackers: list[tuple[GeneralTracker, int]] = []  # and the last step that each has already
        self._mlflow_id: str | None = None

    def state(self) -> dict[str, Any]:
        return {"mlflow_id": self._mlflow_id} if self._mlflow_id else {}

    def load_state(self, state: dict[str, Any]) -> None:
        self._mlflow_id = state.get("mlflow_id")

    def on_start(self, info: RunInfo) -> None:
        build: dict[str, Callable[[RunInfo], tuple[GeneralTracker, int]]] = {
            "tensorboard": _tensorboard, "csv": _csv, "mlflow": self._mlflow
        }  # fmt: skip
        self._trackers = [build[name](info) for name in dict.fromkeys(self.names)]
        if info.resumed:
            for row in read_metrics(info.run_dir / "metrics.jsonl"):
                if row["step"] <= info.start_step:
                    numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
                    del numbers["step"], numbers["time"]
                    self.on_step(row["step"], numbers)

    def on_step(self, step: int, metrics: Metrics) -> None:
        for tracker, last in self._trackers:
            if step > last and metrics:
                tracker.log(dict(metrics), step=step)

    def on_evaluate(self, step: int, metrics: Metrics) -> None:
        self.on_step(step, metrics)

    def on_rollback(self, step: int, left: int) -> None:
        """What is shown of the steps that are done again stays as the first time showed it."""
        self._trackers = [(tracker, max(last, left)) for tracker, last in self._trackers]

    def close(self) -> None:
        trackers, self._trackers = self._trackers, []
        for tracker, _ in trackers:
            tracker.finish()

    def _mlflow(self, info: RunInfo) -> tuple[GeneralTracker, int]:
        import mlflow

        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{info.run_dir}/mlflow.db")
        known = self._mlflow_id if info.resumed else None
        tracker = MLflowTracker(
            experiment_name=info.config.logger.mlflow_experiment, run_id=known, run_name=info.run_dir.resolve().name,
            logging_dir=None if "MLFLOW_TRACKING_URI" in os.environ else str(info.run_dir / "mlflow"),
        )  # fmt: skip
        _start(tracker)
        self._mlflow_id = str(tracker.tracker.info.run_id)
        last = -1
        if known:
            history = mlflow.MlflowClient().get_metric_history(known, "train/loss")
            last = max((point.step for point in history), default=-1)
        else:
            tracker.store_init_configuration(flatten(redact(to_dict(info.config), info.config.launch.env)))
        return tracker, last


def _tensorboard(info: RunInfo) -> tuple[GeneralTracker, int]:
    # What the files have of steps that are done again, and all that is passed on again, TensorBoard leaves out.
    tracker = TensorBoardTracker("", info.run_dir / "tensorboard", purge_step=0 if info.resumed else None)
    _start(tracker)
    return tracker, -1


def _csv(info: RunInfo) -> tuple[GeneralTracker, int]:
    tracker = CsvTracker(info.run_dir / "metrics.csv")
    _start(tracker)
    return tracker, -1


class _Logger(logging.LoggerAdapter):  # type: ignore[type-arg]
    """accelerate's own asks its global state which process this is, and there need not be any such state."""

    def warning_once(self, message: str, *arguments: Any) -> None:
        self.warning(message, *arguments)


def _start(tracker: GeneralTracker) -> None:
    tracking.logger = _Logger(logging.getLogger(tracking.__name__), {})
    tracker.main_process_only = False  # this is the main process already, and accelerate need not look for it
    tracker.start()


class CsvTracker(GeneralTracker):
    """A row for each step, a column for each metric; what is logged twice for a step is one row.

    The last row is written when the next one begins. A metric that is new (the first evaluation's) makes a new column:
    then the file is written again.
    """

    name = "csv"
    requires_logging_directory = False

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.columns = ["step"]
        self._row: dict[str, Any] = {}

    @property
    def tracker(self) -> Path:
        return self.path

    def start(self) -> None:
        write_atomic(self.path, "step\n")

    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if self._row and self._row["step"] != step:
            self._write()
        self._row |= {"step": step, **values}

    def finish(self) -> None:
        self._write()

    def _write(self) -> None:
        row, self._row = self._row, {}
        if not row:
            return
        new = [name for name in row if name not in self.columns]
        if new:
            self.columns += new
            with self.path.open(encoding="utf-8", newline="") as file:
                before = list(csv.DictReader(file))
            write_atomic(self.path, self._text([*before, row], head=True))
        else:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(self._text([row], head=False))

    def _text(self, rows: list[dict[str, Any]], head: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        if head:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
