"""A rank's signs of life: what it is doing, in a small file of its own that the supervisor watches.

RUN_DIR/heartbeats/rank-N.json holds one line of JSON: process, phase, step (optimizer steps done), time (unix seconds).
The process has one life, so this module has one heartbeat; before `start` everything here does nothing. The beats come
from the thread that trains, never from one beside it: a rank that is stuck must fall silent.

A beat within a phase is a write at most twice a second and a look at the clock otherwise: below a thousandth of a step
of a millisecond. A change of phase is written at once, so that the file's phase is always the true one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path

FOLDER = "heartbeats"
RECORD_BYTES = 256  # every record has this size, so that a shorter one leaves nothing of a longer one behind
SECONDS_BETWEEN_WRITES = 0.5

# The phases, and what may be asked of each before it counts as hung: a multiple of launch.hang_seconds, and at least so
# many seconds. Imports, compilers and disks do not get faster because the steps of a run are short.
STARTING, BUILDING, FIRST_STEP, STEP = "starting", "building", "first step", "step"
LOADING_DATA, EVALUATING, SAVING, RESTORING, ENDING = (
    "loading data", "evaluating", "saving", "restoring", "ending"
)  # fmt: skip
ALLOWANCES: dict[str, tuple[float, float]] = {
    STARTING: (3, 180),  # imports, and waiting for every other rank's
    BUILDING: (6, 180),  # the model and the engine: reads weights, may compile an op
    RESTORING: (6, 180),
    FIRST_STEP: (6, 180),  # torch.compile, NCCL's connections
    LOADING_DATA: (1, 0),
    STEP: (1, 0),  # from one micro-batch to the next
    EVALUATING: (2, 60),  # from one batch to the next; then the metrics
    SAVING: (6, 180),
    ENDING: (6, 180),  # an upload, the last words to a tracker
}

_file: int | None = None
_phase, _step, _written = STARTING, 0, float("-inf")


def start(run_dir: Path, rank: int) -> None:
    """The first sign of life of this process. From here on SIGUSR1 prints the stacks of all threads to stderr.

    Raises OSError if the file cannot be written.
    """
    global _file
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    (run_dir / FOLDER).mkdir(exist_ok=True)
    _file = os.open(run_dir / FOLDER / f"rank-{rank}.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    phase(STARTING)


def phase(name: str, step: int | None = None) -> None:
    """What follows is of this kind, after so many optimizer steps (None: as many as before)."""
    global _phase, _step
    changed = name != _phase
    _phase = name
    if step is not None:
        _step = step
    _write(force=changed)


def beat() -> None:
    """Something was done in the phase that is on."""
    _write(force=False)


def _write(force: bool) -> None:
    global _written
    now = time.monotonic()
    if _file is None or not (force or now - _written >= SECONDS_BETWEEN_WRITES):
        return
    _written = now
    record = {"process": os.getpid(), "phase": _phase, "step": _step, "time": round(time.time(), 3)}
    with contextlib.suppress(OSError):  # the run goes on; if this goes on too, the supervisor will take us for hung
        os.pwrite(_file, f"{json.dumps(record):<{RECORD_BYTES - 1}}\n".encode(), 0)
