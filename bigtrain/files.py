"""Writing files so that neither a reader nor a crash ever finds half of one; where the shipped configs are."""

from __future__ import annotations

import os
from pathlib import Path

from bigtrain.errors import BigtrainError


def as_utf8(text: str) -> bytes:
    """`text` as bytes. A path's byte that is no UTF-8 is written as \\udcXX, from which JSON and YAML read it back."""
    return text.encode("utf-8", errors="backslashreplace")


def printable(text: object) -> str:
    """As `as_utf8`, for a terminal or a page."""
    return as_utf8(str(text)).decode()


def write_atomic(path: Path, text: str) -> None:
    """Write `text` so that a reader, a crash or a power cut finds the old file or the new one, never part of it.

    Raises OSError if it cannot be written, and leaves nothing of the attempt behind.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(part, "wb") as file:
            file.write(as_utf8(text))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    fsync(path.parent)  # the rename itself


def fsync(path: Path) -> None:
    """Force a file, or a directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def conf_dir() -> Path:
    """The folder of config groups: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    for directory in (package / "conf", package.parent / "conf"):
        if (directory / "config.yaml").is_file():
            return directory
    raise BigtrainError(f"the config folder is missing from {package}; install bigtrain again")
