"""What a person sees of a run: a progress bar on a terminal, plain lines everywhere else, a summary at the end."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from bigtrain.held_out import SHARE, sample_name
from bigtrain.hints import next_commands
from bigtrain.hooks.base import Hook, Metrics, RunInfo

SECONDS_BETWEEN_LINES = 5.0  # plain output; evaluations and the last step are always shown


class ConsoleHook(Hook):
    """`progress` False: plain lines on a terminal too. `terminal`: where to write; None is standard output."""

    def __init__(self, progress: bool = True, terminal: TextIO | None = None, console: Console | None = None) -> None:
        self._console = console or Console(file=terminal, width=_columns(terminal), soft_wrap=True)
        self._progress = progress and self._console.is_terminal
        self._bar: Progress | None = None
        self._task: Any = None
        self._info: RunInfo | None = None
        self._steps = 0
        self._last_line = float("-inf")
        self._pace: tuple[int, float] | None = None  # first step seen and when: what the ETA is reckoned from

    def on_start(self, info: RunInfo) -> None:
        self._info, self._steps = info, info.config.train.steps
        ranks = "1 rank" if info.world_size == 1 else f"{info.world_size} ranks"
        examples = f"{info.config.train.global_batch} examples"
        amount = examples if info.tokens_per_step is None else f"{count(info.tokens_per_step)} tokens"
        begin = f", resumed at step {info.start_step}" if info.resumed else ""
        self._say(
            f"{count(info.parameters)} parameters on {ranks} of {info.device_name}, {amount} a step, "
            f"{self._steps} steps{begin}; run directory {info.run_dir}"
        )
        if self._progress:
            columns = (
                BarColumn(bar_width=None, complete_style="cyan"),
                MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(self._steps)) + 1)),
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),  # cut first if it is narrow
            )
            self._bar = Progress(*columns, console=self._console, expand=True, refresh_per_second=4)
            self._task = self._bar.add_task("first step ...", total=self._steps, completed=info.start_step)
            self._bar.start()

    def on_step(self, step: int, metrics: Metrics) -> None:
        now = time.monotonic()
        left = self._seconds_left(step, now)
        if self._bar is not None:
            known = {name: value for name, value in metrics.items() if name != "train/lr"}  # 80 columns are soon full
            self._bar.update(self._task, completed=step, description=step_line(known, left))
        elif now - self._last_line >= SECONDS_BETWEEN_LINES or step == self._steps:
            self._last_line = now
            self._say(f"step {step}/{self._steps}  {step_line(metrics, left)}")

    def on_evaluate(self, step: int, metrics: Metrics) -> None:
        self._say(f"step {step}/{self._steps}  {evaluation_line(metrics)}")

    def on_warning(self, step: int, message: str) -> None:
        self._say(f"step {step}/{self._steps}  warning: {message}")

    def on_end(self, result: dict[str, Any]) -> None:
        self.close()
        assert self._info is not None
        run = result.get("run") or self._info.run_dir
        for line in summary(result, str(run), self._info.config.task.kind):
            self._say(line)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_failure(self, error: BaseException) -> None:
        self.close()  # the error itself is the command's to print

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False)

    def _seconds_left(self, step: int, now: float) -> float | None:
        """From the pace since the first step seen: that one had the warm-up in it."""
        if self._pace is None:
            self._pace = (step, now)
        first_step, first_time = self._pace
        return (now - first_time) / (step - first_step) * (self._steps - step) if step > first_step else None


# What a line about an evaluation shows beside the loss, where there is such a metric.
HEADLINES = {
    "eval/perplexity": "perplexity",
    "eval/bits_per_byte": "bits per byte",
    "eval/accuracy": "accuracy",
    "eval/f1": "F1",
    "eval/f1_macro": "macro F1",
    "eval/pearson": "Pearson",
    "eval/bleu": "BLEU",
    "eval/copy_bleu": "BLEU of copying",
    "eval/masked_accuracy": "masked accuracy",
    "eval/sentence_accuracy": "sentence accuracy",
    "eval/exact_match": "exact match",
    "eval/chrf": "chrF",
    "privacy/epsilon": "epsilon",
}


def _columns(terminal: TextIO | None) -> int | None:
    """The terminal's width, which rich looks for on the standard streams only; None: leave it to rich."""
    if terminal is None or not terminal.isatty():
        return None
    with suppress(OSError, ValueError):
        return os.get_terminal_size(terminal.fileno()).columns
    return None


def evaluation_line(metrics: Metrics) -> str:
    """held-out loss 2.5000  accuracy 0.81, and of a sample how much of the held-out set it is."""
    share = metrics.get(SHARE)
    names = {key if share is None else sample_name(key): name for key, name in HEADLINES.items()}
    loss = metrics["eval/loss" if share is None else sample_name("eval/loss")]
    parts = [
        f"held-out loss {loss:.4f}",
        *(f"{name} {metrics[key]:.4g}" for key, name in names.items() if key in metrics),
    ]
    return "  ".join(parts) + ("" if share is None else f"  ({percent(share)} of the held-out set)")


def percent(share: float) -> str:
    """14%, 0.3%"""
    return f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:.0f}%"


def step_line(metrics: Metrics, seconds_left: float | None) -> str:
    """loss 3.2140  lr 3.0e-04  12.3k tokens/s  MFU 41.2%  1.2 GiB  ETA 0:03:12, as far as it is known."""
    shown = {
        "train/loss": lambda value: f"loss {value:.4f}",
        "train/lr": lambda value: f"lr {value:.1e}",
        "perf/tokens_per_second": lambda value: f"{count(value)} tokens/s",
        "perf/mfu": lambda value: f"MFU {100 * value:.1f}%",
        "perf/peak_memory_gib": lambda value: f"{value:.1f} GiB",
    }
    parts = [write(metrics[name]) for name, write in shown.items() if metrics.get(name) is not None]
    if seconds_left is not None:
        parts.append(f"ETA {duration(seconds_left)}")
    return "  ".join(parts)


def summary(result: dict[str, Any], run: str, task: str) -> list[str]:
    """The lines after the last step, from what result.json holds; anything that is missing is left out."""
    steps, seconds = result.get("train/steps"), result.get("time/total_seconds")
    status = result.get("status", "finished")
    line = f"{status} at step {steps}" + (f" after {duration(seconds)}" if seconds is not None else "")
    numbers = []
    if result.get("eval/loss") is not None:
        numbers.append(f"held-out loss {result['eval/loss']:.4f}")
    for key, name in HEADLINES.items():
        if result.get(key) is not None and key not in ("eval/perplexity", "eval/bits_per_byte"):
            numbers.append(f"{name} {result[key]:.4g}")
    if result.get("eval/bits_per_byte") is not None:
        gzip = result.get("eval/gzip_bits_per_byte")
        compare = f" (gzip -9: {gzip:.3f})" if gzip is not None else ""
        numbers.append(f"{result['eval/bits_per_byte']:.3f} bits per byte{compare}")
    lines = [f"{line}: {', '.join(numbers)}" if numbers else line]
    return lines + [f"{name + ':':<10} {typed}" for name, typed in next_commands(task, run).items()]


def count(value: float) -> str:
    """950, 12.3k, 124M, 6.7B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def duration(seconds: float) -> str:
    """0:03:12, or 2 days, 4:00:00."""
    return str(timedelta(seconds=round(seconds)))
