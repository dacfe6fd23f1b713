"""Ends a trial whose metric, at the same step, is worse than that of the trials before it.

A thread reads metrics.jsonl of the trial, tells the study each value, and when the study's pruner says so, sends this
process the SIGTERM that a person would: the ranks save what they have and end. It watches and never touches the run.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigtrain.held_out import sample_name
from bigtrain.hooks.jsonl import read_metrics

POLL_SECONDS = 0.5


class Pruning:
    """With it, a trial of an Optuna sweep is watched. `problem` says why it was ended, if it was.

    `metric`: the name to report, with a minus in front where more is better. For the main thread, which gets signals.
    """

    def __init__(self, run_dir: Path, metric: str, options: Mapping[str, Any], storage: str, number: int) -> None:
        self.path, self.metric, self.number = run_dir / "metrics.jsonl", metric, number
        self.options, self.storage = options, storage
        self.problem = ""
        self._reported: set[int] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pruning", daemon=True)

    def __enter__(self) -> Pruning:
        self._before = signal.signal(signal.SIGTERM, self._on_signal)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        signal.signal(signal.SIGTERM, self._before)

    def _on_signal(self, number: int, frame: Any) -> None:
        """Outside of the time in which the ranks run, our own signal has come too late and means nothing."""
        if not self.problem:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        from bigtrain.sweep import study

        trial = study.Reported(self.storage, self.number, self.options)
        ended = False
        while not ended:
            ended = self._end.wait(POLL_SECONDS)  # and after the end once more: later trials are compared with all rows
            for step, value in self._new_rows():
                trial.report(step, value)
                if not ended and not self.problem and trial.should_be_pruned():
                    shown = f"{abs(value):.6g}" if self.metric.startswith("-") else f"{value:.6g}"
                    name = self.metric.lstrip("-")
                    self.problem = f"{name} was {shown} at step {step} ({self.options.get('pruner')} pruner)"
                    os.kill(os.getpid(), signal.SIGTERM)

    def _new_rows(self) -> list[tuple[int, float]]:
        """(step, value to be minimised), each step once: of the whole held-out set, or of the sample that the trials
        are evaluated on while they go on."""
        name, sign = self.metric.lstrip("-"), -1 if self.metric.startswith("-") else 1
        found = []
        with contextlib.suppress(OSError):
            for row in read_metrics(self.path):
                value = row.get(name, row.get(sample_name(name)))
                if isinstance(value, (int, float)) and math.isfinite(value) and row["step"] not in self._reported:
                    self._reported.add(row["step"])
                    found.append((row["step"], sign * float(value)))
        return found
