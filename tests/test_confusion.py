"""Counts by hand, and a picture that is one."""

from __future__ import annotations

import numpy as np
import pytest

from bigtrain import confusion


def test_counts_and_scores_of_each_label() -> None:
    counts = confusion.matrix([0, 0, 1, 1, 1], [0, 1, 1, 1, 0], 3)
    assert counts.tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    first, second, third = confusion.by_label(counts, ["a", "b", "c"])
    assert first == {"label": "a", "precision": 0.5, "recall": 0.5, "f1": 0.5, "examples": 2}
    assert second["f1"] == pytest.approx(2 / 3)
    assert third == {"label": "c", "precision": 0.0, "recall": 0.0, "f1": 0.0, "examples": 0}
    assert confusion.table([first, second, third]).splitlines()[1].split() == ["a", "0.5000", "0.5000", "0.5000", "2"]


@pytest.mark.parametrize("n_labels", [2, 60])
def test_the_picture_grows_with_the_labels(n_labels: int) -> None:
    counts = np.random.default_rng(0).integers(9, size=(n_labels, n_labels))
    png = confusion.picture(counts, [f"label {number}" for number in range(n_labels)])
    assert png.startswith(b"\x89PNG")
    width, height = np.frombuffer(png[16:24], dtype=">u4")
    assert width == height > 300
