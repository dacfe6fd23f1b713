"""Texts are changed as much as was asked for, within themselves, and never beyond recognition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bigtrain.config import ClassificationConfig
from bigtrain.data.example_loader import Rows
from bigtrain.tasks.augment import augmented

PAD, UNKNOWN, CLS, SEP = range(4)
SPECIAL = {PAD, UNKNOWN, CLS, SEP}


def pair(first: int, second: int) -> dict[str, Any]:
    """[CLS] first text [SEP] second text [SEP], all of whose tokens differ."""
    tokens = [CLS, *range(100, 100 + first), SEP, *range(500, 500 + second), SEP]
    types = [0] * (first + 2) + [1] * (second + 1)
    return {"tokens": np.array(tokens, dtype=np.int32), "token_types": np.array(types, dtype=np.int32), "label": 1}


def change(rows: Rows, seed: int = 0, **task: float) -> Rows:
    found = augmented(rows, ClassificationConfig(**task), SPECIAL, UNKNOWN, np.random.default_rng(seed))  # type: ignore[arg-type]
    assert [row["label"] for row in found] == [row["label"] for row in rows]
    return found


def test_nothing_asked_for_is_nothing_done() -> None:
    rows = [pair(5, 3)]
    assert change(rows) is rows


def test_tokens_change_places_within_their_text() -> None:
    row = pair(200, 100)
    (found,) = change([row], token_swap=0.3)
    assert np.array_equal(np.sort(found["tokens"][1:201]), row["tokens"][1:201])
    assert np.array_equal(np.sort(found["tokens"][202:302]), row["tokens"][202:302])
    assert 0.2 < (found["tokens"] != row["tokens"]).mean() < 0.4
    assert np.array_equal(found["token_types"], row["token_types"])


def test_deleted_tokens_are_gone_and_the_texts_marks_stay() -> None:
    row = pair(200, 100)
    (found,) = change([row], token_deletion=0.2)
    assert 220 < len(found["tokens"]) < 265
    assert len(found["token_types"]) == len(found["tokens"])
    assert list(found["tokens"][np.isin(found["tokens"], [CLS, SEP])]) == [CLS, SEP, SEP]
    own = found["tokens"][found["tokens"] >= 100]
    assert np.array_equal(own, np.sort(own))  # in their order
    assert not found["token_types"][(found["tokens"] >= 100) & (found["tokens"] < 500)].any()
    assert found["token_types"][found["tokens"] >= 500].all()


@pytest.mark.parametrize("seed", range(20))
def test_something_is_left_of_each_text(seed: int) -> None:
    (found,) = change([pair(2, 1)], seed, token_deletion=0.95)
    tokens = found["tokens"]
    assert ((tokens >= 100) & (tokens < 500)).any()
    assert (tokens >= 500).any()


def test_dropped_tokens_become_the_unknown_one() -> None:
    row = pair(200, 100)
    (found,) = change([row], token_dropout=0.1)
    differs = found["tokens"] != row["tokens"]
    assert 0.05 < differs.mean() < 0.16
    assert set(found["tokens"][differs]) == {UNKNOWN}


def test_the_file_behind_a_row_is_never_written_to() -> None:
    row = pair(50, 50)
    row["tokens"].setflags(write=False)
    before = row["tokens"].copy()
    one, other = (change([row], token_swap=0.5, token_dropout=0.2, token_deletion=0.2)[0] for _ in range(2))
    assert np.array_equal(row["tokens"], before)
    assert np.array_equal(one["tokens"], other["tokens"])  # by the generator alone
