"""metrics.jsonl: one line of JSON per logged step and per evaluation, the record that reports are made from."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigtrain.hooks.base import Hook, Metrics, RunInfo


class JsonlHook(Hook):
    """Appends {"step", "time" (unix seconds), metrics ...}; a number that is not finite is written as null. An
    evaluation also has "data", the fingerprint of the data that it is of: a run may go on with other data.

    Each line is one unbuffered write, so a killed run leaves whole lines (but perhaps the last). A resumed run
    first drops the lines of steps that it will do again, and a torn last line.
    """

    name = "metrics.jsonl"

    def __init__(self) -> None:
        self._file: int | None = None

    def on_start(self, info: RunInfo) -> None:
        self._data = Path(info.config.data.prepared_dir or "").name
        self._path = info.run_dir / "metrics.jsonl"
        self._open(info.start_step if info.resumed else 0)

    def _open(self, last_step: int) -> None:
        rewind(self._path, last_step)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def on_rollback(self, step: int, left: int) -> None:
        self.close()
        self._open(step)

    def on_step(self, step: int, metrics: Metrics) -> None:
        self._write(step, _finite(metrics))

    def on_evaluate(self, step: int, metrics: Metrics) -> None:
        self._write(step, {"data": self._data, **_finite(metrics)})

    def on_warning(self, step: int, message: str) -> None:
        self._write(step, {"warning": message})

    def _write(self, step: int, row: dict[str, Any]) -> None:
        if self._file is not None:
            line = json.dumps({"step": step, "time": round(time.time(), 3), **row}) + "\n"
            os.write(self._file, line.encode())

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _finite(metrics: Metrics) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, of a run that goes on or was killed too; none if there is no file."""
    if path.exists():
        with path.open("rb") as lines:
            yield from (row for row in map(_parse, lines) if row is not None)


def rewind(path: Path, last_step: int) -> None:
    """Keep the whole lines up to `last_step`: none if that is 0. The file is replaced in one move or not at all."""
    if not path.exists():
        return
    kept = path.with_name(path.name + ".tmp")
    with path.open("rb") as old, kept.open("wb") as new:
        for line in old:
            row = _parse(line)
            if row is not None and row["step"] <= last_step:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    os.replace(kept, path)


def _parse(line: bytes) -> dict[str, Any] | None:
    """A whole line's data; None of a torn or damaged one."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
