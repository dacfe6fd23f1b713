"""Metrics of labelled tasks, by the libraries that the field compares itself by (scikit-learn, seqeval, sacrebleu)."""

from __future__ import annotations

import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np


def classification(predicted: Sequence[int], true: Sequence[int], n_labels: int) -> dict[str, float]:
    """Accuracy, precision, recall and F1 (macro; of two labels also of the second alone), Matthews correlation.

    `eval/majority` is the accuracy of always saying the most frequent true label.
    """
    from sklearn.metrics import matthews_corrcoef, precision_recall_fscore_support

    labels = list(range(n_labels))
    result = {
        "eval/accuracy": float(np.mean(np.equal(predicted, true))),
        "eval/majority": float(np.bincount(true).max() / len(true)),
        "eval/matthews": float(matthews_corrcoef(true, predicted)),
    }
    for average in ("macro", "micro"):
        scores = precision_recall_fscore_support(true, predicted, labels=labels, average=average, zero_division=0)
        result |= {f"eval/{name}_{average}": float(score) for name, score in zip(_SCORES, scores, strict=False)}
    if n_labels == 2:
        scores = precision_recall_fscore_support(true, predicted, average="binary", zero_division=0)
        result |= {f"eval/{name}": float(score) for name, score in zip(_SCORES, scores, strict=False)}
    return result


_SCORES = ("precision", "recall", "f1")


def regression(predicted: Sequence[float], true: Sequence[float]) -> dict[str, float]:
    """Pearson and Spearman correlation (0 where one side is constant) and the mean squared error."""
    p, t = np.asarray(predicted), np.asarray(true)

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0

    return {
        "eval/pearson": correlation(p, t),
        "eval/spearman": correlation(_ranks(p), _ranks(t)),
        "eval/mean_squared_error": float(np.mean((p - t) ** 2)),
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties sharing their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[inverse]


def tagging(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole entities as conlleval counts them (micro), and accuracy of single tags.

    Tags are in a scheme with B- and I- (or none at all: then each run of one tag is an entity).
    """
    from seqeval.metrics import f1_score, precision_score, recall_score

    pairs = [(p, t) for ps, ts in zip(predicted, true, strict=True) for p, t in zip(ps, ts, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tags that are no BIO are said to be so for each of them
        return {
            "eval/accuracy": float(np.mean([p == t for p, t in pairs])),
            "eval/precision": float(precision_score(true, predicted, zero_division=0)),
            "eval/recall": float(recall_score(true, predicted, zero_division=0)),
            "eval/f1": float(f1_score(true, predicted, zero_division=0)),
        }


def entities(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and number of whole entities of each type, as seqeval's classification_report has them."""
    from seqeval.metrics import classification_report

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = classification_report(true, predicted, output_dict=True, zero_division=0)
    return [
        {"label": name, "precision": float(row["precision"]), "recall": float(row["recall"]),
         "f1": float(row["f1-score"]), "entities": int(row["support"])}
        for name, row in found.items() if not name.endswith(" avg")
    ]  # fmt: skip


def squad_scores(predicted: str, golds: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1 of words) of one answer, of the gold ones with the best of each, as SQuAD 2.0's official
    evaluate-v2.0.py counts them (arXiv 1806.03822). No golds: there is no answer, and "" says so.

    As there, golds that are nothing but articles and punctuation do not count, and if all are, "" is right.
    """
    wanted = [words for gold in golds if (words := _answer_words(gold))] or [[]]
    found = _answer_words(predicted)
    return float(found in wanted), max(_overlap(found, words) for words in wanted)


def _answer_words(text: str) -> list[str]:
    """Lower case, without punctuation, then without articles, split at white space."""
    plain = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


_PUNCTUATION = frozenset(string.punctuation)


def _overlap(found: list[str], wanted: list[str]) -> float:
    """F1 of two bags of words; where one is empty, whether both are."""
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def question_answering(
    exact: Sequence[float],
    f1: Sequence[float],
    exact_of_none: Sequence[float],
    answerable: Sequence[bool],
    margin: Sequence[float],
    threshold: float = 0.0,
) -> dict[str, float]:
    """Means, over all questions and over those that have an answer or none, of what `squad_scores` gave of each.

    exact, f1: what it gave of the best span; exact_of_none: of "", which is the answer where no answer's score is by a
    margin above `threshold` higher than that span's. `eval/none_exact_match` is the exact match of never giving an
    answer. Where some questions have none, also the means at the threshold that is best for these questions, and that
    threshold, by the official script's names.
    """
    exacts, f1s, nones = np.asarray(exact), np.asarray(f1), np.asarray(exact_of_none)
    margins, has = np.asarray(margin), np.asarray(answerable, dtype=bool)
    given_exact, given_f1 = (np.where(margins > threshold, nones, scores) for scores in (exacts, f1s))
    result = {
        "eval/exact_match": float(given_exact.mean()),
        "eval/f1": float(given_f1.mean()),
        "eval/none_exact_match": float(nones.mean()),
    }
    if has.any():
        result["eval/has_answer_exact_match"] = float(given_exact[has].mean())
        result["eval/has_answer_f1"] = float(given_f1[has].mean())
    if not has.all():
        result["eval/no_answer_accuracy"] = float(given_exact[~has].mean())
        for name, scores in (("exact", exacts), ("f1", f1s)):
            best, at = _best_threshold(scores, nones, margins)
            result |= {f"eval/best_{name}": best, f"eval/best_{name}_thresh": at}
    return result


def _best_threshold(scores: np.ndarray, nones: np.ndarray, margins: np.ndarray) -> tuple[float, float]:
    """(the highest mean that a threshold gives, the lowest that does): evaluate-v2.0.py's find_best_thresh."""
    order = np.argsort(margins, kind="stable")
    ascending = margins[order]
    means = (nones.sum() + np.cumsum((scores - nones)[order])) / len(scores)  # the span given up to here, then none
    means[:-1][ascending[1:] == ascending[:-1]] = -np.inf  # no threshold lies between equals
    best = int(means.argmax())
    if means[best] <= nones.mean():
        return float(nones.mean()), float(ascending[0] - 1)  # none to all
    return float(means[best]), float(ascending[best])


def translation(predicted: Sequence[str], true: Sequence[str], sources: Sequence[str]) -> dict[str, float]:
    """BLEU (Papineni et al. 2002) and chrF (Popovic 2015) of the whole set, from 0 to 100, as sacrebleu
    (arXiv 1804.08771) has them. `eval/copy_bleu` is the BLEU of giving every source back as it is."""
    from sacrebleu import corpus_bleu, corpus_chrf

    # force: no warning for texts that look tokenized.
    return {
        "eval/bleu": float(corpus_bleu(predicted, [true], force=True).score),
        "eval/chrf": float(corpus_chrf(predicted, [true]).score),
        "eval/copy_bleu": float(corpus_bleu(sources, [true], force=True).score),
    }
