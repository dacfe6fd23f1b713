"""Ranks that live and do nothing: found by their heartbeats, named with their phase, their stacks written down.

Time is the supervisor's own: what counts is when it last saw a record change, never the clock of the rank's machine.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from bigtrain import heartbeat

LOOK_SECONDS = 0.5  # between two looks at the heartbeats
STACKS_SECONDS = 2.0  # for the ranks to write down their stacks
# A rank in one of these calls waits for another one.
_WAITING = re.compile(r'File ".*(torch/distributed/|deepspeed/comm/|/bigtrain/engine/host)')


class Process(Protocol):
    """What is needed of a rank: psutil.Process has it, and so has a rank on another node."""

    @property
    def pid(self) -> int: ...

    def status(self) -> str: ...

    def send_signal(self, sig: int, /) -> None: ...


@dataclass(frozen=True)
class Hang:
    """The rank that the others wait for, as far as it can be told."""

    rank: int
    phase: str
    step: int  # optimizer steps done
    seconds: float  # without a sign of life
    stopped: bool = False  # by a signal (SIGSTOP) or a debugger


@dataclass
class _Seen:
    record: dict[str, Any]
    at: float  # monotonic seconds: when it was first seen


class HangDetector:
    """Watches RUN_DIR/heartbeats of one launch. `hang_seconds` 0 finds nothing."""

    def __init__(self, run_dir: Path, ranks: int, hang_seconds: float) -> None:
        self.run_dir, self.hang_seconds = run_dir, hang_seconds
        self.folder = run_dir / heartbeat.FOLDER
        for old in self.folder.glob("rank-*.json"):
            old.unlink()
        self.looked = time.monotonic()
        self.seen = {rank: _Seen({"phase": heartbeat.STARTING, "step": 0}, self.looked) for rank in range(ranks)}

    def look(self, alive: Mapping[int, Process], ended: set[int]) -> Hang | None:
        """Whether a rank has been silent for too long. `ended` are ranks that no longer have to answer."""
        now = time.monotonic()
        if not self.hang_seconds or now - self.looked < LOOK_SECONDS:
            return None
        asleep = now - self.looked  # this process, too, may have been stopped, and the whole machine with it
        if asleep > 10 * LOOK_SECONDS:
            for seen in self.seen.values():
                seen.at += asleep
        self.looked = now
        for rank, seen in self.seen.items():
            record = self._read(rank)
            if record is not None and record != seen.record:
                self.seen[rank] = _Seen(record, now)
        silent = [
            rank for rank in self.seen
            if rank not in ended and self._silence(rank, now) > self._allowance(rank, alive.get(rank))
        ]  # fmt: skip
        return self._name(alive, now) if silent else None

    def past_first_step(self) -> bool:
        """Whether any rank of this launch has taken a step."""
        before = (heartbeat.STARTING, heartbeat.BUILDING, heartbeat.RESTORING, heartbeat.FIRST_STEP)
        records = [self._read(rank) or seen.record for rank, seen in self.seen.items()]
        return any(record["phase"] not in before for record in records)

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            record = json.loads((self.folder / f"rank-{rank}.json").read_bytes())
            return record if {"process", "phase", "step"} <= record.keys() else None
        except (OSError, ValueError, AttributeError):  # not there yet, or caught in the middle of a write
            return None

    def _silence(self, rank: int, now: float) -> float:
        return now - self.seen[rank].at

    def _allowance(self, rank: int, process: Process | None) -> float:
        """Seconds. A stopped process is not slow: in a slow phase too it gets no more than in a step."""
        factor, least = heartbeat.ALLOWANCES.get(self.seen[rank].record["phase"], (1, 0))
        longest = max(factor * self.hang_seconds, least)
        if longest > self.hang_seconds and process is not None and _is_stopped(process):
            return self.hang_seconds
        return longest

    def _name(self, alive: Mapping[int, Process], now: float) -> Hang:
        """One rank is stuck and soon all are silent, in a collective that it does not join. It is the one that a
        signal stopped, or that is not waiting in a collective itself, or else that fell silent first."""
        stopped = {rank for rank, process in alive.items() if _is_stopped(process)}
        stacks = self._dump_stacks({rank: process for rank, process in alive.items() if rank not in stopped})
        waiting = {rank for rank, text in stacks.items() if _waits(text)}

        def order(rank: int) -> tuple[bool, bool, float]:
            return rank not in stopped, rank in waiting, self.seen[rank].at

        rank = min([rank for rank in self.seen if rank in alive] or self.seen, key=order)
        record = self.seen[rank].record
        return Hang(rank, record["phase"], int(record["step"]), self._silence(rank, now), rank in stopped)

    def _dump_stacks(self, alive: Mapping[int, Process]) -> dict[int, str]:
        """Have the ranks append their stacks to their logs. Returns what each wrote; nothing of one that cannot.

        Only a rank with a heartbeat is asked: before that, SIGUSR1 would end it.
        """
        logs: dict[int, tuple[Path, int]] = {}
        for rank, process in alive.items():
            if self.seen[rank].record.get("process") == process.pid:
                path = self.run_dir / "logs" / f"rank-{rank}.log"
                with contextlib.suppress(OSError, psutil.Error):
                    size = path.stat().st_size
                    process.send_signal(signal.SIGUSR1)
                    logs[rank] = (path, size)
        texts: dict[int, str] = {}
        limit = time.monotonic() + STACKS_SECONDS
        while logs and time.monotonic() < limit:
            time.sleep(0.2)
            before, texts = texts, {rank: _tail(path, size) for rank, (path, size) in logs.items()}
            if texts == before and all(texts.values()):
                break
        return {rank: text for rank, text in texts.items() if text}


def _tail(path: Path, start: int) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _waits(stacks: str) -> bool:
    """Whether the thread that trains (the one that takes signals) is in a call that waits for other ranks."""
    _, _, mine = stacks.partition("Current thread")
    frames = mine.split("\n\n")[0].splitlines()[1:5]  # innermost first
    return any(_WAITING.search(frame) for frame in frames)


def _is_stopped(process: Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    return False


_DOING = {heartbeat.FIRST_STEP: "in its first step", heartbeat.STEP: "in a step"}


def describe(hang: Hang, who: str = "") -> str:
    how = "was stopped by a signal" if hang.stopped else "hung"
    doing = _DOING.get(hang.phase, hang.phase)
    who = who or f"rank {hang.rank}"
    return f"{who} {how} while {doing}, after step {hang.step}: no sign of life for {hang.seconds:.0f} s"
