"""The exact choice of the k smallest, against sorting."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from bigtrain.compress import select


def keys(kind: str) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    weights = torch.randn(5000, generator=draw)
    if kind == "ties":
        weights = (weights * 4).round() / 4
    if kind == "equal":
        weights.fill_(0.5)
    if kind == "wide":  # 33 bits
        return (weights.double() * 2**28).long().clamp(-(2**31) + 1, 2**31 - 1) + 2**31
    return weights.abs().view(torch.int32) + 1


@pytest.mark.parametrize("kind", ["floats", "ties", "equal", "wide"])
@pytest.mark.parametrize("count", [0, 1, 2, 1234, 4999, 5000])
def test_it_chooses_what_a_stable_sort_would(kind: str, count: int) -> None:
    """Cut into pieces of three makers, as ranks would hold them; the reduction is counted, and never large."""
    whole = keys(kind)
    bounds = [0, 1, 700, 701, 3000, 5000]
    pieces = [select.Piece(partial(lambda a, b: whole[a:b], a, b), a) for a, b in itertools.pairwise(bounds)]
    reductions = []

    def total(counts: torch.Tensor) -> torch.Tensor:
        reductions.append(counts.nbytes)
        return counts

    cut = select.cut(pieces, count, 33 if kind == "wide" else 31, 5000, total)
    chosen = torch.cat([cut.chosen(piece.keys(), piece.first) for piece in pieces])
    wanted = torch.zeros(5000, dtype=torch.bool)
    wanted[whole.argsort(stable=True)[:count]] = True
    assert torch.equal(chosen, wanted)
    assert all(size <= 16 * 1024 for size in reductions)
    assert len(reductions) <= (5 if kind in ("ties", "equal") else 3)
