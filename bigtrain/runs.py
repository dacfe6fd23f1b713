"""What state a run is in, from its directory alone, and from any machine that sees it. Imports no torch.

A run that trains leaves a heartbeat several times a minute; one that has ended well result.json, one that failed
failures/rank-N.json. What left neither has been killed, or hangs.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from bigtrain import config as schema
from bigtrain import heartbeat
from bigtrain.config import Config
from bigtrain.errors import ConfigError
from bigtrain.held_out import SAMPLE, WHOLE
from bigtrain.hooks.console import duration
from bigtrain.hooks.jsonl import read_metrics
from bigtrain.launch.cause import failure_files
from bigtrain.launch.run_dir import LOCK, read_result
from bigtrain.redact import redact

Status = Literal["starting", "running", "finished", "stopped", "failed", "stalled"]
CLOCK_SECONDS = 5.0  # clocks of two machines may be so far apart


@dataclass(frozen=True)
class State:
    """Where a run stands. Ages are in seconds."""

    path: Path
    status: Status
    why: str  # of failed and stalled: the first cause, as far as the directory knows it
    step: int
    steps: int | None  # that it is to take
    best: float | None  # lowest held-out loss so far, on the data that the run is on now
    best_of: (
        str  # what that is the loss of: "" is the whole held-out set, then "sample" of it, else "training", the last
    )
    age: float | None  # since the last sign of life


def find(directory: Path) -> Iterator[Path]:
    """Run directories under `directory`, itself included; nothing inside a run is looked at."""
    for root, folders, files in os.walk(directory):
        if "config.yaml" in files and "launch.json" in files:
            folders.clear()
            yield Path(root)
        else:
            folders[:] = sorted(name for name in folders if not name.startswith("."))


def state(path: Path, now: float | None = None) -> State:
    """Read what `path` says. Raises ConfigError if it holds no run."""
    now = time.time() if now is None else now
    config = _config(path)
    rows = list(read_metrics(path / "metrics.jsonl"))
    result = read_result(path)
    beats = heartbeats(path)
    seen = [float(beat["time"]) for beat in beats] + [float(row["time"]) for row in rows[-1:] if "time" in row]
    status, why = _status(path, config, result, beats, now)
    step = max([*(int(row["step"]) for row in rows[-1:]), *(int(beat["step"]) for beat in beats)], default=0)
    if status in ("finished", "stopped") and result:
        step = int(result.get("train/steps") or step)
        seen.append(_modified(path / "result.json") or 0.0)
    return State(
        path, status, why, step, config.train.steps if config else None,
        *best(rows, Path(config.data.prepared_dir or "").name if config else None), now - max(seen) if seen else None,
    )  # fmt: skip


def best(rows: list[dict[str, Any]], data: str | None) -> tuple[float | None, str]:
    """The lowest loss of the whole held-out set, else of a sample of it, else the last one of training; and which of
    them. `data`: the fingerprint of the run's data; what an evaluation of other data gave does not count."""
    here = [row for row in rows if data is None or row.get("data", data) == data]
    for name, of in ((f"{WHOLE}loss", ""), (f"{SAMPLE}loss", "sample")):
        if found := [row[name] for row in here if isinstance(row.get(name), (int, float))]:
            return min(found), of
    losses = [row["train/loss"] for row in rows if isinstance(row.get("train/loss"), (int, float))]
    return (losses[-1], "training") if losses else (None, "")


def heartbeats(path: Path) -> list[dict[str, Any]]:
    """The ranks' last records, by rank; a broken one is left out."""
    found: list[tuple[int, dict[str, Any]]] = []
    for file in (path / heartbeat.FOLDER).glob("rank-*.json"):
        with suppress(OSError, ValueError):
            record = json.loads(file.read_bytes())
            if isinstance(record, dict) and {"phase", "step", "time"} <= record.keys():
                found.append((int(file.stem.partition("-")[2]), record))
    return [record for _, record in sorted(found, key=lambda pair: pair[0])]


def _config(path: Path) -> Config | None:
    try:
        return schema.load(path / "config.yaml")
    except ConfigError:
        if not (path / "config.yaml").exists():
            raise ConfigError("RUN", str(path), "holds no run") from None
        return None  # of another version: the rest can be told all the same


def _status(
    path: Path, config: Config | None, result: dict[str, Any] | None, beats: list[dict[str, Any]], now: float
) -> tuple[Status, str]:
    last = max((float(beat["time"]) for beat in beats), default=0.0)
    ended = _modified(path / "result.json")
    if result is not None and ended is not None and ended + CLOCK_SECONDS >= last:
        return ("finished" if result.get("status") == "finished" else "stopped"), ""
    failures = sorted(failure_files(path), key=lambda file: _modified(file) or 0.0)
    if failures and (_modified(failures[0]) or 0.0) + CLOCK_SECONDS >= last:
        return "failed", _cause(failures[0])
    owner = _owner_lives(path)
    if not beats:
        return ("starting", "") if owner is not False else ("failed", "ended before its ranks started")
    hang_seconds = (config.launch.hang_seconds if config else 0) or float("inf")
    for rank, beat in enumerate(beats):
        factor, least = heartbeat.ALLOWANCES.get(beat["phase"], (1, 0))
        silent = now - float(beat["time"])
        if owner is False and silent > CLOCK_SECONDS:
            return "failed", f"killed while {_doing(beat)}, after step {beat['step']}"
        if silent > max(factor * hang_seconds, least) + CLOCK_SECONDS:
            return "stalled", f"rank {rank} silent for {duration(silent)} while {_doing(beat)}"
    return "running", ""


def _doing(beat: dict[str, Any]) -> str:
    phase = str(beat["phase"])
    return f"in a {phase}" if phase in (heartbeat.STEP, heartbeat.FIRST_STEP) else phase


def _owner_lives(path: Path) -> bool | None:
    """Whether the command that last claimed the directory lives; None: it ran on another machine."""
    try:
        words = (path / LOCK).read_text(encoding="utf-8").split()  # "process 123 on host"
        pid, host = int(words[1]), words[3]
    except (OSError, ValueError, IndexError):
        return None
    return psutil.pid_exists(pid) if host == socket.gethostname() or host == os.uname().nodename else None


def _cause(file: Path) -> str:
    try:
        failure = json.loads(file.read_text(encoding="utf-8"))
        return redact(f"rank {failure['rank']}: {failure['error']}")
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _best(one: State) -> str:
    if one.best is None:
        return "-"
    return f"{one.best:.4f}" + (f" ({one.best_of})" if one.best_of else "")


def table(states: list[State], directory: Path) -> list[str]:
    """Aligned lines, a header first, the latest sign of life last."""
    rows = [["run", "status", "step", "best loss", "age"]]
    for one in sorted(states, key=lambda one: -(one.age if one.age is not None else float("inf"))):
        steps = f"/{one.steps}" if one.steps is not None else ""
        name = str(one.path.relative_to(directory)) if one.path.is_relative_to(directory) else str(one.path)
        rows.append([
            name if name != "." else str(one.path), one.status, f"{one.step}{steps}",
            _best(one), "-" if one.age is None else duration(max(0.0, one.age)),
        ])  # fmt: skip
    wide = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(wide[at]) for at, cell in enumerate(row)).rstrip() for row in rows]
    whys = [""] + [one.why for one in sorted(states, key=lambda one: -(one.age if one.age is not None else 1e300))]
    return [f"{line}  {why}" if why else line for line, why in zip(lines, whys, strict=True)]
