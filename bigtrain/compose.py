"""Hydra, and all of it: command-line overrides in, one plain dict per job out.

Only this file imports Hydra. It runs in the parent alone; the ranks read the file that the parent wrote. Typing and
unknown keys are `config.from_dict`'s business, so Hydra is given plain data and made to accept every key.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml

from bigtrain.compress_config import CompressConfig
from bigtrain.config import (
    GROUPS,
    VOCABULARY_MULTIPLE,
    Config,
    DecoderConfig,
    hints_at,
    kinds,
    options,
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
    from hydra.errors import MissingConfigException, OverrideParseException
    from hydra.types import RunMode
    from omegaconf import DictConfig, OmegaConf

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
            if "experiment" in data:
                raise _without_package(f"experiment/{context.runtime.choices['experiment']}", _folders(flags))
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
    except OSError as error:
        raise BigtrainError(f"{error.filename or 'config'}: {error.strerror or error}") from error
    except BigtrainError:
        raise
    except Exception as error:  # all that `job` raises has been carried around Hydra: the config's files or overrides
        raise _not_composed(error, _folders(flags)) from error
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
    if equals and (group.lstrip("+") in GROUPS or group.startswith("hydra/")):
        return _choice(group, key, value)
    if group == "cluster":  # a folder of conf, but no part of a run
        raise ConfigError(key, value, "only bigtrain plan takes it", "where train runs, launch says")
    if "/" in group or key.startswith(("hydra", "~")):
        return override
    key = f"++{key.lstrip('+')}"  # every key of the schema is there: a single + would always be refused
    if value[:1] not in tuple("[{('\"") and not (sweep and "," in value) and not _readable(override):
        return f"{key}={_quoted(value)}"
    return f"{key}={_as_text(key.lstrip('+'), value, sweep)}"


def _quoted(text: str) -> str:
    """As a string of Hydra's grammar."""
    escaped = re.sub(r"(\\*)(')", r"\1\1\\\2", text)  # backslashes count only before a quote
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{chr(92) * trailing}'"


def _as_text(key: str, value: str, sweep: bool) -> str:
    """`value` with quotes around what the grammar would not read as text where the schema wants text: what was typed is
    what is meant (2024_11_29 is no 20241129), also in lists, in dicts and in each value of a sweep."""
    hints = hints_at(key)
    if not any(part is str for hint in hints for part in (hint, *_nested(hint))):
        return value
    null_is_text = any(
        get_origin(hint) is dict for parent in hints_at(key.rpartition(".")[0]) for hint in options(parent)
    )
    parts = _parts(value)
    outer_blank = value != value.strip() and not re.match(r"\s*[\[{(\"'$]", value)
    odd = outer_blank or len(parts) > 1
    if not sweep and odd and all(str in options(hint) for hint in hints):
        return _quoted(value)
    try:
        return ",".join(_text(part, hints, null_is_text) for part in parts)
    except _NotRead:
        a_pattern = re.match(r"\[[^\]]*\].*[^\]]$|\{[^}]*\}.*[^}]$|\([^)]*\).*[^)]$", value)  # [ab]*.txt, no torn list
        return _quoted(value) if a_pattern and not sweep else value


class _NotRead(Exception):
    """Of a part of a value: the grammar has no reading of it, or functions are called in it."""


def _nested(hint: Any) -> Iterator[Any]:
    for part in get_args(hint):
        yield part
        yield from _nested(part)


