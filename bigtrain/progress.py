"""How far a command is that takes minutes: a bar on a terminal, else a line from time to time. On standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

SECONDS_BETWEEN_LINES = 10.0

Item = TypeVar("Item")


def counted(items: Iterable[Item], total: int, what: str, seconds: float = SECONDS_BETWEEN_LINES) -> Iterator[Item]:
    """`items` as they are, while `what` and how many of `total` are done is shown; nothing of what is done at once.

    seconds: between two lines where standard error is no terminal.
    """
    if sys.stderr.isatty():
        yield from _with_bar(items, total, what)
        return
    began = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= seconds:
            last = now
            left = (now - began) / done * (total - done) if done else None
            eta = "" if left is None else f", about {timedelta(seconds=round(left))} left"
            print(f"bigtrain: {what}: {done} of {total}{eta}", file=sys.stderr, flush=True)
        yield item


def _with_bar(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            bar.advance(task)
