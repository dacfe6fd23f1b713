"""The standard streams, whatever they are: closed, full, without a reader, or unable to show a letter.

A reader that leaves (`bigtrain train | head`), a full disk behind `> log` or a terminal that hung up must not end hours
of training, and a letter that the terminal cannot show is written as its number (`gr\\xf6\\xdfe`), no reason to fail.
"""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Callable
from typing import TextIO


class _Outliving(io.RawIOBase):
    """Writes to a file descriptor as long as that works, and then to nobody. It does not close the descriptor."""

    def __init__(self, descriptor: int, lost: Callable[[OSError], None]) -> None:
        self.descriptor, self.lost = descriptor, lost
        self.works = True

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return self.works and os.isatty(self.descriptor)

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]  # typeshed's Buffer is of Python 3.12
        while self.works:
            try:
                return os.write(self.descriptor, view)
            except BlockingIOError:  # a pipe that others have made non-blocking, and its reader is slow
                select.select([], [self.descriptor], [])
            except OSError as error:
                self.works = False
                self.lost(error)
        return len(view)


def outliving(descriptor: int, encoding: str, lost: Callable[[OSError], None]) -> TextIO:
    """Text to a descriptor, line by line, that no error of writing ends: `lost` takes the first, then nothing is
    written any more."""
    raw = _Outliving(descriptor, lost)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)


def encoding() -> str:
    """Of standard output, as the locale or PYTHONIOENCODING has it."""
    return getattr(sys.stdout, "encoding", None) or "utf-8"


def settle(goes_on: bool) -> None:
    """Make this process's standard streams such that no word it says can fail it.

    A closed stream becomes the null device, or the next file that is opened would take its number and with it the
    words of all processes started from here. `goes_on`: standard output may be lost, then a line on stderr says so;
    else a lost one ends the command, as users of `| head` expect.
    """
    _open_closed()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    if sys.stderr is sys.__stderr__:
        sys.stderr = outliving(2, getattr(sys.stderr, "encoding", None) or "utf-8", lambda error: None)
    if goes_on and sys.stdout is sys.__stdout__ and sys.stdout is not None:
        sys.stdout.flush()
        sys.stdout = outliving(1, encoding(), _say_lost)


def _open_closed() -> None:
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
        if getattr(sys, name) is None:
            stream = open(descriptor, mode, encoding="utf-8", closefd=False)  # noqa: SIM115  # it stays
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def _say_lost(error: OSError) -> None:
    reason = "nobody reads it" if isinstance(error, BrokenPipeError) else error.strerror or str(error)
    print(f"bigtrain: warning: standard output is lost ({reason}); going on without it", file=sys.stderr)