def _text(value: str, hints: list[Any], null_is_text: bool) -> str:
    wanted = [option for hint in hints for option in options(hint)]
    try:
        read = _read(value)
    except _NotRead:
        if re.fullmatch(r"\s*\[.*\]\s*", value, re.DOTALL):
            read = [value]  # the reading of its parts will show
        elif str in wanted and not re.search(r"^\s*[\[{(]|[\"'$]", value):
            return _quoted(value.strip())
        else:
            raise
    if isinstance(read, (list, dict)):
        inner = [get_args(hint)[-1] for hint in wanted if get_origin(hint) is type(read)]
        begin, parts, end = value.strip()[0], _parts(value.strip()[1:-1]), value.strip()[-1]
        if not inner or not read:
            return value
        if isinstance(read, list):
            return begin + ",".join(_text(part, inner, True) for part in parts) + end
        pairs = [part.partition(":") for part in parts]
        return begin + ",".join(f"{name}:{_text(part, inner, True)}" for name, _, part in pairs) + end
    fits = type(read) in wanted or (isinstance(read, int) and not isinstance(read, bool) and float in wanted)
    if (
        str not in wanted
        or fits
        or not isinstance(read, (int, float, type(None)))
        or (read is None and not null_is_text)
    ):
        return value
    return _quoted(value.strip())


def _read(value: str) -> Any:
    """What the grammar makes of it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ValueType
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        raise _NotRead from None
    if override.value_type is not ValueType.ELEMENT:
        raise _NotRead
    return override.value()


def _parts(value: str) -> list[str]:
    """Split at the commas that stand in no quotes and no brackets."""
    parts, depth, quote = [""], 0, ""
    for sign in re.findall(r"\\.|.", value, re.DOTALL):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in "[{(":
            depth += 1
        elif sign in "]})":
            depth -= 1
        if sign == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


# What stands for none of a group; the other groups cannot be left out.
_NONE = {"experiment": "[]", "compress": "[]", "logger": "console"}


def _choice(group: str, key: str, value: str) -> str:
    """`group=choice` as Hydra takes it: null is Hydra's own word for none of a group, but not in an override; and `+`,
    which it wants where a group has no choice yet, does no harm where it has."""
    group = group.lstrip("+")
    if group != "compress":
        key = key.lstrip("+")
    if re.search(r"(^|[\[,])\s*null\s*($|[\],])", value, re.IGNORECASE):
        if group not in _NONE:
            way_out = (
                f"one of {', '.join(choices(group))}"
                if group in GROUPS
                else "name one, or write nothing for the default"
            )
            raise ConfigError(group, value, "there must be one", way_out)
        if value.startswith("["):  # of a list of choices nothing is left
            kept = [name for part in value.strip("[]").split(",") if (name := part.strip()).lower() != "null"]
            return f"{key}=[{','.join(kept)}]"
        value = re.sub(r"(^|,)\s*null\s*(?=$|,)", rf"\1{_NONE[group]}", value, flags=re.IGNORECASE)
    return f"{key}={value}"


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
    from hydra.core.override_parser.overrides_parser import OverridesParser

    defaults: list[Any] = []
    values: dict[str, Any] = {}
    for override in OverridesParser.create().parse_overrides(overrides):
        key, value = (override.key_or_group or "").lstrip("+"), override.value()
        if override.is_delete() or override.package is not None:
            raise ConfigError("experiment", override.input_line, "cannot be written into a file")
        if key == "experiment":
            defaults[:0] = value if isinstance(value, list) else [value]
        elif key in GROUPS or "/" in key:
            defaults.append({f"override /{key}": value})
        else:
            place = values
            *path, last = key.split(".")
            for name in path:
                place = place.setdefault(name, {})
            place[last] = value if not isinstance(value, str) else str(value)
    return yaml.dump(
        {"defaults": [*defaults, "_self_"], **values}, Dumper=_Quoting, sort_keys=False, allow_unicode=True
    )


class _Quoting(yaml.SafeDumper):
    """Writes in quotes what Hydra's YAML reads as a number and this one does not (1e-3)."""


def _quoting(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    looks_otherwise = re.match(r"[-+.]?[0-9.]", text) is not None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if looks_otherwise else None)


