"""BERT's batches: what is masked, how segments pair, and that nothing depends on the number of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bigtrain.config import MaskedLMConfig
from bigtrain.data.example_loader import Share
from bigtrain.data.masked_loader import (
    MaskedEvalLoader,
    MaskedRows,
    MaskedTrainLoader,
    Vocabulary,
    word_beginnings,
)
from bigtrain.data.sampler import sample_windows
from bigtrain.data.shards import Prepared

SIZE, EOS, PAD, CLS, SEP, MASK = 1000, 0, 1, 2, 3, 4
SPECIAL = {"pad": PAD, "cls": CLS, "sep": SEP, "mask": MASK}
LENGTH = 64


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """40 documents of consecutive numbers: whether a segment follows another can be read off."""
    folder = tmp_path_factory.mktemp("shards")
    documents = [[EOS, *range(start, start + 300)] for start in np.random.default_rng(0).integers(10, 690, size=40)]
    tokens = np.concatenate(documents).astype("<u2")
    tokens.tofile(folder / "train-00000.bin")
    counts = {"train": len(tokens), "held_out": 0}
    return Prepared(folder, "", SIZE, EOS, counts, counts, counts, None, {"train": [len(tokens)], "held_out": []})


def rows(prepared: Prepared, **settings: object) -> MaskedRows:
    begins = np.arange(SIZE) % 3 == 0  # words of three tokens
    return MaskedRows(prepared, "train", LENGTH, MaskedLMConfig(**settings), Vocabulary(SIZE, SPECIAL, begins))  # type: ignore[arg-type]


def test_masking_is_berts(prepared: Prepared) -> None:
    made = rows(prepared, sentence="none")
    chosen = masked = kept = candidates = 0
    for window in range(150):
        row = made.row(window, np.random.default_rng(window))
        scored = row["targets"] != -100
        assert not np.isin(row["targets"][scored], list(SPECIAL.values())).any()
        assert (row["tokens"][~scored] >= CLS).all()
        chosen += scored.sum()
        candidates += len(scored) - 2
        masked += (row["tokens"][scored] == MASK).sum()
        kept += (row["tokens"][scored] == row["targets"][scored]).sum()
    assert chosen / candidates == pytest.approx(0.15, abs=0.01)
    assert masked / chosen == pytest.approx(0.8, abs=0.04)
    assert kept / chosen == pytest.approx(0.1, abs=0.04)


def original(row: dict[str, np.ndarray]) -> tuple[list[int], list[int]]:
    """Segments A and B without the mask."""
    tokens = np.where(row["targets"] != -100, row["targets"], row["tokens"])
    a, b = tokens[row["token_types"] == 0].tolist(), tokens[row["token_types"] == 1].tolist()
    assert a[0] == CLS
    assert a[-1] == b[-1] == SEP
    return a[1:-1], b[:-1]


def test_b_follows_a_or_comes_from_elsewhere(prepared: Prepared) -> None:
    made = rows(prepared, sentence="next")
    labels, follows = [], []
    for window in range(made.n_windows):
        row = made.row(window, np.random.default_rng(window))
        a, b = original(row)
        assert len(row["tokens"]) <= LENGTH
        assert a == list(range(a[0], a[0] + len(a)))  # of one document
        assert b == list(range(b[0], b[0] + len(b)))
        labels.append(int(row["pair"]))
        follows.append(b[0] == a[-1] + 1)
    assert np.mean(labels) == pytest.approx(0.5, abs=0.12)
    assert all(f for f, label in zip(follows, labels, strict=True) if label == 0)
    assert np.mean([f for f, label in zip(follows, labels, strict=True) if label == 1]) < 0.1


@pytest.mark.parametrize("few", [2, 3])
def test_the_other_b_is_of_another_document(tmp_path: Path, few: int) -> None:
    """Documents of numbers of their own, of which an even draw would often give the same."""
    size = 9000  # a document is scanned in more than one go
    documents = [np.concatenate(([EOS], np.random.default_rng(n).integers(10 + 100 * n, 110 + 100 * n, size)))
                 for n in range(few)]  # fmt: skip
    tokens = np.concatenate(documents).astype("<u2")
    tokens.tofile(tmp_path / "train-00000.bin")
    counts = {"train": len(tokens), "held_out": 0}
    prepared = Prepared(tmp_path, "", SIZE, EOS, counts, counts, {"train": few, "held_out": 0}, None,
                        {"train": [len(tokens)], "held_out": []})  # fmt: skip
    made = rows(prepared, sentence="next")
    same = {0: [], 1: []}
    for window in range(made.n_windows):
        row = made.row(window, np.random.default_rng(window))
        a, b = ({(token - 10) // 100 for token in part} for part in original(row))
        same[int(row["pair"])].append(a == b)
        again = made.row(window, np.random.default_rng(window))
        assert all(np.array_equal(row[name], again[name]) for name in row)
    assert all(same[0])
    assert not any(same[1])


def test_a_corpus_of_one_document_has_no_other(tmp_path: Path) -> None:
    tokens = np.concatenate(([EOS], np.arange(10, 990))).astype("<u2")
    tokens.tofile(tmp_path / "train-00000.bin")
    counts = {"train": len(tokens), "held_out": 0}
    prepared = Prepared(tmp_path, "", SIZE, EOS, counts, counts, {"train": 1, "held_out": 0}, None,
                        {"train": [len(tokens)], "held_out": []})  # fmt: skip
    made = rows(prepared, sentence="next")
    assert {int(made.row(0, np.random.default_rng(draw))["pair"]) for draw in range(20)} == {0, 1}


def test_order_swaps_the_segments(prepared: Prepared) -> None:
    made = rows(prepared, sentence="order")
    for window in range(50):
        row = made.row(window, np.random.default_rng(window))
        a, b = original(row)
        first, second = (a, b) if row["pair"] == 0 else (b, a)
        assert second[0] == first[-1] + 1


def test_whole_words_are_masked_together(prepared: Prepared) -> None:
    made = rows(prepared, sentence="none", whole_word=True)
    for window in range(30):
        row = made.row(window, np.random.default_rng(window))
        tokens, scored = np.where(row["targets"] != -100, row["targets"], row["tokens"]), row["targets"] != -100
        for i in range(2, len(tokens) - 1):
            if tokens[i] % 3:  # goes on with the word before
                assert scored[i] == scored[i - 1]


def test_a_steps_rows_do_not_depend_on_the_number_of_ranks(prepared: Prepared) -> None:
    def step(world_size: int) -> list[list[int]]:
        found = []
        for rank in range(world_size):
            share = Share(rank, world_size, 8, 2, seed=5)
            for batch in MaskedTrainLoader(rows(prepared), PAD, LENGTH, share).batches(11):
                real = batch["attention_mask"].sum(dim=1).tolist()
                found += [row[:n] for row, n in zip(batch["tokens"].tolist(), real, strict=True)]
        return sorted(found)

    assert step(1) == step(2) == step(4)
    loaders = [MaskedTrainLoader(rows(prepared), PAD, LENGTH, Share(rank, 2, 8, 2, seed=5)) for rank in range(2)]
    drawn = sample_windows(5, 11, 8, rows(prepared).n_windows).tolist()
    assert sorted(window for loader in loaders for part in loader.samples(11) for window in part) == sorted(drawn)


def test_evaluation_masks_alike_each_time_and_fills_up(prepared: Prepared) -> None:
    made = rows(prepared)
    share = Share(0, 2, 14, 7, 0)
    first, again = (
        [batch["tokens"].tolist() for batch in MaskedEvalLoader(made, PAD, LENGTH, share)] for _ in range(2)
    )
    assert first == again
    both = [batch for rank in (0, 1) for batch in MaskedEvalLoader(made, PAD, LENGTH, replace(share, rank=rank))]
    assert len(both) == 2 * len(first)
    assert sum(int((batch["pair"] != -100).sum()) for batch in both) == made.n_windows


def test_where_words_begin() -> None:
    pieces = {0: "play", 1: "##ing", 2: "[MASK]"}
    assert word_beginnings(pieces, 4).tolist() == [True, False, True, True]
    bytes_ = {0: "Ġplay", 1: "ing", 2: "(", 3: "Ċ"}
    assert word_beginnings(bytes_, 4).tolist() == [True, False, True, True]
