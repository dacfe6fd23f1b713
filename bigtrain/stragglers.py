"""Which rank the others wait for.

Ranks that train together take the same time for a step: the fast ones wait in collectives. What tells them apart is a
part of the step in which nobody waits: the forward passes (under ZeRO-3 they gather parameters, and differences show
less there).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

NOTABLE = 1.5  # times what the others take
SECONDS = 60.0  # for which one rank has been the slow one before it is called so


class ForwardTimer:
    """Adds up the time of a loss function's calls on this rank, without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if not self._cuda:
                began = time.perf_counter()
                found = function(*arguments)
                self._seconds += time.perf_counter() - began
                return found
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()  # type: ignore[no-untyped-call]
            found = function(*arguments)
            end.record()  # type: ignore[no-untyped-call]
            self._events.append((begin, end))
            return found

        return call

    def take(self) -> float:
        """Seconds since the last call; only where the device has been waited for."""
        seconds = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return seconds


class Stragglers:
    """Judges what the ranks took, log after log."""

    def __init__(self, hosts: list[str]) -> None:
        self.hosts = hosts
        self._rank, self._since, self._told = -1, 0.0, -1

    def metrics(self, step_seconds: list[float], forward_seconds: list[float]) -> dict[str, float]:
        """Of one log, by rank, seconds per step. Nothing where there is one rank."""
        if len(forward_seconds) < 2:
            return {}
        found = {}
        for name, values in (("step", step_seconds), ("forward", forward_seconds)):
            found[f"perf/{name}_seconds_min"] = min(values)
            found[f"perf/{name}_seconds_mean"] = sum(values) / len(values)
            found[f"perf/{name}_seconds_max"] = max(values)
        found["perf/slowest_rank"] = float(forward_seconds.index(max(forward_seconds)))
        return found

    def judge(self, forward_seconds: list[float], now: float) -> str | None:
        """A line, once, about a rank that has been the slow one for a minute. `now`: monotonic seconds."""
        if len(forward_seconds) < 2:
            return None
        slowest = max(range(len(forward_seconds)), key=forward_seconds.__getitem__)
        others = median(seconds for rank, seconds in enumerate(forward_seconds) if rank != slowest)
        notable = others > 0 and forward_seconds[slowest] >= NOTABLE * others
        if not notable or slowest != self._rank:
            self._rank, self._since = (slowest if notable else -1), now
        if not notable or slowest == self._told or now - self._since < SECONDS:
            return None
        self._told = slowest
        where = f" on {self.hosts[slowest]}" if slowest < len(self.hosts) else ""
        return (
            f"straggler: the others wait for rank {slowest}{where}, whose forward passes take"
            f" {forward_seconds[slowest] / others:.1f} x theirs ({forward_seconds[slowest]:.3g} s a step)"
        )
