"""Hydra, and all of it: command-line overrides in, one plain dict per job out.

Only this file imports Hydra. It runs in the parent alone; the ranks read the file that the parent wrote. Typing and
unknown keys are `config.from_dict`'s business, so Hydra is given plain data and made to accept every key.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from bigtrain.compress_config import CompressConfig
from bigtrain.config import (
    GROUPS,
    VOCABULARY_MULTIPLE,
    Config,
    DecoderConfig,
    kinds,
    section,
    union_members,
)
from bigtrain.errors import BigtrainError, ConfigError, nearest
from bigtrain.files import conf_dir
from bigtrain.redact import redact

_VALUE_FLAGS = {"--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
                "--experimental-rerun"}  # fmt: skip
_INFO_CHOICES = {"all", "config", "defaults", "defaults-tree", "plugins", "searchpath"}


class UsageError(BigtrainError):
    """A command line that cannot be understood. Exit status 2, as command lines do."""

    exit_code = 2


@dataclass
class Sweep:
    """What a job's sweep is, beyond the job itself."""

    directory: str
    varied: list[str]  # the keys that take several values
    sweeper: dict[str, Any]  # hydra.sweeper and hydra.launcher
    launcher: dict[str, Any]


@dataclass
class Job:
    """One composed run."""

    data: dict[str, Any]
    overrides: list[str]  # as typed
    flags: list[str]  # that composing it again needs (--config-dir DIR)
    number: int | None  # counts the jobs of a sweep from 0; None outside a sweep
    sweep: Sweep | None = None


def choices(group: str) -> list[str]:
    """What `group=` can be, as found on disk."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def run(
    arguments: list[str],
    job: Callable[[Job], float | list[float]],
    on_sweep: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Give `arguments` whole to Hydra, which calls `job` once, per trial of a sweep, or (--cfg, --info) not at all.

    A sweep's launcher may call it in other processes. `on_sweep` is called here, before the first trial, with the
    sweep's directory.

    What `job` raises comes out unchanged. Raises UsageError or ConfigError for what Hydra refuses.
    """
    overrides, flags = _split(arguments)
    sweep = "-m" in flags or "--multirun" in flags
    prepared = [_prepared(override, sweep) for override in overrides]
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from hydra.types import RunMode
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _check_flags(prepared + flags)
    _register()
    raised: list[BaseException] = []
    swept = _swept(prepared) if sweep else []

    def task(composed: DictConfig) -> float | list[float]:
        # Hydra prints a line of its own about an exception that leaves here, so it is carried around Hydra.
        try:
            _register_resolvers()  # a launcher may have brought this to another process
            data = _resolved(composed)
            context = HydraConfig.get()
            sweeping = context.mode == RunMode.MULTIRUN
            if sweeping:
                data["run_dir"] = context.runtime.output_dir  # hydra.sweep.dir is run_dir: run_dir/<job number>
            overrides = [_shown(override) for override in context.overrides.task]
            kept = [flag for flag in flags if flag not in ("-m", "--multirun", "-r", "--run")]
            if not sweeping:
                return job(Job(data, overrides, kept, None))
            sweeper, launcher = (
                _plain(OmegaConf.to_container(part, resolve=True)) for part in (context.sweeper, context.launcher)
            )
            varied = dict.fromkeys([*(sweeper.get("params") or {}), *swept])
            return job(
                Job(data, overrides, kept, int(context.job.num),
                    Sweep(str(context.sweep.dir), [key.lstrip("+~") for key in varied], sweeper, launcher))
            )  # fmt: skip
        except Exception as error:
            raised.append(error)
            return float("nan")

    task.__module__ = __name__
    main = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(task)
    try:
        with _command_line(["bigtrain", *prepared, *flags]), _full_errors(), _no_secrets_in_files(on_sweep):
            main()
    except OverrideParseException as error:
        raise UsageError(f"{_shown(error.override)}: cannot be read ({_first_lines(error)}); quote it?") from error
    except MissingConfigException as error:
        raise _missing(error) from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UsageError(_first_lines(error)) from error
    except OSError as error:
        raise BigtrainError(f"{error.filename or 'config'}: {error.strerror or error}") from error
    if raised:
        raise raised[0]


