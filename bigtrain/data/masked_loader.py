"""Token shards -> BERT's pretraining batches: pairs of segments with some tokens masked (arXiv 1810.04805, 3.1).

A window of the corpus gives one sequence: its longest stretch within one document, whole or cut into segments A and B.
What is drawn (the cut, the other B, the mask) is a pure function of (seed, step, place in the global batch), so it
is dynamic (a window is masked anew every epoch, arXiv 1907.11692) and yet the same at any world size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bigtrain.batch import IGNORED, Batch
from bigtrain.config import MaskedLMConfig
from bigtrain.data.example_loader import Share, pad
from bigtrain.data.sampler import sample_windows
from bigtrain.data.shards import Prepared, TokenShards
from bigtrain.held_out import HeldOut

Ids = NDArray[np.int64]
DRAWS = 10  # of another B, as in BERT's create_pretraining_data.py: a corpus of one document has no other
SCANNED = 4096  # tokens at a time, on the way to a document's end
KEPT, REPLACED = 0.1, 0.1  # of the masked tokens: left as they are, and replaced by another; the rest become [MASK]


@dataclass(frozen=True)
class Vocabulary:
    """What masking has to know of a tokenizer."""

    size: int
    special_ids: dict[str, int]  # cls, sep, mask, pad
    begins_word: NDArray[np.bool_]  # by token id: whether a word begins with it


class MaskedRows:
    """Sequences of one split, made when they are asked for."""

    def __init__(
        self, prepared: Prepared, split: str, seq_len: int, config: MaskedLMConfig, vocabulary: Vocabulary
    ) -> None:
        self._tokens, self._eos_id = TokenShards(prepared, split), prepared.eos_id
        self._one_document = prepared.documents[split] < 2
        self._length, self._config, self._vocabulary = seq_len, config, vocabulary
        self._room = seq_len - (2 if config.sentence == "none" else 3)
        self.n_windows = max(1, len(self._tokens) // self._room)

    def row(self, window: int, random: np.random.Generator) -> dict[str, NDArray[Any]]:
        """tokens, token_types and targets (T,), and `pair`: 0 where B follows A, 1 where it does not."""
        ids = self._vocabulary.special_ids
        cls, sep = np.array([ids["cls"]]), np.array([ids["sep"]])
        begin, text = self._stretch(window)
        pair = 0
        if self._config.sentence == "none":
            parts, types = [cls, text, sep], np.zeros(len(text) + 2, dtype=np.int64)
        else:
            a, b, pair = self._segments(begin, text, random)
            parts, types = [cls, a, sep, b, sep], np.repeat([0, 1], [len(a) + 2, len(b) + 1])
        tokens = np.concatenate(parts)
        masked, targets = self._mask(tokens, random)
        return {"tokens": masked, "token_types": types, "targets": targets, "pair": np.asarray(pair)}

    def filler(self) -> dict[str, NDArray[Any]]:
        """A row that scores nothing."""
        row = self.row(0, np.random.default_rng(0))
        return row | {"targets": np.full_like(row["targets"], IGNORED), "pair": np.asarray(IGNORED)}

    def _stretch(self, window: int) -> tuple[int, Ids]:
        """(where it begins in the split, the window's longest run of tokens of one document)."""
        at = window * self._room
        found = self._tokens.window(at, self._room).astype(np.int64)
        ends = np.flatnonzero(found == self._eos_id)
        starts = np.concatenate(([0], ends + 1))
        lengths = np.concatenate((ends, [len(found)])) - starts
        longest = int(lengths.argmax())
        return at + int(starts[longest]), found[starts[longest] : starts[longest] + lengths[longest]]

    def _segments(self, begin: int, text: Ids, random: np.random.Generator) -> tuple[Ids, Ids, int]:
        least = max(1, len(text) // 4)
        cut = int(random.integers(least, max(3 * len(text) // 4, least) + 1))
        a, b, other = text[:cut], text[cut:], int(random.integers(2))
        if other and self._config.sentence == "order":
            return b, a, other
        if other:
            for _ in range(DRAWS):
                other_begin, b = self._stretch(int(random.integers(self.n_windows)))
                if self._one_document or not self._same_document(begin, other_begin):
                    break
            b = b[: self._room - len(a)]
        return a, b, other

    def _same_document(self, one: int, other: int) -> bool:
        """Of two places in the split: whether no document begins between them."""
        first, last = min(one, other), max(one, other)
        return not any(
            (self._tokens.window(at, min(SCANNED, last - at)) == self._eos_id).any()
            for at in range(first, last, SCANNED)
        )

    def _mask(self, tokens: Ids, random: np.random.Generator) -> tuple[Ids, Ids]:
        """(tokens with some masked, targets: what they were, -100 elsewhere)."""
        vocabulary = self._vocabulary
        special = np.isin(tokens, list(vocabulary.special_ids.values()))
        candidates = np.flatnonzero(~special)
        chosen = np.zeros(len(tokens), dtype=bool)
        wanted = max(1, round(self._config.mask_fraction * len(candidates))) if len(candidates) else 0
        if self._config.whole_word:
            begins = vocabulary.begins_word[tokens] | np.concatenate(([True], special[:-1]))
            word = np.cumsum(begins)
            for number in random.permutation(np.unique(word[candidates])):
                if chosen.sum() >= wanted:
                    break
                chosen |= (word == number) & ~special
        else:
            chosen[random.permutation(candidates)[:wanted]] = True
        targets = np.where(chosen, tokens, IGNORED)
        fate = random.random(len(tokens))
        other = random.integers(vocabulary.size, size=len(tokens))
        masked = np.where(chosen & (fate >= KEPT + REPLACED), vocabulary.special_ids["mask"], tokens)
        return np.where(chosen & (fate >= KEPT) & (fate < KEPT + REPLACED), other, masked), targets


class MaskedTrainLoader:
    """This rank's part of every training step. `batches` is a pure function of the step, for any thread."""

    def __init__(self, rows: MaskedRows, pad_id: int, seq_len: int, share: Share) -> None:
        self._rows, self._pad_id, self._seq_len, self._share = rows, pad_id, seq_len, share

    def batches(self, step: int) -> list[Batch]:
        share = self._share
        windows = sample_windows(share.seed, step, share.global_batch, self._rows.n_windows, share.shift)
        mine = range(share.rank, share.global_batch, share.world_size)
        made = [self._rows.row(int(windows[i]), np.random.default_rng((share.seed, step, i))) for i in mine]
        return [
            _collate(made[start : start + share.micro_batch], self._pad_id, self._seq_len)
            for start in range(0, len(made), share.micro_batch)
        ]

    def samples(self, step: int) -> list[list[int]]:
        """The windows of the corpus in each of these micro-batches."""
        share = self._share
        windows = sample_windows(share.seed, step, share.global_batch, self._rows.n_windows, share.shift)
        parts: list[list[int]] = windows[share.rank :: share.world_size].reshape(-1, share.micro_batch).tolist()
        return parts


class MaskedEvalLoader(HeldOut):
    """Every held-out window once, over all ranks, always masked in the same way; ranks give equally many batches."""

    def __init__(
        self, rows: MaskedRows, pad_id: int, seq_len: int, share: Share, max_batches: int | None = None
    ) -> None:
        self._windows, self._pad_id, self._seq_len, self._share = rows, pad_id, seq_len, share
        super().__init__(rows.n_windows, share.micro_batch * share.world_size, max_batches)

    def __iter__(self) -> Iterator[Batch]:
        share = self._share
        for place in self.places():
            first = (place * share.world_size + share.rank) * share.micro_batch
            windows = range(first, first + share.micro_batch)
            rows = [
                self._windows.row(w, np.random.default_rng((0, w)))
                if w < self._windows.n_windows
                else self._windows.filler()
                for w in windows
            ]
            yield _collate(rows, self._pad_id, self._seq_len)


def _collate(rows: list[dict[str, NDArray[Any]]], pad_id: int, seq_len: int) -> Batch:
    tokens = pad(rows, "tokens", pad_id, seq_len)
    lengths = torch.tensor([len(row["tokens"]) for row in rows])
    return {
        "tokens": tokens,
        "attention_mask": (torch.arange(tokens.size(1)) < lengths.unsqueeze(-1)).long(),
        "token_types": pad(rows, "token_types", 0, seq_len),
        "targets": pad(rows, "targets", IGNORED, seq_len),
        "pair": torch.tensor([int(row["pair"]) for row in rows]),
    }


def word_beginnings(tokens_by_id: dict[int, str], size: int) -> NDArray[np.bool_]:
    """Whether a word begins with a token: WordPiece marks what continues one (##), byte-level BPE the space before."""
    begins = np.ones(size, dtype=bool)
    pieces = any(token.startswith("##") for token in tokens_by_id.values())
    for number, token in tokens_by_id.items():
        begins[number] = not token.startswith("##") if pieces else not token[:1].isalnum() or token[0] in "ĠĊĉč"
    return begins
