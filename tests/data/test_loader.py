"""Batches: every token once, the same at any world size, boundaries of documents where they are asked for."""

from __future__ import annotations

import json
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from bigtrain.batch import IGNORED
from bigtrain.data import Prepared, TokenShards, load_prepared
from bigtrain.data.loader import EvalLoader, TrainLoader
from bigtrain.data.sampler import sample_windows
from bigtrain.data.shards import FORMAT, token_dtype

EOS, VOCAB, T = 0, 70_000, 16


def write_prepared(directory: Path, train: list[int], held_out: list[int], vocab_size: int = VOCAB) -> Prepared:
    """Shards with given token counts; token i of a split is i + 1, but <eos> at every 13th place."""
    directory.mkdir(exist_ok=True)
    for split, counts in (("train", train), ("held_out", held_out)):
        tokens = np.arange(1, sum(counts) + 1)
        tokens[::13] = EOS
        for number, part in enumerate(np.split(tokens, np.cumsum(counts)[:-1])):
            part.astype(token_dtype(vocab_size)).tofile(directory / f"{split}-{number:05d}.bin")
    totals = {"train": sum(train), "held_out": sum(held_out)}
    meta = {
        "format": FORMAT,
        "fingerprint": "f",
        "vocab_size": vocab_size,
        "eos_id": EOS,
        "tokens": totals,
        "bytes": totals,
        "documents": totals,
        "gzip_bits_per_byte": None,
        "shards": {"train": train, "held_out": held_out},
    }
    (directory / "meta.json").write_text(json.dumps(meta))
    return load_prepared(directory)


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return write_prepared(tmp_path / "p", [100, 1, 333, 66], [50, 7, 40])


@pytest.mark.parametrize("vocab_size", [60_000, 70_000])
def test_windows_cross_shards(tmp_path: Path, vocab_size: int) -> None:
    prepared = write_prepared(tmp_path / "p", [5, 1, 20, 3], [40], vocab_size)
    shards = TokenShards(prepared, "train")
    assert len(shards) == 29
    whole = shards.window(0, 29)
    assert whole.dtype == (np.uint16 if vocab_size == 60_000 else np.uint32)
    assert whole.tolist() == [EOS if i % 13 == 0 else i + 1 for i in range(29)]
    for start in range(29):
        for length in range(1, 31 - start):
            assert shards.window(start, length).tolist() == whole[start : start + length].tolist()


