"""One trial: claimed, given its part of the machine, trained, judged, recorded. What fails is kept, not raised."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain.config import Config, objective_names
from bigtrain.errors import BigtrainError
from bigtrain.launch import Stopped
from bigtrain.launch.run_dir import read_result
from bigtrain.launch.train import objective
from bigtrain.redact import redact
from bigtrain.sweep import slots, trials
from bigtrain.sweep.prune import Pruning
from bigtrain.sweep.trials import Trial

if TYPE_CHECKING:
    from bigtrain.compose import Job


def run(
    job: Job,
    check: Callable[[dict[str, Any]], Config],
    train: Callable[[Config], float],
    say: Callable[[str], None],
    say_problem: Callable[[str], None],
) -> float | list[float]:
    """Run the trial of `job`, or find that it is done. Returns its objectives for the sweeper, nan where it has none.

    `check` makes a Config of plain data, `train` runs it. Raises KeyboardInterrupt if somebody stopped the sweep, and
    BigtrainError if another command runs this very trial.
    """
    sweep = job.sweep
    assert sweep is not None
    assert job.number is not None
    directory, command = Path(sweep.directory), os.environ.get(trials.COMMAND, "")
    with trials.claim(directory, job.number, command, job.overrides, sweep.varied) as trial:
        run_dir = trial.directory(directory)
        if str(run_dir) != job.data["run_dir"]:
            with contextlib.suppress(OSError):
                Path(job.data["run_dir"]).rmdir()  # Hydra made it for the number; the trial has another
        shown = " ".join(f"{key}={value}" for key, value in trial.varied.items()) or "no overrides"
        if trial.status == "pruned":
            say(f"job {job.number}: {shown}: pruned already, in {run_dir}")
            trials.write(directory, trial)
            return math.nan
        say(f"job {job.number}: {shown}")
        began = time.time()
        ended = replace(trial, status="failed", problem="", started=began)
        try:
            data = job.data | {"run_dir": str(run_dir)}
            _group(data, directory)
            with slots.take(directory / trials.FOLDER, slots.count(sweep.launcher), _wants_gpus(data)):
                config = check(data)
                ended = _train(trial, job, config, train)
        except (Stopped, KeyboardInterrupt):
            ended = replace(ended, status="stopped")
            raise KeyboardInterrupt from None  # ends the sweep; it is not done, even if this trial has saved itself
        except Exception as error:
            text = str(error) if isinstance(error, BigtrainError) else f"{type(error).__name__}: {error}"
            ended = replace(ended, problem=redact(" ".join(text.split())))
            say_problem(f"job {job.number}: {text}")
        finally:
            trials.write(directory, replace(ended, started=began, seconds=time.time() - began))
    values = [math.nan if value is None else value for value in ended.objectives.values()] or [math.nan]
    return values if len(values) > 1 else values[0]


def _train(trial: Trial, job: Job, config: Config, train: Callable[[Config], float]) -> Trial:
    """Train it to its end, or until it is pruned; the record of what came out."""
    names = objective_names(config.train.objective)
    pruning = _pruning(job, config, names)
    try:
        with pruning or contextlib.nullcontext():
            train(config)
        status: trials.Status = "finished"
    except Stopped:
        if pruning is None or not pruning.problem:
            raise
        status = "pruned"
    result = read_result(Path(config.run_dir)) or {}
    if status == "pruned" and result.get("status") == "finished":  # it was quicker than our signal
        status = "finished"
    if config.launch.kind == "dryrun":
        return replace(trial, status="finished")
    values: dict[str, float | None] = {}
    for name in names:
        try:
            values[name] = objective(result, name)
        except BigtrainError:
            if status == "finished":
                raise
            values[name] = None  # a pruned trial was not evaluated at an end that it did not reach
    return replace(
        trial, status=status, objectives=values, problem=pruning.problem if status == "pruned" and pruning else "",
        steps=result.get("train/steps"), parameters=result.get("model/parameters"),
    )  # fmt: skip


def _pruning(job: Job, config: Config, names: list[str]) -> Pruning | None:
    """Only a sweeper that keeps a study prunes, and only by a single objective: of several, none says what is bad."""
    assert job.sweep is not None
    assert job.number is not None
    options = job.sweep.sweeper
    if options.get("pruner") in (None, "none") or len(names) > 1 or config.launch.kind == "dryrun":
        return None
    if threading.current_thread() is not threading.main_thread():
        return None  # signals would go to another thread
    return Pruning(
        Path(config.run_dir), options.get("prune_metric") or names[0],
        {**options, "steps": config.train.steps}, options["storage"], job.number,
    )  # fmt: skip


def _group(data: dict[str, Any], sweep: Path) -> None:
    """wandb shows the trials of a sweep as one group unless it is told another."""
    wandb = data.get("logger", {}).get("wandb", {})
    if isinstance(wandb, dict) and wandb.get("group") is None:
        wandb["group"] = sweep.name


def _wants_gpus(data: dict[str, Any]) -> bool:
    return bool(data.get("launch", {}).get("device") != "cpu")
