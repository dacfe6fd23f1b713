"""`bigtrain watch RUN`: a running job on the terminal, from the files it writes. Imports no torch, changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bigtrain import held_out, runs
from bigtrain.hooks.console import HEADLINES, count, duration, percent
from bigtrain.hooks.jsonl import read_metrics

SECONDS_BETWEEN_LOOKS = 1.0
BARS = " ▁▂▃▄▅▆▇█"
PLAIN_BARS = " .:-=+*%#"  # where the terminal has no blocks
COLOURS = {"running": "green", "finished": "cyan", "failed": "red", "stalled": "red", "stopped": "yellow"}
WARNINGS = 3  # the last so many are shown
PACE_ROWS = 50  # the ETA is reckoned from the last so many


def watch(run: Path, once: bool, console: Console, sleep: Callable[[float], None] = time.sleep) -> runs.State:
    """Show RUN until it has ended; with `once`, or where there is no terminal, show it one time. How it stood last.

    Raises ConfigError if RUN holds no run.
    """
    bars = PLAIN_BARS if console.options.ascii_only else BARS
    if once or not console.is_terminal:
        state = runs.state(run)
        console.print(view(run, state, console.width, bars))
        return state
    with Live(console=console, auto_refresh=False) as live:
        while True:
            state = runs.state(run)
            live.update(view(run, state, console.width, bars), refresh=True)
            if state.status not in ("starting", "running", "stalled"):
                return state
            sleep(SECONDS_BETWEEN_LOOKS)


def view(run: Path, state: runs.State, width: int, bars: str = BARS) -> RenderableType:
    """The whole picture, as rich draws it."""
    rows = list(read_metrics(run / "metrics.jsonl"))
    steps = [row for row in rows if "perf/step_seconds" in row]
    last = held_out.latest(rows)
    title = Text.assemble((str(run), "bold"), "  ", (state.status, COLOURS.get(state.status, "")))
    if state.why:
        title.append(f"  {state.why}")
    total = state.steps or max(state.step, 1)
    head = Table.grid(padding=(0, 2))
    head.add_row(ProgressBar(total=total, completed=state.step, width=max(10, width // 3)), f"{state.step}/{total}",
                 _left(steps, total, state))  # fmt: skip
    parts: list[RenderableType] = [title, head, _numbers(last)]
    losses = [row["train/loss"] for row in steps if isinstance(row.get("train/loss"), (int, float))]
    if len(losses) > 1:
        parts.append(Text(f"loss  {sparkline(losses, max(10, min(width - 24, 100)), bars)}  {losses[-1]:.4f}"))
    if (slow := straggler(last)) is not None:
        parts.append(Text(slow, style="yellow"))
    phases = {str(beat["phase"]) for beat in runs.heartbeats(run)} if state.status in ("running", "stalled") else set()
    if phases - {"step"}:
        parts.append(Text(f"now: {', '.join(sorted(phases))}", style="dim"))
    for row in [row for row in rows if "warning" in row][-WARNINGS:]:
        parts.append(Text(f"warning at step {row['step']}: {row['warning']}", style="yellow"))
    if state.age is not None:
        parts.append(Text(f"last sign of life {duration(max(0.0, state.age))} ago", style="dim"))
    return Group(*parts)


def _left(steps: list[dict[str, Any]], total: int, state: runs.State) -> str:
    """ETA, from the pace of the last rows."""
    recent = [row for row in steps[-PACE_ROWS:] if "time" in row]
    if state.status not in ("running", "starting") or len(recent) < 2:
        return ""
    taken = recent[-1]["step"] - recent[0]["step"]
    if taken <= 0:
        return ""
    return f"ETA {duration((recent[-1]['time'] - recent[0]['time']) / taken * max(0, total - state.step))}"


def _numbers(last: dict[str, Any]) -> Table:
    sampled = held_out.SHARE in last
    of_sample = {held_out.sample_name(key): key for key in ("eval/loss", *HEADLINES)} if sampled else {}
    last = {of_sample.get(name, name): value for name, value in last.items()}
    shown: dict[str, tuple[str, Callable[[float], str]]] = {
        "train/loss": ("loss", lambda value: f"{value:.4f}"),
        "eval/loss": ("held-out loss", lambda value: f"{value:.4f}"),
        **{key: (name, lambda value: f"{value:.4g}") for key, name in HEADLINES.items()},
        held_out.SHARE: ("of the held-out set", percent),
        "train/lr": ("lr", lambda value: f"{value:.1e}"),
        "train/grad_norm": ("gradient norm", lambda value: f"{value:.3g}"),
        "perf/tokens_per_second": ("tokens/s", count),
        "perf/step_seconds": ("seconds a step", lambda value: f"{value:.3g}"),
        "perf/mfu": ("MFU", lambda value: f"{100 * value:.1f}%"),
        "perf/peak_memory_gib": ("peak GiB", lambda value: f"{value:.2f}"),
        "data/tokens": ("tokens", count),
    }
    grid = Table.grid(padding=(0, 2))
    cells = [
        Text.assemble((f"{name} ", "dim"), write(last[key])) for key, (name, write) in shown.items()
        if isinstance(last.get(key), (int, float))
    ]  # fmt: skip
    for at in range(0, len(cells), 4):
        grid.add_row(*cells[at : at + 4])
    return grid


def straggler(last: dict[str, Any]) -> str | None:
    """A line naming the rank whose own work takes a good deal longer than the others' (trainer.py measures it)."""
    longest, mean = last.get("perf/forward_seconds_max"), last.get("perf/forward_seconds_mean")
    if not longest or not mean or longest < 1.3 * mean or "perf/slowest_rank" not in last:
        return None
    return f"rank {int(last['perf/slowest_rank'])} is slow: its forward passes take {longest / mean:.1f} x the mean"


def sparkline(values: list[float], width: int, bars: str = BARS) -> str:
    """One character for each of `width` equal parts of the values: their mean, between the lowest and the highest."""
    size = max(1, -(-len(values) // width))
    means = [sum(values[at : at + size]) / len(values[at : at + size]) for at in range(0, len(values), size)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(bars[1 + round((value - low) / span * (len(bars) - 2))] for value in means)
