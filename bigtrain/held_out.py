"""The held-out set: batches of all of it or of an even sample, and what their metrics are called. Imports no torch.

A number of a sample and one of the whole set are two things, and have two names: a curve must not rise where only
other examples were counted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigtrain.batch import Batch

WHOLE, SAMPLE = "eval/", "eval_sample/"  # what metrics of the whole set and of a sample of it begin with
SHARE = f"{SAMPLE}share"  # how much of the whole set is in the sample


class HeldOut(ABC):
    """Held-out batches of one rank; every rank has equally many.

    rows: of the whole set. together: of them in a batch of all ranks. With `most` only that many batches of each rank,
    spread evenly over the set.
    """

    def __init__(self, rows: int, together: int, most: int | None) -> None:
        self._rows, self._together = rows, together
        self._all = -(-rows // together)
        self._n = min(self._all, most or self._all)

    def __len__(self) -> int:
        return self._n

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]: ...

    @property
    def whole(self) -> bool:
        return self._n == self._all

    @property
    def share(self) -> float:
        return min(1.0, self._n * self._together / self._rows)

    def places(self) -> Iterator[int]:
        """Where each batch stands among those of the whole set."""
        return (i * self._all // self._n for i in range(self._n))


def of_sample(metrics: Mapping[str, float], share: float) -> dict[str, float]:
    """Metrics of a sample by names of their own."""
    return {sample_name(name): value for name, value in metrics.items()} | {SHARE: share}


def sample_name(name: str) -> str:
    """eval/loss -> eval_sample/loss; a sign before the name stays, and so does any other name."""
    sign, key = ("-", name[1:]) if name.startswith("-") else ("", name)
    return sign + (SAMPLE + key.removeprefix(WHOLE) if key.startswith(WHOLE) else key)


def is_evaluation(row: Mapping[str, Any]) -> bool:
    return f"{WHOLE}loss" in row or f"{SAMPLE}loss" in row


def latest(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The last value of each name in rows of metrics.jsonl; of held-out metrics only what the last evaluation gave."""
    last: dict[str, Any] = {}
    for row in rows:
        if is_evaluation(row):
            last = {name: value for name, value in last.items() if not name.startswith((WHOLE, SAMPLE))}
        last |= {name: value for name, value in row.items() if value is not None}
    return last
