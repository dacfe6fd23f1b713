"""The run directory before the ranks start: may it be written, does somebody use it, which run does it hold?"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigtrain import config as schema
from bigtrain.checkpoint.find import newest, resolve_resume
from bigtrain.config import Config
from bigtrain.errors import BigtrainError, ConfigError

LOCK = ".lock"
LEAST_FREE_BYTES = 16 * 2**20  # configs, logs and metrics of any run; checkpoints come on top

# What may differ when a run goes on: where and how it is executed and watched, and how long it lasts. The schedule's
# warm-up may follow train.steps, as it does in the default recipe.
_FREE = (
    "run_dir", "resume", "launch", "logger", "schedule.warmup_steps",
    "data.prepared_dir", "data.cache_dir", "data.workers",
    "train.steps", "train.micro_batch", "train.activation_checkpointing", "train.compile", "train.eval_every",
    "train.eval_batches", "train.save_every", "train.keep_checkpoints", "train.objective",
    "train.stop_at", "train.guard",
)  # fmt: skip
_SHOWN_DIFFERENCES = 3


# ------------------------------------------------------------------------------------------------ ownership


@contextlib.contextmanager
def claim(path: Path) -> Iterator[None]:
    """Create the directory and hold it for this process alone. If the body fails, leaves no new, empty directory.

    Raises BigtrainError if it cannot be created or written, another process holds it, or it holds something else.
    """
    created = [parent for parent in (path, *path.parents) if not parent.exists()]
    lock = None
    try:
        with readable_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            if not (path / "config.yaml").exists() and {entry.name for entry in path.iterdir()} - {LOCK}:
                raise ConfigError("run_dir", str(path), "is not empty and holds no run", "name a new directory")
            if shutil.disk_usage(path).free < LEAST_FREE_BYTES:  # said now, not after hours of preparing data
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        _lock(lock, path)
        yield
    except BaseException:
        _remove_unused(path, created)
        raise
    finally:
        if lock is not None:
            os.close(lock)  # releases the lock


def _lock(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 64, 0).decode(errors="replace").strip() or "another process"
        raise BigtrainError(f"run_dir={path}: in use by {holder}; wait for it or name another run_dir") from None
    except OSError:
        return  # a filesystem without locks: better unprotected than not at all
    with readable_errors(path):
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)


def _remove_unused(path: Path, created: list[Path]) -> None:
    """Take away the directories that `claim` made, if nothing has come into them."""
    if path not in created:
        return
    with contextlib.suppress(OSError):
        if not {entry.name for entry in path.iterdir()} - {LOCK}:
            (path / LOCK).unlink(missing_ok=True)
    for directory in created:
        with contextlib.suppress(OSError):
            directory.rmdir()


@contextlib.contextmanager
def readable_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write a run directory into one line."""
    try:
        yield
    except OSError as error:
        raise BigtrainError(describe_os_error(error, path)) from error


def describe_os_error(error: OSError, path: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"run_dir={path}: the disk is full; free some space or name another run_dir"
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"run_dir={path}: not a directory"
    return f"run_dir={path}: cannot be written ({error.strerror or error})"


# ----------------------------------------------------------------------------------------------- which run


def previous(path: Path) -> Config | None:
    """The config of the run that the directory holds."""
    file = path / "config.yaml"
    try:
        return schema.load(file) if file.exists() else None
    except ConfigError as error:  # of another version, or edited
        raise ConfigError(
            "run_dir", str(path), f"its config.yaml cannot be used ({error})", "name another run_dir"
        ) from None


def check_same_run(before: Config, now: Config) -> None:
    """Raises ConfigError if `now` would train something else than what the directory was made with."""
    old, new = _flat(schema.to_dict(before)), _flat(schema.to_dict(now))
    if now.model.vocab_size is None:  # follows the tokenizer, which is not made yet
        new["model.vocab_size"] = old.get("model.vocab_size")
    if before.data.prepared_dir and now.data.prepared_dir:  # named by a fingerprint of content and tokenizer
        old["data (fingerprint)"], new["data (fingerprint)"] = (
            Path(config.data.prepared_dir or "").name for config in (before, now)
        )
    different = [
        key for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and not any(key == free or key.startswith(f"{free}.") for free in _FREE)
    ]  # fmt: skip
    if different:
        shown = ", ".join(f"{key} is {old.get(key)} there, {new.get(key)} here" for key in different)
        if len(different) > _SHOWN_DIFFERENCES:
            listed = different[:_SHOWN_DIFFERENCES]
            shown = ", ".join(f"{key} is {old.get(key)} there, {new.get(key)} here" for key in listed)
            shown += f", and {len(different) - _SHOWN_DIFFERENCES} more"
        raise ConfigError("run_dir", now.run_dir, f"holds another run ({shown})", "name another run_dir")


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def has_checkpoint(path: Path) -> bool:
    return newest(path) is not None


def check_resume(path: Path, config: Config, before: Config | None) -> None:
    """Raises ConfigError where `resume` or `init_from` asks for what is not there, or refuses what is."""
    if config.resume == "never" and before is not None:
        raise ConfigError(
            "resume", "never", f"{path} already holds a run", "name another run_dir, or resume=auto to continue it"
        )
    resolve_resume(path, config.resume)
    if config.init_from is not None and not (Path(config.init_from) / "config.json").is_file():  # Hugging Face's
        try:
            resolve_resume(path, config.init_from)
        except ConfigError as error:
            raise ConfigError("init_from", config.init_from, error.problem, error.way_out) from None


# --------------------------------------------------------------------------------------------------- files


def read_result(path: Path) -> dict[str, Any] | None:
    """result.json, or None while there is none (or a broken one)."""
    try:
        result = json.loads((path / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None


def last_step(path: Path) -> int | None:
    """The last step that metrics.jsonl has."""
    try:
        with open(path / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["step"])
    return None
