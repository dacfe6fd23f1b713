"""Token shards -> batches of tensors for one rank.

A window is T+1 tokens at stride T: inputs are its first T, targets its last T, so each token but a split's first is
a target exactly once per epoch (training drops the tail that fills no window, evaluation pads it).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from bigtrain.batch import IGNORED, Batch
from bigtrain.data.sampler import sample_windows
from bigtrain.data.shards import Prepared, TokenShards
from bigtrain.held_out import HeldOut


class _Windows:
    """Windows of one split as batches: tokens, targets and, if documents are to be isolated, document_ids."""

    def __init__(self, prepared: Prepared, split: str, seq_len: int, isolate_documents: bool) -> None:
        self.tokens = TokenShards(prepared, split)
        self.seq_len, self.eos_id, self.isolate_documents = seq_len, prepared.eos_id, isolate_documents

    def batch(self, windows: NDArray[np.int64]) -> Batch:
        """(B,) window numbers -> int64 (B, T) each. Past the end of the split: token <eos>, target IGNORED."""
        length = self.seq_len
        rows = np.full((len(windows), length + 1), IGNORED, dtype=np.int64)
        for row, window in zip(rows, windows.tolist(), strict=True):
            found = self.tokens.window(window * length, length + 1)
            row[: len(found)] = found
        block = torch.from_numpy(rows)
        tokens = block[:, :-1].clone()
        tokens[tokens == IGNORED] = self.eos_id
        batch = {"tokens": tokens, "targets": block[:, 1:].contiguous()}
        if self.isolate_documents:
            batch["document_ids"] = (tokens == self.eos_id).cumsum(dim=1)  # <eos> belongs to the document it begins
        return batch


class TrainLoader:
    """This rank's part of every training step: a contiguous block of the step's global order.

    `batches` is a pure function of the step and may be called from any thread, so the trainer reads ahead.
    """

    def __init__(
        self,
        prepared: Prepared,
        seq_len: int,
        global_batch: int,
        micro_batch: int,
        seed: int,
        rank: int,
        world_size: int,
        isolate_documents: bool = False,
        shift: int = 0,
    ) -> None:
        if global_batch % (micro_batch * world_size):
            raise ValueError(f"global batch {global_batch} is not a multiple of {world_size} ranks x {micro_batch}")
        self._windows = _Windows(prepared, "train", seq_len, isolate_documents)
        self.n_windows = (len(self._windows.tokens) - 1) // seq_len
        self._global_batch, self._micro_batch, self._seed = global_batch, micro_batch, seed
        self._shift = shift
        share = global_batch // world_size
        self._mine = slice(rank * share, (rank + 1) * share)

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of optimizer step `step` (from 0): dicts of int64 CPU tensors (micro_batch, T)."""
        return [self._windows.batch(part) for part in self._parts(step)]

    def samples(self, step: int) -> list[list[int]]:
        """The windows of the corpus in each of these micro-batches."""
        parts: list[list[int]] = self._parts(step).tolist()
        return parts

    def _parts(self, step: int) -> NDArray[np.int64]:
        windows = sample_windows(self._seed, step, self._global_batch, self.n_windows, self._shift)[self._mine]
        return windows.reshape(-1, self._micro_batch)


class EvalLoader(HeldOut):
    """The held-out split once, over all ranks: every rank gives the same number of batches, and together they score
    each token but the very first exactly once. What is left over is padded with targets IGNORED.

    With `max_batches` only that many batches per rank, spread evenly over the split.
    """

    def __init__(
        self,
        prepared: Prepared,
        seq_len: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        max_batches: int | None = None,
        isolate_documents: bool = False,
    ) -> None:
        self._windows = _Windows(prepared, "held_out", seq_len, isolate_documents)
        self._micro_batch, self._rank, self._world_size = micro_batch, rank, world_size
        n_windows = -(-(len(self._windows.tokens) - 1) // seq_len)
        super().__init__(n_windows, micro_batch * world_size, max_batches)

    def __iter__(self) -> Iterator[Batch]:
        for place in self.places():
            first = (place * self._world_size + self._rank) * self._micro_batch
            yield self._windows.batch(np.arange(first, first + self._micro_batch, dtype=np.int64))
