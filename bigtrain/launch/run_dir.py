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
from bigtrain.checkpoint.find import Checkpoint, checkpoints, resolve_resume
from bigtrain.config import Config, HuggingFaceConfig
from bigtrain.errors import BigtrainError, ConfigError

LOCK = ".lock"
LEAST_FREE_BYTES = 16 * 2**20  # configs, logs and metrics of any run; checkpoints come on top


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


@contextlib.contextmanager
def only_for_owner(path: Path, private: bool) -> Iterator[None]:
    """With `private`, what this process and its ranks write meanwhile, and `path` itself, is for its owner alone."""
    if not private:
        yield
        return
    before = os.umask(0o077)
    try:
        if path.is_dir():  # of an earlier session that was not private
            with readable_errors(path):
                path.chmod(0o700)
        yield
    finally:
        os.umask(before)


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


def has_checkpoint(path: Path) -> bool:
    return bool(checkpoints(path))


def check_resume(path: Path, config: Config, before: Config | None) -> Checkpoint | None:
    """The checkpoint to go on from. Raises ConfigError where `resume` or `init_from` asks for what is not there, or
    refuses what is."""
    if config.resume == "never" and before is not None:
        raise ConfigError(
            "resume", "never", f"{path} already holds a run", "name another run_dir, or resume=auto to continue it"
        )
    found = resolve_resume(path, config.resume)
    if isinstance(config.model, HuggingFaceConfig):
        return found  # the model was looked at when it was named
    if config.init_from is not None and (Path(config.init_from) / "config.json").is_file():
        from bigtrain.models import huggingface  # imports torch: only when it is asked for

        huggingface.read_config(Path(config.init_from))
    elif config.init_from is not None:
        try:
            resolve_resume(path, config.init_from)
        except ConfigError as error:
            raise ConfigError("init_from", config.init_from, error.problem, error.way_out) from None
    return found


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