_Quoting.add_representer(str, _quoting)


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
    by = re.match(r"In '([^']+)'", str(error))
    inside = f", of which {by[1]}.yaml speaks" if by and by[1] != "config" else ""
    below = group.rpartition("/")[2]
    if below != group and below in GROUPS and inside:  # `- model: gpt_mini` in experiment/mine.yaml
        return ConfigError(group, choice, f"no such choice{inside}", f"write it `override /{below}: {choice}`")
    found = error.options or (choices(group) if group in GROUPS else ())  # of one in a list Hydra gives none
    options = sorted(name for name in found if not name.startswith("_"))
    if not group or not options:
        return UsageError(_first_lines(error))
    near = nearest(choice, options)
    return ConfigError(
        group, choice, f"no such choice{inside}", f"did you mean {near}?" if near else f"one of {', '.join(options)}"
    )


def _folders(flags: list[str]) -> list[Path]:
    """Where the user's own groups lie."""
    named = [value for flag, value in itertools.pairwise(flags) if flag in ("--config-dir", "-cd")]
    named += [flag.partition("=")[2] for flag in flags if flag.startswith("--config-dir=")]
    return [Path(value) for value in named]


def _not_composed(error: Exception, folders: list[Path]) -> BigtrainError:
    """What Hydra, OmegaConf or the YAML parser says of a config's files and overrides, in a line that names it."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    name = re.match(r"In '([^']+)': Could not override '[^']*@", str(error))
    if name:  # `override /model` in a file whose own keys, and so its defaults, are looked for below its group
        return _without_package(name[1], folders)
    if isinstance(error, yaml.MarkedYAMLError):
        return UsageError(_yaml_problem(error))
    for folder in [] if isinstance(error, HydraException) else folders:  # that one says itself what it is about
        for path in sorted(folder.rglob("*.yaml")):
            if line := _unreadable(path):
                return ConfigError("--config-dir", str(folder), line)
    if isinstance(error, RecursionError):
        return UsageError("the config's defaults lists lead back to themselves; a file must not name itself")
    known = isinstance(error, (HydraException, OmegaConfBaseException, ValueError))
    return UsageError(_first_lines(error) if known else f"{type(error).__name__}: {_first_lines(error)}")


def _unreadable(path: Path) -> str | None:
    """Why a file of a group cannot be read, with its line; None if it can be."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            data = yaml.safe_load(file)
    except UnicodeDecodeError as error:
        return f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
    except yaml.MarkedYAMLError as error:
        return _yaml_problem(error)
    except yaml.YAMLError as error:
        return f"{path}: {str(error).splitlines()[0]}"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None if data is None or isinstance(data, dict) else f"{path} holds no keys; write `key: value` lines"


def _yaml_problem(error: yaml.MarkedYAMLError) -> str:
    at = error.problem_mark or error.context_mark
    where = f"{at.name}, line {at.line + 1}, column {at.column + 1}: " if at else ""
    return f"{where}{error.problem or error.context or 'is not YAML'}"


def _without_package(choice: str, folders: list[Path]) -> ConfigError:
    """The classic mistake: without that line a file's keys belong below the name of its group."""
    found = [path for folder in folders if (path := folder / f"{choice}.yaml").is_file()]
    group, _, name = choice.partition("/")
    problem = f"the keys of {found[0] if found else choice + '.yaml'} would be keys below `{group}`"
    start = found[0].read_bytes()[:200] if found else b""
    way_out = "make its first line: # @package _global_"
    if start.startswith(b"\xef\xbb\xbf"):
        way_out = "a byte order mark hides its first line: save it without"
    elif re.search(rb"^#\s*@package\s+_global_\s*$", start, re.MULTILINE):
        way_out = "in its defaults list write `override /GROUP: CHOICE`, with the slash"
    return ConfigError(group, name, problem, way_out)


def _first_lines(error: BaseException) -> str:
    """The telling part of a message of many lines: without carets, advice about Hydra, and the object dump."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [
        line for line in lines
        if line and not line.startswith(("^", "See https://", "full_key", "object_type", "Set the environment"))
    ]  # fmt: skip
    return "; ".join(telling[:2]).replace("'++", "'") or type(error).__name__


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