@contextlib.contextmanager
def _no_secrets_in_files(on_sweep: Callable[[Path], None]) -> Iterator[None]:
    """A sweeper begins with writing multirun.yaml, with all overrides as they were typed."""
    from omegaconf import OmegaConf

    save = OmegaConf.save

    def redacted(config: Any, *arguments: Any, **keywords: Any) -> None:
        plain = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config
        save(OmegaConf.create(redact(plain)), *arguments, **keywords)
        if arguments and (path := Path(str(arguments[0]))).name == "multirun.yaml":
            on_sweep(path.parent)

    OmegaConf.save = redacted  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        OmegaConf.save = staticmethod(save)  # type: ignore[assignment, method-assign]


# ------------------------------------------------------------------------------------------------ arguments


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Overrides and flags apart, so that they may be mixed (argparse takes positionals in one run only)."""
    overrides: list[str] = []
    flags: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-") or argument == "-":
            if flags and flags[-1] in ("--info", "-i") and argument in _INFO_CHOICES:
                flags.append(argument)
            else:
                overrides.append(argument)
            continue
        flags.append(argument)
        if argument in _VALUE_FLAGS:
            flags.extend([value for value in [next(rest, None)] if value is not None])
    return overrides, flags


def _prepared(override: str, sweep: bool) -> str:
    """Let Hydra accept any key: our schema knows the nearest right one, Hydra's message would not say it.

    Text that its grammar cannot read (a letter beyond ASCII, an apostrophe) is quoted for it.
    """
    key, equals, value = override.partition("=")
    if not equals and not override.startswith("~"):
        raise UsageError(f"{override}: has no '='; write key=value")
    group = key.split("@")[0]
    if group == "cluster":  # a folder of conf, but no part of a run
        raise ConfigError(key, value, "only bigtrain plan takes it", "where train runs, launch says")
    if group in GROUPS or "/" in group or key.startswith(("hydra", "+", "~")):
        return override
    if value[:1] not in tuple("[{('\"") and not (sweep and "," in value) and not _readable(override):
        escaped = re.sub(r"(\\*)(')", r"\1\1\\\2", value)  # backslashes count only before a quote
        trailing = len(escaped) - len(escaped.rstrip("\\"))
        return f"++{key}='{escaped}{chr(92) * trailing}'"
    return f"++{override}"


def _readable(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def _swept(overrides: list[str]) -> list[str]:
    """The keys of those that take several values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    keys = []
    for override in overrides:
        with contextlib.suppress(HydraException):  # the sweeper will say what is wrong with it
            if OverridesParser.create().parse_override(override).is_sweep_override():
                keys.append(override.partition("=")[0])
    return keys


def _shown(override: str) -> str:
    return override[2:] if override.startswith("++") else override


def _resolved(composed: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        data = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise UsageError(f"{error.full_key}: {_first_lines(error)}") from error
    return _plain(data)


def _plain(data: Any) -> dict[str, Any]:
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}


def experiment(overrides: list[str]) -> str:
    """What follows `defaults:` has in an experiment's file, for a run of these overrides: `experiment=` that file is
    the same run. Raises ConfigError for what no file can say (a key taken away, a group under another name)."""
    import yaml
    from hydra.core.override_parser.overrides_parser import OverridesParser

    defaults: list[Any] = []
    values: dict[str, Any] = {}
    for override in OverridesParser.create().parse_overrides(overrides):
        key, value = (override.key_or_group or "").lstrip("+"), override.value()
        if override.is_delete() or override.package is not None:
            raise ConfigError("experiment", override.input_line, "cannot be written into a file")
        if key == "experiment":
            defaults.insert(0, value)
        elif key in GROUPS or "/" in key:
            defaults.append({f"override /{key}": value})
        else:
            place = values
            *path, last = key.split(".")
            for name in path:
                place = place.setdefault(name, {})
            place[last] = value if not isinstance(value, str) else str(value)
    return yaml.safe_dump({"defaults": [*defaults, "_self_"], **values}, sort_keys=False, allow_unicode=True)


