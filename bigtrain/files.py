"""Writing files so that neither a reader nor a crash ever finds half of one; where the shipped configs are."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from bigtrain.errors import BigtrainError

directory_lost = False  # see enter_somewhere
NAME_MAX = 255  # bytes of a file's name on every filesystem in use


def hidden_beside(path: Path, ending: str = "tmp") -> Path:
    """A name in the same folder for what is to become `path`, this process's own: it begins with a dot, ends with
    `ending`, and is no longer than a filesystem takes, however long the name of `path` is."""
    own, ending = os.fsencode(path.name), f".{os.getpid()}.{ending}"
    room = NAME_MAX - len(ending) - 1
    if len(own) > room:
        own = own[: room - 16] + hashlib.sha256(own).hexdigest()[:16].encode()
    return path.with_name(f".{own.decode(errors='ignore')}{ending}")


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
    part = hidden_beside(path)
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


def user_cache() -> Path:
    """Where this user's programs keep what they can make again; where there is no home directory, a temporary one."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bigtrain"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"bigtrain-{os.getuid()}"


def enter_somewhere() -> bool:
    """Whether the current directory exists. Where it was removed, this process goes on in /, or no library would
    start that asks for it."""
    global directory_lost
    try:
        os.getcwd()
    except OSError:
        os.chdir("/")
        directory_lost = True
    return not directory_lost


def conf_dir() -> Path:
    """The folder of config groups: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    for directory in (package / "conf", package.parent / "conf"):
        if (directory / "config.yaml").is_file():
            return directory
    raise BigtrainError(f"the config folder is missing from {package}; install bigtrain again")
