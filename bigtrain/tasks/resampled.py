"""Metrics of samples that are drawn from a held-out set, hundreds of them, for confidence intervals.

What an example adds to a metric is counted once, by the libraries of metrics.py; a sample then only sums. Each function
here returns one that takes the places of a sample's examples in the set, (n,), and gives the metrics that metrics.py
would give of these examples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Resampled = Callable[[np.ndarray], dict[str, float]]


def classification(predicted: Sequence[int], true: Sequence[int], n_labels: int) -> Resampled:
    """The table of true and predicted labels has all that these metrics are made of."""
    cells = np.asarray(true) * n_labels + np.asarray(predicted)

    def metrics(chosen: np.ndarray) -> dict[str, float]:
        table = np.bincount(cells[chosen], minlength=n_labels**2).reshape(n_labels, n_labels).astype(float)
        right, were, said, n = np.diag(table), table.sum(1), table.sum(0), float(len(chosen))
        precision, recall = _ratio(right, said), _ratio(right, were)
        f1 = _ratio(2 * right, were + said)
        accuracy = float(right.sum() / n)
        apart = np.sqrt((n**2 - said @ said) * (n**2 - were @ were))
        result = {
            "eval/accuracy": accuracy,
            "eval/majority": float(were.max() / n),
            # Gorodkin 2004, as scikit-learn has it.
            "eval/matthews": float((right.sum() * n - were @ said) / apart) if apart > 0 else 0.0,
        }
        for name, scores in (("precision", precision), ("recall", recall), ("f1", f1)):
            result |= {f"eval/{name}_macro": float(scores.mean()), f"eval/{name}_micro": accuracy}
            if n_labels == 2:
                result[f"eval/{name}"] = float(scores[1])
        return result

    return metrics


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where there is nothing."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def tagging(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> Resampled:
    from seqeval.metrics.sequence_labeling import get_entities

    def counts(p: Sequence[str], t: Sequence[str]) -> list[int]:
        found, wanted = set(get_entities(list(p))), set(get_entities(list(t)))
        return [len(found & wanted), len(found), len(wanted), sum(a == b for a, b in zip(p, t, strict=True)), len(t)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sentences = np.array([counts(p, t) for p, t in zip(predicted, true, strict=True)], dtype=float)

    def metrics(chosen: np.ndarray) -> dict[str, float]:
        right, found, wanted, right_tags, tags = _summed(sentences, chosen)
        return {
            "eval/accuracy": right_tags / tags,
            "eval/precision": right / found if found else 0.0,
            "eval/recall": right / wanted if wanted else 0.0,
            "eval/f1": 2 * right / (found + wanted) if found + wanted else 0.0,
        }

    return metrics


def translation(predicted: Sequence[str], true: Sequence[str], sources: Sequence[str]) -> Resampled:
    """By the statistics of single sentences that sacrebleu's own significance tests sum."""
    from sacrebleu.metrics import BLEU, CHRF

    scorers: list[tuple[str, Any, Sequence[str]]] = [
        ("eval/bleu", BLEU(force=True), predicted),
        ("eval/chrf", CHRF(), predicted),
        ("eval/copy_bleu", BLEU(force=True), sources),
    ]
    counted = [
        (name, scorer, np.array(scorer._extract_corpus_statistics(texts, [list(true)]), dtype=float))
        for name, scorer, texts in scorers
    ]

    def metrics(chosen: np.ndarray) -> dict[str, float]:
        return {
            name: float(scorer._compute_score_from_stats(_summed(sentences, chosen)).score)
            for name, scorer, sentences in counted
        }

    return metrics


def _summed(rows: np.ndarray, chosen: np.ndarray) -> list[float]:
    """Sums of the columns over the chosen rows (n, columns)."""
    sums: list[float] = (np.bincount(chosen, minlength=len(rows)) @ rows).tolist()
    return sums


def columns(of: Callable[..., dict[str, float]], **values: Sequence[float]) -> Resampled:
    """`of` takes arrays of what there is of each example, and is quick already."""
    arrays = {name: np.asarray(column) for name, column in values.items()}
    return lambda chosen: of(**{name: column[chosen] for name, column in arrays.items()})
