"""The trials of a sweep: what each was asked, where it runs, what became of it.

SWEEP/trials/N.json is the record of trial N, SWEEP/N its run directory. A trial is known by its overrides, not by its
number: the same command run again finds what is done already, and so does one with another grid.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from bigtrain.checkpoint.changes import is_free
from bigtrain.errors import BigtrainError
from bigtrain.files import write_atomic
from bigtrain.launch.run_dir import readable_errors
from bigtrain.redact import redact

FOLDER = "trials"
COMMAND = "BIGTRAIN_SWEEP"  # in the environment of a sweep's command: what tells its trials from an earlier command's

Status = Literal["running", "finished", "failed", "pruned", "stopped"]


@dataclass(frozen=True)
class Trial:
    number: int  # of its directory
    job: int  # its number in the command that ran it last
    command: str  # which command that was
    overrides: list[str]  # as typed, without secrets
    varied: dict[str, str]  # what the sweep varies, as typed
    status: Status = "running"
    objectives: dict[str, float | None] = field(default_factory=dict)  # by name, to be minimised
    problem: str = ""  # why it failed or was pruned
    steps: int | None = None
    parameters: int | None = None
    started: float = 0.0  # unix seconds
    seconds: float | None = None  # of the last command that ran it

    @property
    def identity(self) -> list[str]:
        return identity(self.overrides, list(self.varied))

    def directory(self, sweep: Path) -> Path:
        return sweep / str(self.number)


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def identity(overrides: Sequence[str], varied: Sequence[str]) -> list[str]:
    """What makes a trial this one. How long it trains, where it runs and how it is watched may change from command to
    command, as they may for any run, unless that is what the sweep varies."""
    return sorted(text for text in overrides if key_of(text) in varied or not is_free(key_of(text)))


def read(sweep: Path) -> list[Trial]:
    """All records, by number; a broken one is left out."""
    found = []
    names = {field.name for field in fields(Trial)}
    for path in (sweep / FOLDER).glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            data = json.loads(path.read_text(encoding="utf-8"))
            found.append(Trial(**{name: value for name, value in data.items() if name in names}))
    return sorted(found, key=lambda trial: trial.number)


def write(sweep: Path, trial: Trial) -> None:
    text = json.dumps(asdict(trial), indent=1, ensure_ascii=False)
    with readable_errors(sweep):
        write_atomic(sweep / FOLDER / f"{trial.number}.json", text + "\n")


@contextlib.contextmanager
def claim(sweep: Path, job: int, command: str, overrides: list[str], varied: Sequence[str]) -> Iterator[Trial]:
    """The trial of these overrides, found or new, for this process alone; the record says that it runs.

    The values it had before (status, objectives) are in what is yielded. Raises BigtrainError if another process runs
    it.
    """
    overrides = redact(overrides)
    values = dict(text.lstrip("+").split("=", 1) for text in overrides if key_of(text) in varied and "=" in text)
    with readable_errors(sweep):
        (sweep / FOLDER).mkdir(parents=True, exist_ok=True)
        with open(sweep / FOLDER / ".lock", "w") as lock:
            _lock(lock.fileno(), wait=True)  # two trials that start together must not take the same number
            wanted = identity(overrides, varied)
            known = [trial for trial in read(sweep) if trial.identity == wanted]
            number = known[0].number if known else _free_number(sweep, job)
            own = os.open(sweep / FOLDER / f".{number}.lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if not _lock(own, wait=False):
                    raise BigtrainError(f"{sweep / str(number)}: another command runs this trial; wait for it")
                before = known[0] if known else Trial(number, job, command, overrides, values)
                trial = replace(before, job=job, command=command, overrides=overrides, varied=values)
                write(sweep, replace(trial, status="running", problem="", started=time.time(), seconds=None))
            except BaseException:
                os.close(own)
                raise
    try:
        yield trial
    finally:
        os.close(own)  # releases the lock


def _free_number(sweep: Path, preferred: int) -> int:
    """`preferred` unless its directory holds something already (but a directory that Hydra has just made)."""
    taken = {trial.number for trial in read(sweep)}
    for path in sweep.iterdir():
        if path.name.isdigit() and (not path.is_dir() or any(path.iterdir())):
            taken.add(int(path.name))
    number = preferred
    while number in taken:
        number = max(taken) + 1
    return number


def _lock(descriptor: int, wait: bool) -> bool:
    """False if another process has it. On a filesystem without locks: better unprotected than not at all."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
