"""Labelled examples -> batches for one rank, grouped by length so that little of a batch is padding.

The stream of examples is cut into spans of GROUPED global batches; within a span examples are sorted by length, cut
into batches, and the batches shuffled. Each step's global batch is a pure function of (seed, step), whatever the world
size; its rows are dealt out to the ranks one by one in order of length, so that all have equally much to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bigtrain.batch import Batch
from bigtrain.data.examples import Examples
from bigtrain.data.sampler import GROUPED, by_length, padded
from bigtrain.errors import BigtrainError
from bigtrain.held_out import HeldOut

Rows = list[dict[str, NDArray[Any]]]
Collate = Callable[[Rows, np.random.Generator | None], Batch]  # rows -> tensors; the generator is for augmentation


@dataclass(frozen=True)
class Share:
    """Which part of each batch is this rank's."""

    rank: int
    world_size: int
    global_batch: int  # examples (or sequences) of an optimizer step, over all ranks
    micro_batch: int  # of one forward on one rank
    seed: int
    shift: int = 0  # a step's sequences begin at step * global_batch + shift: the global batch was once another
    draw: Callable[[int], NDArray[np.int64]] | None = None  # the examples of a step, where it is not all in their turn


class ExampleTrainLoader:
    """This rank's part of every training step. `batches` is a pure function of the step, for any thread."""

    def __init__(self, examples: Examples, collate: Collate, share: Share) -> None:
        if share.shift:  # what is left of a span is no whole number of other batches
            raise BigtrainError("labelled examples cannot go on with another train.global_batch than they began with")
        self._examples, self._collate, self._share = examples, collate, share
        self._lengths = examples.lengths()
        self._span = lru_cache(maxsize=2)(self._span_order)  # two: the loader reads one step ahead

    def batches(self, step: int) -> list[Batch]:
        random = np.random.default_rng((self._share.seed, step, self._share.rank))
        return [self._collate([_row(self._examples, row) for row in part], random) for part in self.samples(step)]

    def samples(self, step: int) -> list[list[int]]:
        """The numbers of the examples in each of these micro-batches."""
        share = self._share
        span, index = divmod(step, GROUPED)
        mine = self._span(span)[index][share.rank :: share.world_size]
        parts: list[list[int]] = mine.reshape(-1, share.micro_batch).tolist()
        return parts

    def _span_order(self, span: int) -> NDArray[np.int64]:
        return by_length(self._lengths, self._share.seed, span, self._share.global_batch)


class DrawnTrainLoader:
    """Every training step of one rank, of the examples that `share.draw` draws for it: sometimes none, and seldom as
    many as the step before. Each micro-batch but the last is full, and of texts alike in length."""

    def __init__(self, examples: Examples, collate: Collate, share: Share) -> None:
        assert share.draw is not None
        assert share.world_size == 1
        self._examples, self._collate, self._share = examples, collate, share
        self._draw, self._lengths = share.draw, examples.lengths()

    def batches(self, step: int) -> list[Batch]:
        random = np.random.default_rng((self._share.seed, step, self._share.rank))
        return [self._collate([_row(self._examples, row) for row in part], random) for part in self.samples(step)]

    def samples(self, step: int) -> list[list[int]]:
        """The numbers of the examples in each of these micro-batches."""
        drawn, size = self._draw(step), self._share.micro_batch
        ordered = drawn[np.argsort(self._lengths[drawn], kind="stable")].tolist()
        return [ordered[first : first + size] for first in range(0, len(ordered), size)]


class ExampleEvalLoader(HeldOut):
    """Every held-out example once, over all ranks, in order of length. All ranks give the same number of batches:
    rows that are there only for that have index -1.

    With `max_batches` only that many batches per rank, spread evenly.
    """

    def __init__(self, examples: Examples, collate: Collate, share: Share, max_batches: int | None = None) -> None:
        self._examples, self._collate, self._share = examples, collate, share
        self._order = np.argsort(examples.lengths(), kind="stable")
        super().__init__(len(self._order), share.micro_batch * share.world_size, max_batches)

    def __iter__(self) -> Iterator[Batch]:
        share = self._share
        for place in self.places():
            first = place * self._together
            mine = self._order[first : first + self._together][share.rank :: share.world_size].tolist()
            rows = [_row(self._examples, index) for index in mine]
            while len(rows) < share.micro_batch:
                rows.append(_row(self._examples, int(self._order[0])) | {"index": np.asarray(-1)})
            yield self._collate(rows, None)


def _row(examples: Examples, index: int) -> dict[str, NDArray[Any]]:
    return examples[index] | {"index": np.asarray(index)}


def pad(rows: Rows, field: str, value: int, limit: int) -> torch.Tensor:
    """(B, T) int64: each row's values of `field`, then `value` to the longest row's length, rounded up to a multiple of
    8 that is at most `limit`."""
    length = padded(max(len(row[field]) for row in rows), limit)
    filled = np.full((len(rows), length), value, dtype=np.int64)
    for line, row in zip(filled, rows, strict=True):
        line[: len(row[field])] = row[field]
    return torch.from_numpy(filled)


def stack(rows: Rows, field: str) -> torch.Tensor:
    """(B,) of a field with one value an example."""
    return torch.from_numpy(np.stack([np.asarray(row[field]) for row in rows]))
