"""The memory that tensors really take, as torch's own CPU allocator counts it.

The resident set of a process is no measure of a model: libraries, the interpreter and freed memory that is kept are
in it, hundreds of MiB that differ from run to run. torch's profiler is told of each allocation and each release by the
allocator itself (c10's `reportMemoryUsageToProfiler`), the ones inside operators included; their running sum is exact
and the same in every run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes that were allocated at once on the CPU while `function` ran, beyond what was there before."""
    return max(running_total(function), default=0)


def running_total(function: Callable[[], Any]) -> list[int]:
    """Bytes allocated since `function` began, after each of its allocations and releases."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        function()
    assert profiler.profiler is not None
    total, totals = 0, []
    events = profiler.profiler.kineto_results.events()
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        total += event.nbytes()
        totals.append(total)
    return totals
