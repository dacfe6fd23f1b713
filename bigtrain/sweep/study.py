"""Optuna, and all of it: which trials come next, what it is told of them, and when it would rather not see more of one.

The study is a file in the sweep's directory (or any storage that Optuna can use), so that a sweep goes on where it was.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.sweep import trials

NAME = "sweep"
SAMPLERS = ("tpe", "random", "nsga2")
PRUNERS = ("median", "hyperband", "none")


@dataclass(frozen=True)
class Dimension:
    """What one override may become: one of `choices` as typed, or a number between `low` and `high`, both included."""

    key: str  # of the override, with a + that it may need
    choices: tuple[str, ...] = ()
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    whole: bool = False

    def written(self, value: Any) -> str:
        return value if self.choices else str(int(value)) if self.whole else f"{value:.6g}"


# Runs trials of these overrides, numbered from the second argument on.
Launch = Callable[[list[list[str]], int], None]


def optimise(
    sweep: Path, space: Mapping[str, Dimension], fixed: Sequence[str], objectives: int, options: Mapping[str, Any],
    at_once: int, launch: Launch,
) -> None:  # fmt: skip
    """Run trials until the study has `n_trials` that are finished or pruned, or has tried each that is missing once.

    What an earlier command left unfinished or saw fail comes first. Raises ConfigError for options that cannot be used.
    """
    optuna = _optuna()
    check(options, space)
    known = _open(optuna, options, objectives, sampler=None)
    before = known.get_trials(deepcopy=False)
    seed = options["seed"] + len(before)  # a sampler that began anew would draw the same again
    study = _open(optuna, options, objectives, sampler=_sampler(optuna, options, seed))
    states = optuna.trial.TrialState
    done = [trial for trial in before if trial.state in (states.COMPLETE, states.PRUNED)]
    settled = [trial.params for trial in done]
    for trial in before:
        if trial.state == states.RUNNING:
            study.tell(trial.number, state=states.FAIL)
        if trial.state in (states.RUNNING, states.FAIL) and trial.params and trial.params not in settled:
            if trial.params.keys() == space.keys():
                study.enqueue_trial(trial.params)
            settled.append(trial.params)
    left = options["n_trials"] - len(done)
    while left > 0:
        asked = [study.ask() for _ in range(min(left, at_once))]
        batch = [
            [*fixed, *(f"{one.key}={one.written(_suggest(trial, name, one))}" for name, one in space.items())]
            for trial in asked
        ]
        launch(batch, asked[0].number)
        records = {
            record.job: record for record in trials.read(sweep) if record.command == os.environ.get(trials.COMMAND)
        }
        for trial in asked:
            _tell(study, states, trial, records.get(trial.number))
        left -= len(asked)


def check(options: Mapping[str, Any], space: Mapping[str, Dimension]) -> None:
    """Raises ConfigError for an option that cannot be used."""
    for name, known in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
        if options.get(name) not in known:
            raise ConfigError(f"hydra.sweeper.{name}", options.get(name), "unknown", f"one of {', '.join(known)}")
    for name in ("n_trials", "startup_trials"):
        if not isinstance(options.get(name), int) or options[name] < 1:
            raise ConfigError(f"hydra.sweeper.{name}", options.get(name), "must be at least 1")
    if not space:
        raise ConfigError(
            "hydra.sweeper.params", "", "nothing to vary", "write 'optimizer.lr=tag(log,interval(1e-4,1e-2))'"
        )


class Reported:
    """A running trial of a study, as another process or thread sees it."""

    def __init__(self, storage: str, number: int, options: Mapping[str, Any]) -> None:
        optuna = _optuna()
        self.storage = optuna.storages.RDBStorage(storage)
        self.study = optuna.load_study(study_name=NAME, storage=self.storage)
        self.id = self.storage.get_trial_id_from_study_id_trial_number(
            self.storage.get_study_id_from_name(NAME), number
        )
        self.pruner = _pruner(optuna, options)

    def report(self, step: int, value: float) -> None:
        self.storage.set_trial_intermediate_value(self.id, step, value)

    def should_be_pruned(self) -> bool:
        return bool(self.pruner.prune(self.study, self.storage.get_trial(self.id)))


def _open(optuna: Any, options: Mapping[str, Any], objectives: int, sampler: Any) -> Any:
    try:
        study = optuna.create_study(
            study_name=NAME, storage=options["storage"], sampler=sampler, directions=["minimize"] * objectives,
            load_if_exists=True,
        )  # fmt: skip
    except Exception as error:  # whatever the database behind it raises
        raise BigtrainError(f"hydra.sweeper.storage={options['storage']}: {str(error).splitlines()[0]}") from error
    if len(study.directions) != objectives:
        raise ConfigError(
            "train.objective", objectives, f"the study in {options['storage']} has {len(study.directions)}",
            "name another run_dir",
        )  # fmt: skip
    return study


def _sampler(optuna: Any, options: Mapping[str, Any], seed: int) -> Any:
    kind, startup = options["sampler"], options["startup_trials"]
    if kind == "tpe":
        return optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed)
    return optuna.samplers.RandomSampler(seed=seed) if kind == "random" else optuna.samplers.NSGAIISampler(seed=seed)


def _pruner(optuna: Any, options: Mapping[str, Any]) -> Any:
    first = int(options.get("prune_after_steps") or 0)
    if options.get("pruner") == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=max(1, first), max_resource=max(1, int(options["steps"])))
    return optuna.pruners.MedianPruner(n_startup_trials=options["startup_trials"], n_warmup_steps=first)


def _suggest(trial: Any, name: str, one: Dimension) -> Any:
    if one.choices:
        return trial.suggest_categorical(name, one.choices)
    if one.whole:
        return trial.suggest_int(name, int(one.low), int(one.high), step=int(one.step or 1), log=one.log)
    return trial.suggest_float(name, one.low, one.high, step=one.step, log=one.log)


def _tell(study: Any, states: Any, trial: Any, record: trials.Trial | None) -> None:
    values = list(record.objectives.values()) if record else []
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    if record is not None and record.status == "pruned":
        study.tell(trial, state=states.PRUNED)
    elif record is not None and record.status == "finished" and len(numbers) == len(study.directions):
        study.tell(trial, numbers)
    else:
        study.tell(trial, state=states.FAIL)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "hydra/sweeper", "optuna", "optuna is not installed", "pip install 'bigtrain[sweep]'"
        ) from None
    optuna.logging.set_verbosity(logging.WARNING)  # the sweep has lines of its own
    return optuna
