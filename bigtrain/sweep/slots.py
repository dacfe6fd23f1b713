"""Several trials on one machine: each gets cores, and where there are any GPUs, that no other trial has.

A slot is a lock on a file, held while a trial runs: it comes free when the trial's process ends, however it ends. What
a slot gives is inherited by all that the trial starts, and a run takes no more than it is given (hardware.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bigtrain import hardware
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.launch.run_dir import readable_errors

POLL_SECONDS = 0.2


def count(launcher: Mapping[str, Any]) -> int:
    """How many trials a launcher runs at once on this machine; 1: they come one after another, or have their own."""
    if "joblib" not in str(launcher.get("_target_")):
        return 1
    jobs = int(launcher.get("n_jobs") or 1)
    return jobs if jobs > 0 else max(1, hardware.cores() + 1 + jobs)  # joblib's own reading: -1 is one per core


@contextlib.contextmanager
def take(folder: Path, slots: int, use_gpus: bool) -> Iterator[None]:
    """Keep this process, and what it starts, to one of `slots` equal parts of the machine.

    Raises ConfigError if there are fewer cores, or GPUs, than slots.
    """
    if slots <= 1:
        yield
        return
    if multiprocessing.get_start_method(allow_none=True) == "loky":
        # What joblib's processes start others with by default; no process that data are prepared in knows the name.
        multiprocessing.set_start_method("spawn", force=True)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    gpus = hardware.gpus() if use_gpus and not hardware.torch_is_cpu_build() else ()
    for what, number in (("cores", len(cores) or slots), ("GPUs", len(gpus) or slots)):
        if number < slots:
            raise ConfigError(
                "hydra.launcher.n_jobs", slots, f"more trials at once than this machine's {number} {what}"
            )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    lock, number = _free_slot(folder, slots)
    try:
        if cores:
            os.sched_setaffinity(0, part(cores, number, slots))
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu.index) for gpu in part(list(gpus), number, slots))
        yield
    finally:
        if cores:  # a pool uses its processes for one trial after another
            os.sched_setaffinity(0, cores)
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        elif gpus:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        os.close(lock)


def part(things: list[Any], number: int, parts: int) -> list[Any]:
    """The number-th of `parts` disjoint parts, as equal as can be."""
    return things[number * len(things) // parts : (number + 1) * len(things) // parts]


def _free_slot(folder: Path, slots: int) -> tuple[int, int]:
    """A lock that this process now holds, and its number."""
    with readable_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            for number in range(slots):
                lock = os.open(folder / f".slot-{number}.lock", os.O_RDWR | os.O_CREAT, 0o644)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return lock, number
                except BlockingIOError:
                    os.close(lock)
                except OSError as error:
                    os.close(lock)
                    raise BigtrainError(f"{folder}: needs a filesystem with locks ({error.strerror})") from None
            time.sleep(POLL_SECONDS)
