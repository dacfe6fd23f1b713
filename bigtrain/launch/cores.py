"""Each rank on cores of its own, where the ranks of a node fill them (numactl's job, without numactl)."""

from __future__ import annotations

import os


def share(available: list[int], local_rank: int, local_ranks: int, threads: int) -> list[int]:
    """The cores of one rank: neighbours, so that they share caches. Empty if the ranks do not fill the cores exactly:
    then the kernel knows better, another run may need those that are left."""
    if threads * local_ranks != len(available):
        return []
    return sorted(available)[local_rank * threads : (local_rank + 1) * threads]


def bind(local_rank: int, local_ranks: int, threads: int) -> list[int]:
    """Bind this process, before it starts threads, to its share. Returns the cores, none if it is not bound."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    cores = share(list(os.sched_getaffinity(0)), local_rank, local_ranks, threads)
    if cores:
        os.sched_setaffinity(0, cores)
    return cores