def test_targets_are_the_next_tokens(prepared: Prepared) -> None:
    loader = TrainLoader(prepared, T, 4, 2, 0, 0, 1)
    stream = TokenShards(prepared, "train").window(0, 500)
    windows = sample_windows(0, 3, 4, loader.n_windows)
    batches = loader.batches(3)
    assert loader.samples(3) == windows.reshape(2, 2).tolist()
    assert [batch["tokens"].shape for batch in batches] == [(2, T), (2, T)]
    for row, window in enumerate(windows.tolist()):
        batch, at = batches[row // 2], row % 2
        assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64
        assert batch["tokens"][at].tolist() == stream[window * T : window * T + T].tolist()
        assert batch["targets"][at].tolist() == stream[window * T + 1 : window * T + T + 1].tolist()
    assert set(batches[0]) == {"tokens", "targets"}


def test_an_epoch_targets_every_token_once(prepared: Prepared) -> None:
    loader = TrainLoader(prepared, T, 1, 1, 0, 0, 1)
    assert loader.n_windows == 499 // T
    seen = [t for step in range(loader.n_windows) for t in loader.batches(step)[0]["targets"].flatten().tolist()]
    assert Counter(seen) == Counter(TokenShards(prepared, "train").window(1, loader.n_windows * T).tolist())


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_global_order_is_the_same_at_any_world_size(prepared: Prepared, world_size: int, micro_batch: int) -> None:
    for step in (5, 0):
        reference = TrainLoader(prepared, T, 8, 8, 1, 0, 1).batches(step)[0]["tokens"]
        ranks = [TrainLoader(prepared, T, 8, micro_batch, 1, rank, world_size) for rank in range(world_size)]
        parts = [batch["tokens"] for loader in ranks for batch in loader.batches(step)]
        assert all(len(part) == micro_batch for part in parts)
        assert torch.equal(torch.cat(parts), reference)


def test_every_sample_is_seen_once_from_two_ranks_to_one_to_four(prepared: Prepared) -> None:
    """Through changes of ranks, micro-batch and then of the global batch too: the windows of one uninterrupted run."""
    seen: list[bytes] = []
    phases = [(range(2), 2, 8, 0), (range(2, 4), 1, 8, 0), (range(4, 6), 4, 8, 0), (range(6, 8), 2, 4, 48 - 6 * 4)]
    for steps, world_size, batch, shift in phases:
        for step in steps:
            for rank in range(world_size):
                loader = TrainLoader(prepared, T, batch, 1, 1, rank, world_size, shift=shift)
                seen += [part["tokens"].numpy().tobytes() for part in loader.batches(step)]
    whole = TrainLoader(prepared, T, 8, 1, 1, 0, 1)
    assert seen == [part["tokens"].numpy().tobytes() for step in range(7) for part in whole.batches(step)]


def test_a_step_is_the_same_whatever_was_read_before(prepared: Prepared) -> None:
    loader = TrainLoader(prepared, T, 4, 2, 0, 0, 1)
    for step in (0, 1, 2, 9, 10, 3, 3):
        for one, two in zip(loader.batches(step), TrainLoader(prepared, T, 4, 2, 0, 0, 1).batches(step), strict=True):
            assert torch.equal(one["targets"], two["targets"])


def test_document_ids_change_at_eos(prepared: Prepared) -> None:
    for batch in TrainLoader(prepared, T, 8, 8, 0, 0, 1, isolate_documents=True).batches(0):
        for tokens, ids in zip(batch["tokens"].tolist(), batch["document_ids"].tolist(), strict=True):
            number = 0
            for token, document in zip(tokens, ids, strict=True):
                number += token == EOS
                assert document == number


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
@pytest.mark.parametrize("held_out", [[50, 7, 40], [17], [33], [2]])
def test_evaluation_scores_each_token_but_the_first_once(
    tmp_path: Path, world_size: int, micro_batch: int, held_out: list[int]
) -> None:
    prepared = write_prepared(tmp_path / "p", [100], held_out)
    stream = TokenShards(prepared, "held_out").window(0, sum(held_out)).tolist()
    loaders = [EvalLoader(prepared, T, micro_batch, rank, world_size) for rank in range(world_size)]
    scored: list[tuple[int, int]] = []
    for loader in loaders:
        batches = list(loader)
        assert len(batches) == len(loader) == len(loaders[0])
        for batch in batches:
            assert batch["tokens"].shape == batch["targets"].shape == (micro_batch, T)
            assert (batch["tokens"] >= 0).all(), "padding is a token that the embedding has"
            keep = batch["targets"] != IGNORED
            scored += zip(batch["tokens"][keep].tolist(), batch["targets"][keep].tolist(), strict=True)
    assert Counter(scored) == Counter(pairwise(stream))


def test_some_batches_of_an_evaluation_are_spread_out(tmp_path: Path) -> None:
    prepared = write_prepared(tmp_path / "p", [100], [T * 40 + 1])
    some = list(EvalLoader(prepared, T, 1, 0, 2, max_batches=4))
    assert [int(batch["targets"][0, 1]) // T for batch in some] == [0, 10, 20, 30]
    assert len(EvalLoader(prepared, T, 1, 0, 2, max_batches=100)) == 20
    isolated = EvalLoader(prepared, T, 1, 0, 2, isolate_documents=True)
    assert all("document_ids" in batch for batch in isolated)


def test_batch_that_does_not_divide(prepared: Prepared) -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        TrainLoader(prepared, T, 6, 2, 0, 0, 2)


def test_the_loader_is_never_the_bottleneck(tmp_path: Path) -> None:
    """2M tokens/s per rank at T=512; the best of some tries, as other processes may have the cores."""
    prepared = write_prepared(tmp_path / "p", [3_000_000], [1000])
    loader = TrainLoader(prepared, 512, 32, 8, 0, 0, 1, isolate_documents=True)
    best, step = 0.0, 0
    for _ in range(30):
        start = time.perf_counter()
        for _ in range(10):
            loader.batches(step)
            step += 1
        best = max(best, 10 * 32 * 512 / (time.perf_counter() - start))
        if best > 2e6:
            break
    assert best > 2e6
