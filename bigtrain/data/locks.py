"""The cache directory: one builder at a time, and its refusals in one line."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bigtrain.errors import ConfigError


@contextmanager
def writing(cache: Path) -> Iterator[None]:
    """Sources raise ConfigError of their own, so an OSError that gets here is the cache directory's."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            "data.cache_dir", str(cache), f"cannot be written ({error.strerror or error})",
            "free some space or name another directory",
        ) from None  # fmt: skip


@contextmanager
def locked(path: Path, progress: bool) -> Iterator[None]:
    """One process builds, others wait for it. The kernel frees the lock when its holder dies, in whatever way."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                print("another process is preparing this corpus: waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
