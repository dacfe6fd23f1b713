"""From a composed config to a result: check, prepare the data, claim the run directory, start the ranks."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigtrain import checks, encryption, files, foreign, hardware, privacy
from bigtrain import config as schema
from bigtrain.checkpoint import changes
from bigtrain.checkpoint.changes import Change
from bigtrain.checkpoint.find import Checkpoint
from bigtrain.config import LABELLED_TASKS, VOCABULARY_MULTIPLE, Config, DeepSpeedConfig, objective_names
from bigtrain.data import hub
from bigtrain.errors import BigtrainError, ConfigError, unknown_key
from bigtrain.files import printable
from bigtrain.hints import next_commands
from bigtrain.launch import Stopped, ops, pretrained, run_dir, ways
from bigtrain.plan import preflight
from bigtrain.redact import redact

if TYPE_CHECKING:
    from bigtrain.data.examples import PreparedExamples
    from bigtrain.data.shards import Prepared


def checked(data: dict[str, Any]) -> Config:
    """Plain data -> a config that holds together. Raises ConfigError."""
    config = pretrained.with_teacher(schema.from_dict(pretrained.resolved(data)))
    _check_paths(config)
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
        launch=replace(config.launch, hostfile=_absolute(config.launch.hostfile) if config.launch.hostfile else None),
    )


def _check_paths(config: Config) -> None:
    """A path of no letters would be the current directory, and that may be gone, as the home directory may."""
    for field, value in schema.flatten(schema.to_dict(config)).items():
        if field.endswith(("path", "_dir", "_file", "hostfile", "init_from", "resume", "ssh_config")):
            for text in value if isinstance(value, list) else [value]:
                if not isinstance(text, str) or (field == "resume" and text in ("auto", "required", "never")):
                    continue
                if not text.strip() or "\0" in text:
                    raise ConfigError(field, text, "is no path", "name one, or leave the key out")
                if os.path.expanduser(text).startswith("~") and not os.path.exists(text):
                    raise ConfigError(field, text, "there is no such home directory", "set HOME, or name another path")
                if files.directory_lost and not os.path.isabs(os.path.expanduser(text)):
                    raise ConfigError(
                        field, text, "the current directory is gone", "cd to one that exists, or name a whole path"
                    )


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def train(config: Config, say: Callable[[str], None], continue_command: Callable[[str], str]) -> float:
    """Run what `checked` returned. Returns the objective from result.json (nan for a dry run).

    `say` takes lines for the person; `continue_command(run_dir)` is what to type to go on after a stop.
    Raises ConfigError or BigtrainError with one line, KeyboardInterrupt if stopped (what was trained is saved).
    """
    shown_only = config.launch.dry_run or config.launch.kind == "dryrun"
    way = ways.way(config, say, shown_only)
    placement = way.placement
    hardware.check_precision(config, placement)
    checks.check_batch(config, placement.world_size)
    config = ways.resolved(config, placement)
    if shown_only:
        for missing in _missing(config):
            say(missing)
        say(way.show(config))
        return math.nan
    if names := [name for name in foreign.settings(os.environ) if name not in config.launch.env]:
        say(f"left behind by another launcher, does not count here: {', '.join(names)} (launch.env sets variables)")
    preflight.check(config, placement)
    path = Path(config.run_dir)
    with run_dir.only_for_owner(path, config.launch.private), run_dir.claim(path):
        before = run_dir.previous(path)
        found = run_dir.check_resume(path, config, before)
        _check_changes(config, before, found)
        if before is not None and (result := _finished(path, config)) is not None:
            _check_finished(config, before, found, result, say)
            first = next(iter(next_commands(config.task.kind, str(path)).items()))
            say(
                f"{path} is finished at step {result.get('train/steps')}; "
                f"to go on: train.steps=N above that; to {first[0]}: {first[1]}"
            )
            return objective(result, config.train.objective)
        config = prepare_data(config)
        if config.compress.distil is not None:
            from bigtrain.compress import teacher

            teacher.check(config)
        if found is None and config.init_from is not None and (line := pretrained.check_weights(config)) is not None:
            say(line)
        if found is None and (line := pretrained.pooling_advice(config)) is not None:
            say(line)
        if config.train.privacy.enabled:
            say(privacy.guarantee(config).line(config.train.steps))
        listed = _check_changes(config, before, found)
        if found is not None:
            changes.check_tokenizer(found.path.parents[1], config.data.prepared_dir)
            if block := changes.listing(listed, found, placement.world_size):
                say(block)
        ops.prepare(config, placement.device)
        with run_dir.readable_errors(path):
            preflight.write(config, path, placement)
        return _run(config, way, say, continue_command)


def _missing(config: Config) -> list[str]:
    """Comments for a dry run, one for each path that a run would look for and that is not on this machine."""
    named = {name: getattr(config.data, name, None) for name in ("path", "held_out_path")}
    named |= {"tokenizer.path": config.data.tokenizer.path}
    paths = {f"data.{name}": [value] if isinstance(value, str) else value or [] for name, value in named.items()}
    paths |= {"init_from": [config.init_from] if config.init_from else []}
    return [
        f"# warning: {key}={printable(path)}: no such file or directory here"
        + (", unless the Hugging Face hub has it" if hub.looks_like_name(path) else "")
        for key, values in paths.items()
        for path in values
        if not glob.glob(os.path.expanduser(path), recursive=True) and not os.path.exists(os.path.expanduser(path))
    ]


def _check_changes(config: Config, before: Config | None, found: Checkpoint | None) -> list[Change]:
    """What is different from the checkpoint to go on from, or where there is none from the run in the directory."""
    saved = (changes.config_of(found) if found is not None else None) or before
    if saved is None:
        return []
    own = found is None or Path(config.run_dir) in found.path.parents
    return changes.check(saved, config, None if own else config.resume)


def _run(config: Config, way: ways.Way, say: Callable[[str], None], continue_command: Callable[[str], str]) -> float:
    path = Path(config.run_dir)
    try:
        ended = way.run(config)
    except KeyboardInterrupt:
        saved = run_dir.has_checkpoint(path)
        say(f"stopped; to continue: {continue_command(str(path))}" if saved else "stopped before anything was saved")
        raise
    if ended is None:
        return math.nan
    result, asked_to_stop = ended
    if result.get("status") == "stopped":
        say(f"stopped at step {result.get('train/steps')}; to continue: {continue_command(str(path))}")
    if asked_to_stop:
        raise Stopped
    if result.get("status") == "stopped":  # at train.stop_at
        return float(result.get(objective_names(config.train.objective)[0].lstrip("-")) or math.nan)
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


def _check_finished(
    config: Config, before: Config, found: Checkpoint | None, result: dict[str, Any], say: Callable[[str], None]
) -> None:
    """A finished run answers for what it was trained on, by that data's fingerprint, and for nothing else.

    Raises ConfigError where something that would change the result is different now: also where `resume_allow` names
    it, as there is no step left for it.
    """
    try:
        now = replace(config, data=replace(config.data, prepared_dir=str(_prepared_at(config))))
    except BigtrainError as error:  # moved or deleted since, or a dataset that cannot be asked for
        say(f"whether the data of {config.run_dir} has changed cannot be told: {error}")
        now = config
    named = [change for change in _check_changes(now, before, found) if change.verdict == "named"]
    if named:
        shown = ", ".join(map(str, named))
        raise ConfigError(
            "train.steps", config.train.steps, f"{config.run_dir} has finished {result['train/steps']} steps, none is"
            f" left for what has changed ({shown})", "ask for more steps, or name another run_dir",
        )  # fmt: skip


def _prepared_at(config: Config) -> Path:
    """Where the data of `config` is prepared, or would be: named by its fingerprint."""
    from bigtrain import data

    return data.examples_at(config) if isinstance(config.task, LABELLED_TASKS) else data.prepared_at(config)


def objective(result: dict[str, Any], names: str | list[str]) -> float:
    """The number of result.json that a sweep minimises: the first of `names`, all of which must be there.

    Raises ConfigError if there is none of a name, BigtrainError if it is not finite.
    """
    numbers = {key: value for key, value in result.items() if isinstance(value, (int, float))}
    values = []
    for name in objective_names(names):
        key, sign = name.lstrip("-"), -1 if name.startswith("-") else 1
        if key not in numbers:
            if result.get(key, 0) is None:
                raise BigtrainError(f"train.objective={key}: not a finite number in result.json")
            error = unknown_key(key, numbers)
            raise ConfigError("train.objective", key, "not in result.json", error.way_out)
        values.append(sign * float(numbers[key]))
    return values[0]
