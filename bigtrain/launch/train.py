"""From a composed config to a result: check, prepare the data, claim the run directory, start the ranks."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain import checks, hardware
from bigtrain import config as schema
from bigtrain.checkpoint import changes, encryption
from bigtrain.checkpoint.changes import Change
from bigtrain.checkpoint.find import Checkpoint
from bigtrain.config import LABELLED_TASKS, Config, DeepSpeedConfig
from bigtrain.errors import BigtrainError, ConfigError, unknown_key
from bigtrain.hardware import Placement
from bigtrain.launch import Stopped, dryrun, local, ops, pretrained, run_dir
from bigtrain.redact import redact

if TYPE_CHECKING:
    from bigtrain.data.examples import PreparedExamples
    from bigtrain.data.shards import Prepared

VOCABULARY_MULTIPLE = 64  # matrix kernels like it; the extra rows are never a target


def checked(data: dict[str, Any]) -> Config:
    """Plain data -> a config that holds together. Raises ConfigError."""
    config = pretrained.with_teacher(schema.from_dict(pretrained.resolved(data)))
    checks.check(config)
    encryption.check(config.train.encryption)
    for name in ("run_dir", "data.cache_dir"):
        value = config.run_dir if name == "run_dir" else config.data.cache_dir
        if (clean := redact(value, config.launch.env)) != value:
            raise ConfigError(name, clean, "holds a secret, and everybody sees a directory's name", "name another")
    if isinstance(config.engine, DeepSpeedConfig) and config.engine.deepspeed:
        from bigtrain.engine import deepspeed_schema

        deepspeed_schema.validate(config.engine.deepspeed)
        deepspeed_schema.owned(config.engine.deepspeed)
        deepspeed_schema.check_stage(config.engine.deepspeed, config.engine.stage)
    return replace(
        config,
        run_dir=_absolute(config.run_dir),
        resume=config.resume if config.resume in ("auto", "required", "never") else _absolute(config.resume),
        init_from=_absolute(config.init_from) if config.init_from is not None else None,
    )


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def train(config: Config, say: Callable[[str], None], continue_command: Callable[[str], str]) -> float:
    """Run what `checked` returned. Returns the objective from result.json (nan for a dry run).

    `say` takes lines for the person; `continue_command(run_dir)` is what to type to go on after a stop.
    Raises ConfigError or BigtrainError with one line, KeyboardInterrupt if stopped (what was trained is saved).
    """
    placement = hardware.place(config.launch)
    hardware.check_precision(config, placement)
    checks.check_batch(config, placement.ranks)
    config = local.resolved(config, placement)
    if config.launch.master_port is not None:
        local.check_port(config.launch.master_port)
    if config.launch.kind == "dryrun":
        say(dryrun.show(config, placement))
        return math.nan
    path = Path(config.run_dir)
    with run_dir.only_for_owner(path, config.launch.private), run_dir.claim(path):
        before = run_dir.previous(path)
        found = run_dir.check_resume(path, config, before)
        _check_changes(config, before, found)
        if before is not None and (result := _finished(path, config)) is not None:
            say(
                f"{path} is finished at step {result.get('train/steps')}; "
                f"to go on: train.steps=N above that; to write with it: bigtrain generate {path}"
            )
            return objective(result, config.train.objective)
        config = prepare_data(config)
        if config.compress.distil is not None:
            from bigtrain.compress import teacher

            teacher.check(config)
        listed = _check_changes(config, before, found)
        if found is not None:
            changes.check_tokenizer(found.path.parents[1], config.data.prepared_dir)
            if block := changes.listing(listed, found, placement.ranks):
                say(block)
        ops.prepare(config, placement.device)
        return _run(config, placement, say, continue_command)


def _check_changes(config: Config, before: Config | None, found: Checkpoint | None) -> list[Change]:
    """What is different from the checkpoint to go on from, or where there is none from the run in the directory."""
    saved = (changes.config_of(found) if found is not None else None) or before
    if saved is None:
        return []
    own = found is None or Path(config.run_dir) in found.path.parents
    return changes.check(saved, config, None if own else config.resume)


def _run(
    config: Config, placement: Placement, say: Callable[[str], None], continue_command: Callable[[str], str]
) -> float:
    path = Path(config.run_dir)
    try:
        result, asked_to_stop = local.run(config, placement, say)
    except KeyboardInterrupt:
        saved = run_dir.has_checkpoint(path)
        say(f"stopped; to continue: {continue_command(str(path))}" if saved else "stopped before anything was saved")
        raise
    if result.get("status") == "stopped":
        say(f"stopped at step {result.get('train/steps')}; to continue: {continue_command(str(path))}")
    if asked_to_stop:
        raise Stopped
    if result.get("status") == "stopped":  # at train.stop_at
        return float(result.get(config.train.objective) or math.nan)
    return objective(result, config.train.objective)


def prepare_data(config: Config) -> Config:
    """Prepare (or find prepared) the data; the config with where it lies and the model's vocabulary filled in.

    Raises ConfigError or BigtrainError for data that cannot be used.
    """
    from bigtrain import data

    prepared: Prepared | PreparedExamples
    if isinstance(config.task, LABELLED_TASKS):
        prepared = data.prepare_examples(config)
    else:
        prepared = data.prepare(config, config.logger.progress)
    vocabulary = config.model.vocab_size
    if vocabulary is None:
        vocabulary = math.ceil(prepared.vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return replace(
        config,
        model=replace(config.model, vocab_size=vocabulary),
        data=replace(config.data, prepared_dir=str(prepared.directory.absolute())),
    )


def _finished(path: Path, config: Config) -> dict[str, Any] | None:
    """The result of a run that has already taken all the steps that `config` asks for."""
    result = run_dir.read_result(path)
    if result is None or result.get("status") != "finished":
        return None
    return result if result.get("train/steps", 0) >= config.train.steps else None


def objective(result: dict[str, Any], name: str) -> float:
    """The number of result.json that a sweep minimises. Raises ConfigError if there is none of that name."""
    numbers = {key: value for key, value in result.items() if isinstance(value, (int, float))}
    if name not in numbers:
        if result.get(name, 0) is None:
            raise BigtrainError(f"train.objective={name}: not a finite number in result.json")
        error = unknown_key(name, numbers)
        raise ConfigError("train.objective", name, "not in result.json", error.way_out)
    return float(numbers[name])
