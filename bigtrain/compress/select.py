"""The k smallest of keys that lie on many ranks, exactly, without moving them: a radix select.

Each pass counts the keys by their next 11 bits, all-reduces the counts (16 KiB) and goes on with the bin that holds the
k-th: three passes for keys of up to 33 bits. Among equal keys the lower position goes first, so that the choice is of
exactly k, and the same however the keys are cut and whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DIGIT_BITS = 11
BINS = 2**DIGIT_BITS
Total = Callable[[Tensor], Tensor]  # counts (BINS,) int64 on the CPU, summed over the ranks
Source = Callable[[], Tensor]  # some of this rank's keys; made when asked for, to be small in memory


class Piece(NamedTuple):
    """Some of this rank's keys, at positions `first`, first + 1, ... of all."""

    keys: Source  # (numel,) int32 or int64, none negative
    first: int


class Cut(NamedTuple):
    """What is chosen: keys below `key`, and of those equal to it the ones at positions below `position`."""

    key: int
    position: int

    def chosen(self, keys: Tensor, first: int) -> Tensor:
        """(numel,) boolean, of a piece's keys."""
        below = keys < self.key
        equal = (keys == self.key).nonzero().flatten()
        below[equal[equal + first < self.position]] = True
        return below


def cut(pieces: Sequence[Piece], count: int, bits: int, positions: int, total: Total) -> Cut:
    """Where to cut so that exactly `count` of all keys are chosen. All ranks together, each with its own pieces.

    bits: of the largest key; positions: how many there are.
    """
    if count <= 0:
        return Cut(-1, 0)
    key, left, equal = _descend([piece.keys for piece in pieces], bits, count, total)
    if left == equal:
        return Cut(key, positions)

    def ties(piece: Piece) -> Tensor:
        return (piece.keys() == key).nonzero().flatten() + piece.first

    last, _, _ = _descend([_as_source(ties(piece)) for piece in pieces], positions.bit_length(), left, total)
    return Cut(key, last + 1)


def _descend(sources: list[Source], bits: int, count: int, total: Total) -> tuple[int, int, int]:
    """(the count-th smallest value, how many of that value are among the count smallest, how many there are)."""
    value, left = 0, count
    for shift in range(-(-bits // DIGIT_BITS) * DIGIT_BITS - DIGIT_BITS, -1, -DIGIT_BITS):
        counts = torch.zeros(BINS, dtype=torch.int64)
        for source in sources:
            counts += torch.bincount((source() >> shift) & (BINS - 1), minlength=BINS).cpu()
        counts = total(counts)
        up_to = counts.cumsum(0)
        digit = int(torch.searchsorted(up_to, left))
        left -= int(up_to[digit] - counts[digit])
        value = value << DIGIT_BITS | digit
        if shift:
            sources = [_as_source(_beginning(source(), value, shift)) for source in sources]  # few are left
    return value, left, int(counts[digit])


def _beginning(values: Tensor, value: int, shift: int) -> Tensor:
    return values[values >> shift == value]


def _as_source(values: Tensor) -> Source:
    return lambda: values
