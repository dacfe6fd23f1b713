"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import pytest

from bigtrain import confusion
from bigtrain.tasks import metrics


def test_classification() -> None:
    found = metrics.classification([1, 1, 0, 0, 1], [1, 0, 0, 1, 1], 2)
    assert found["eval/accuracy"] == pytest.approx(3 / 5)
    assert found["eval/majority"] == pytest.approx(3 / 5)
    assert found["eval/precision"] == pytest.approx(2 / 3)
    assert found["eval/recall"] == pytest.approx(2 / 3)
    assert found["eval/f1"] == pytest.approx(2 / 3)
    assert found["eval/f1_macro"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found["eval/f1_micro"] == pytest.approx(3 / 5)
    assert found["eval/matthews"] == pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)


def test_a_label_that_never_comes_up_counts_in_the_macro_average() -> None:
    found = metrics.classification([0, 1], [0, 1], 4)
    assert found["eval/f1_macro"] == pytest.approx(2 / 4)
    assert "eval/f1" not in found


def test_regression() -> None:
    found = metrics.regression([1.0, 2.0, 3.0, 10.0], [2.0, 4.0, 6.0, 7.0])
    assert found["eval/spearman"] == pytest.approx(1.0)
    assert found["eval/pearson"] == pytest.approx(22 / (50 * 14.75) ** 0.5)
    assert found["eval/mean_squared_error"] == pytest.approx((1 + 4 + 9 + 9) / 4)
    tied = metrics.regression([1.0, 1.0, 2.0], [1.0, 2.0, 3.0])
    assert tied["eval/spearman"] == pytest.approx(0.866, abs=1e-3)
    assert metrics.regression([1.0, 1.0], [1.0, 2.0])["eval/pearson"] == 0.0


def test_entities_count_whole() -> None:
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG"]]
    predicted = [["B-PER", "O", "O", "B-LOC"], ["B-ORG", "B-ORG"]]
    found = metrics.tagging(predicted, true)
    assert found["eval/accuracy"] == pytest.approx(4 / 6)
    assert found["eval/precision"] == pytest.approx(2 / 4)
    assert found["eval/recall"] == pytest.approx(2 / 3)
    assert found["eval/f1"] == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))


def test_entities_are_counted_whole_and_by_type() -> None:
    """The numbers of seqeval's own table."""
    from seqeval.metrics import classification_report

    true = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "I-LOC", "O"]]
    predicted = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "I-LOC", "B-ORG"]]
    report = classification_report(true, predicted, output_dict=True, zero_division=0)
    rows = metrics.entities(predicted, true)
    assert [(row["label"], row["entities"]) for row in rows] == [("LOC", 2), ("ORG", 0), ("PER", 1)]
    for row in rows:
        of_type = report[row["label"]]
        assert (row["precision"], row["recall"], row["f1"]) == tuple(
            of_type[name] for name in ("precision", "recall", "f1-score")
        )
    assert confusion.table(rows).splitlines()[0].split() == ["label", "precision", "recall", "F1", "entities"]
