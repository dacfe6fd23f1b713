"""Files in /dev/shm that the processes of one launch leave behind when they are killed: found, and removed after it.

Only a file that this launch is seen to own is touched: it was not there before, it is this user's, a rank had it mapped
or its name carries a rank's process or the launch's port, and no live process has it mapped or open.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

FOLDER = Path("/dev/shm")
FIRST_SAMPLE_SECONDS, LAST_SAMPLE_SECONDS = 2.0, 60.0  # after the start, then at twice the time, up to each minute


class Segments:
    """What the ranks of one launch have in /dev/shm. `port`: the launch's master port."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.before = _names()
        self.pids: set[int] = set()
        self.mapped: set[str] = set()
        self._pause = FIRST_SAMPLE_SECONDS
        self._next = time.monotonic() + self._pause

    def sample(self, ranks: Iterable[psutil.Process]) -> None:
        """Note what the ranks have mapped; cheap unless a sample is due."""
        now = time.monotonic()
        if now < self._next:
            return
        self._pause = min(2 * self._pause, LAST_SAMPLE_SECONDS)
        self._next = now + self._pause
        for rank in ranks:
            self.pids.add(rank.pid)
            self.mapped |= _mapped_by(rank.pid)

    def remove(self) -> list[str]:
        """Remove what was left behind, once every process of the launch has ended. Returns the names."""
        left = {name for name in _names() - self.before if name in self.mapped or self._is_named_ours(name)}
        if left:
            left -= _in_use()
        removed = []
        for name in sorted(left):
            with contextlib.suppress(OSError):
                if (FOLDER / name).stat().st_uid == os.getuid():
                    (FOLDER / name).unlink()
                    removed.append(name)
        return removed

    def _is_named_ours(self, name: str) -> bool:
        if name.startswith("deepspeed_allreduce_buffer_"):  # ..._<user>_<address>_<port>_<rank>
            return name.split("_")[-2] == str(self.port)
        kind, _, rest = name.partition("_")
        return kind == "torch" and rest.split("_")[0] in map(str, self.pids)


def _names() -> set[str]:
    with contextlib.suppress(OSError):
        return set(os.listdir(FOLDER))
    return set()


def _mapped_by(pid: int) -> set[str]:
    prefix = f"{FOLDER}/"
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
        paths = (line.split(maxsplit=5)[-1].rstrip("\n") for line in maps if prefix in line)
        return {path.removeprefix(prefix) for path in paths if path.startswith(prefix)}
    return set()


def _in_use() -> set[str]:
    """The names that any process which we may look into has mapped or open."""
    names: set[str] = set()
    for pid in psutil.pids():
        names |= _mapped_by(pid)
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    path = Path(os.readlink(entry.path))
                    if path.parent == FOLDER:
                        names.add(path.name)
    return names
