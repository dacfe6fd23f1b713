"""Metrics of drawn samples are those that the libraries give of the same examples."""

from __future__ import annotations

import numpy as np
import pytest

from bigtrain.tasks import metrics, resampled

WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", ",", ".", "red", "blue", "ran"]


def agree(found: dict[str, float], wanted: dict[str, float]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name  # sacrebleu's own sums are as they are


@pytest.mark.parametrize("n_labels", [2, 5])
def test_classification(n_labels: int) -> None:
    random = np.random.default_rng(0)
    true = random.integers(n_labels, size=60)
    predicted = np.where(random.random(60) < 0.6, true, random.integers(n_labels, size=60))
    of = resampled.classification(predicted.tolist(), true.tolist(), n_labels)
    one_sided = [np.flatnonzero(true == 0), np.flatnonzero(predicted == 1), np.array([3])]
    for chosen in [np.arange(60), *(random.integers(60, size=60) for _ in range(20)), *one_sided]:
        wanted = metrics.classification(predicted[chosen].tolist(), true[chosen].tolist(), n_labels)
        agree(of(chosen), wanted)


def test_tagging() -> None:
    random = np.random.default_rng(0)
    tags = np.array(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"])
    true = [tags[random.integers(5, size=n)].tolist() for n in random.integers(1, 9, size=40)]
    predicted = [[t if random.random() < 0.8 else str(random.choice(tags)) for t in row] for row in true]
    of = resampled.tagging(predicted, true)
    nothing = [i for i, row in enumerate(true) if set(row) == {"O"}] or [0]
    for chosen in [np.arange(40), *(random.integers(40, size=40) for _ in range(20)), np.array(nothing)]:
        agree(of(chosen), metrics.tagging([predicted[i] for i in chosen], [true[i] for i in chosen]))


def test_translation() -> None:
    random = np.random.default_rng(0)
    true = [" ".join(random.choice(WORDS, size=n)) for n in random.integers(1, 14, size=50)]
    written = [" ".join(word for word in text.split() if random.random() < 0.8) for text in true]
    sources = [text[::-1] for text in true]
    of = resampled.translation(written, true, sources)
    for chosen in [np.arange(50), *(random.integers(50, size=50) for _ in range(10)), np.array([0])]:
        picked = ([texts[i] for i in chosen] for texts in (written, true, sources))
        agree(of(chosen), metrics.translation(*picked))


def test_questions_and_numbers_are_counted_as_ever() -> None:
    random = np.random.default_rng(0)
    columns = {
        "exact": random.integers(2, size=30).astype(float), "f1": random.random(30),
        "exact_of_none": random.integers(2, size=30).astype(float),
        "answerable": random.random(30) < 0.7, "margin": random.normal(size=30),
    }  # fmt: skip
    of = resampled.columns(metrics.question_answering, **columns)
    sides = {"predicted": random.normal(size=30), "true": random.normal(size=30)}
    of_numbers = resampled.columns(metrics.regression, **sides)
    for chosen in (random.integers(30, size=30) for _ in range(5)):
        wanted = metrics.question_answering(**{name: column[chosen].tolist() for name, column in columns.items()})
        agree(of(chosen), wanted)
        agree(of_numbers(chosen), metrics.regression(*(side[chosen] for side in sides.values())))