def _check_flags(arguments: list[str]) -> None:
    """Hydra's own parser prints a page of usage for a wrong flag; this says it in one line."""
    from hydra._internal.utils import get_args_parser

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UsageError(f"{message}; see bigtrain train --help")

    parser = get_args_parser()
    parser.__class__ = Parser
    parser.parse_args(arguments)


@contextlib.contextmanager
def _command_line(arguments: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, arguments
    try:
        yield
    finally:
        sys.argv = before


@contextlib.contextmanager
def _full_errors() -> Iterator[None]:
    """Make Hydra raise instead of printing and exiting."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        del os.environ["HYDRA_FULL_ERROR"]
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


# ------------------------------------------------------------------------------------------------- messages


def _missing(error: Any) -> BigtrainError:
    """A group choice that does not exist, with the nearest one that does."""
    group, _, choice = str(error.missing_cfg_file or "").rpartition("/")
    found = error.options or (choices(group) if group in GROUPS else ())  # of one in a list Hydra gives none
    options = sorted(name for name in found if not name.startswith("_"))
    if not group or not options:
        return UsageError(_first_lines(error))
    near = nearest(choice, options)
    return ConfigError(
        group, choice, "no such choice", f"did you mean {near}?" if near else f"one of {', '.join(options)}"
    )


def _first_lines(error: BaseException) -> str:
    """The telling part of a message of many lines: without carets, advice about Hydra, and the object dump."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [
        line for line in lines
        if line and not line.startswith(("^", "See https://", "full_key", "object_type", "Set the environment"))
    ]  # fmt: skip
    return "; ".join(telling[:2]) or type(error).__name__


# -------------------------------------------------------------------------------------------------- schema


def _register() -> None:
    """Store every dataclass's defaults as plain data: `_<kind>` in its group, and `_config` for what has no group."""
    from hydra.core.config_store import ConfigStore

    _register_resolvers()
    store = ConfigStore.instance()
    hints = get_type_hints(Config)
    defaults = asdict(Config())
    for field in fields(Config):
        if field.name not in GROUPS:
            continue
        for cls in union_members(hints[field.name]):
            for kind in kinds(cls) or ("default",):
                node = asdict(cls()) | ({"kind": kind} if kinds(cls) else {})
                store.store(name=f"_{kind}", group=field.name, node=node)
    for part, hint in get_type_hints(CompressConfig).items():  # null or a section: each in files of its own
        (cls,) = union_members(hint)
        store.store(name=f"_{part}", group="compress", node={part: asdict(cls())})
    store.store(name="_config", node={name: value for name, value in defaults.items() if name not in GROUPS})


def _register_resolvers() -> None:
    from omegaconf import OmegaConf

    def part_of(share: float, whole: object) -> int:
        """So that a recipe can say "a tenth of the steps". A whole of a wrong type is left to the schema to refuse."""
        return int(share * whole) if isinstance(whole, (int, float)) else 0

    def steps_for(tokens_per_parameter: float, model: Any, tokenizer_vocab: int, global_batch: int) -> int:
        """Steps that see so many tokens for each parameter of a decoder. What is wrong with it the schema will say."""
        from bigtrain.plan import sizes

        data = OmegaConf.to_container(model, resolve=True)
        try:
            built = section(DecoderConfig, _plain(data), "model")
            vocabulary = built.vocab_size or math.ceil(tokenizer_vocab / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
            tokens = tokens_per_parameter * sizes.of_model(replace(built, vocab_size=vocabulary)).total
            return max(1, round(tokens / (global_batch * built.max_seq_len)))
        except (ConfigError, TypeError, ZeroDivisionError):
            return 1

    OmegaConf.register_new_resolver("part_of", part_of, replace=True)
    OmegaConf.register_new_resolver("steps_for", steps_for, replace=True)
