"""Which labels a classifier takes for which: a table by label, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigtrain.pages import INK, png

# Where `bigtrain evaluate` leaves what it found of a run, unless it is told otherwise, and `bigtrain report` looks.
EVALUATION, METRICS, CONFUSION = "evaluation", "metrics.json", "confusion.png"
MOST_NUMBERS = 20  # labels, up to which the picture's cells have their counts written in them
DPI = 110


def matrix(predicted: Sequence[int], true: Sequence[int], n_labels: int) -> NDArray[np.int64]:
    """(n_labels, n_labels): how many examples of the row's label were given the column's."""
    counts = np.zeros((n_labels, n_labels), dtype=np.int64)
    np.add.at(counts, (np.asarray(true), np.asarray(predicted)), 1)
    return counts


def by_label(counts: NDArray[np.int64], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 (0 where there is nothing to divide by) and number of examples of each label."""
    rows = []
    for number, label in enumerate(labels):
        right, given, there = int(counts[number, number]), int(counts[:, number].sum()), int(counts[number].sum())
        precision, recall = right / given if given else 0.0, right / there if there else 0.0
        f1 = 2 * right / (given + there) if given + there else 0.0
        rows.append({"label": label, "precision": precision, "recall": recall, "f1": f1, "examples": there})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """What `by_label` gives, or a task's own table of whole entities, a line each."""
    width, counted = max([len("label"), *(len(row["label"]) for row in rows)]), what_is_counted(rows)
    lines = [f"{'label':{width}s}  precision  recall      F1  {counted}"]
    lines += [
        f"{row['label']:{width}s}  {row['precision']:9.4f}  {row['recall']:6.4f}  {row['f1']:6.4f}  {row[counted]:8}"
        for row in rows
    ]
    return "\n".join(lines)


def what_is_counted(rows: list[dict[str, Any]]) -> str:
    return "entities" if rows and "entities" in rows[0] else "examples"


def picture(counts: NDArray[np.int64], labels: Sequence[str]) -> bytes:
    """The matrix as a PNG: darker is a larger share of the row's examples."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = 3.0 + 0.45 * min(len(labels), 40)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.grid(visible=False)
        axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        if len(labels) <= MOST_NUMBERS:
            for (row, column), count in np.ndenumerate(counts):
                colour = "white" if shares[row, column] > 0.5 else INK
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=colour)

    return png((size, size), draw, DPI, formulas=False)
