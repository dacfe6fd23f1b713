"""SQuAD's metrics against numbers worked out by hand, and answers put together from windows."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bigtrain.config import Config, from_dict
from bigtrain.data.example_loader import Share
from bigtrain.data.prepare_examples import prepare_examples
from bigtrain.tasks import Totals, metrics
from bigtrain.tasks.question_answering import QuestionAnswering, best_spans


@pytest.mark.parametrize(
    ("predicted", "golds", "exact", "f1"),
    [
        ("The Eiffel  Tower!", ["eiffel tower"], 1, 1),  # case, article, punctuation, white space
        ("an apple a day", ["Apple day."], 1, 1),
        ("theatre", ["atre"], 0, 0),  # an article is a whole word
        ("well-known", ["well known"], 0, 0),  # punctuation goes without leaving a space
        ("in Paris, France", ["Paris"], 0, 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("red red blue", ["red blue blue"], 0, 2 / 3),  # a word counts as often as both have it
        ("Paris", ["London", "in Paris", "Paris!"], 1, 1),  # the best of the gold answers
        ("Paris", ["London", "in Paris"], 0, 2 / 3),
        ("", [], 1, 1),
        ("Paris", [], 0, 0),
        ("the", [], 1, 1),  # nothing is left of it
        ("", ["Paris"], 0, 0),
        ("", ["''"], 1, 1),  # a gold answer of which nothing is left: the official script takes "" for right
        ("x", ["''", "x"], 1, 1),
        ("", ["''", "x"], 0, 0),
    ],
)
def test_scores_are_the_official_scripts(predicted: str, golds: list[str], exact: float, f1: float) -> None:
    assert metrics.squad_scores(predicted, golds) == (exact, pytest.approx(f1))


def test_means_of_either_kind_of_question() -> None:
    margins = [-9, -8, 3, -7]  # no answer to the third alone
    found = metrics.question_answering([1, 0, 0, 0], [1, 0.5, 0, 0], [0, 0, 1, 1], [True, True, False, False], margins)
    assert found == {
        "eval/exact_match": 0.5,
        "eval/f1": 0.625,
        "eval/none_exact_match": 0.5,
        "eval/has_answer_exact_match": 0.5,
        "eval/has_answer_f1": 0.75,
        "eval/no_answer_accuracy": 0.5,
        "eval/best_exact": 0.75,
        "eval/best_exact_thresh": -9,
        "eval/best_f1": 0.875,
        "eval/best_f1_thresh": -8,
    }
    answerable = metrics.question_answering([1], [1], [0], [True], [-1])
    assert not any("no_answer" in name or "thresh" in name for name in answerable)
    assert "eval/has_answer_f1" not in metrics.question_answering([1], [1], [1], [False], [-1])


def test_the_best_threshold_is_that_of_trying_all() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        has = random.random(12) < 0.5
        has[0] = False
        exact = (has & (random.random(12) < 0.5)).astype(float)
        f1 = np.maximum(exact, has * random.random(12))
        margins = random.integers(-3, 4, 12).astype(float)  # with equals

        def measured(threshold: float, of: tuple[Any, ...] = (exact, f1, ~has, has, margins)) -> dict[str, float]:
            return metrics.question_answering(*of, threshold=threshold)

        tried = [measured(threshold) for threshold in np.arange(-5, 5)]
        found = measured(0.0)
        for name, of in (("exact_match", "exact"), ("f1", "f1")):
            best = found[f"eval/best_{of}"]
            assert best == pytest.approx(max(row[f"eval/{name}"] for row in tried))
            assert measured(found[f"eval/best_{of}_thresh"])[f"eval/{name}"] == pytest.approx(best)


@pytest.mark.parametrize("longest", [1, 3, 50])
def test_best_spans_are_those_of_trying_all(longest: int) -> None:
    logits = torch.randn(3, 9, 2, generator=torch.Generator().manual_seed(0))
    logits[1, 4:] = -torch.inf
    scores, starts, ends = best_spans(logits, longest, 6)
    for row in range(3):
        tried = {
            (i, j): float(logits[row, i, 0] + logits[row, j, 1])
            for i in range(9)
            for j in range(i, min(i + longest, 9))
        }
        best = sorted(tried.values(), reverse=True)[:6]
        assert scores[row].tolist() == pytest.approx(best)
        for score, i, j in zip(scores[row].tolist(), starts[row].tolist(), ends[row].tolist(), strict=True):
            assert score == -np.inf or tried[i, j] == pytest.approx(score)


# ------------------------------------------------------------------------------------------------ the task

FILLER = "grey stones lie on the long road "
ROWS = [
    ("short", "The fox is red today.", "red"),
    ("late", FILLER * 8 + "and the fox is red today.", "red"),
    ("none", FILLER * 8 + "and nothing else.", None),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("questions")
    for name in ("train", "held_out"):
        with open(folder / f"{name}.jsonl", "w") as file:
            for key, context, answer in ROWS:
                answers = [] if answer is None else [{"text": answer, "start": context.index(answer)}]
                row = {"id": key, "question": "What colour?", "context": context, "answers": answers}
                file.write(json.dumps(row) + "\n")
    made = from_dict(
        {
            "model": {"kind": "encoder", "dim": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 40, "vocab_size": 400},
            "task": {"kind": "question_answering", "stride": 8, "max_answer_length": 4},
            "data": {
                "kind": "labelled", "path": str(folder / "train.jsonl"), "cache_dir": str(folder / "cache"),
                "held_out_path": str(folder / "held_out.jsonl"), "tokenizer": {"vocab_size": 400},
            },
            "logger": {"progress": False},
        }
    )  # fmt: skip
    made.data.prepared_dir = str(prepare_examples(made).directory)
    return made


class Told(nn.Module):
    """Knows some tokens: gives logits (start, end) at each of them, and (0, 0) everywhere else."""

    def __init__(self, logits: dict[int, tuple[float, float]]) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, tokens: Tensor, attention_mask: Tensor, token_types: Tensor) -> Tensor:
        made = torch.zeros(*tokens.shape, 2)
        for token, pair in self.logits.items():
            made[tokens == token] = torch.tensor(pair)
        return made


def asked(config: Config, red: float, cls: float, ranks: int = 1) -> tuple[dict[str, float], dict[str, Any]]:
    """(metrics, row of the predictions by question) of a model that scores "red" and [CLS] so."""
    from tokenizers import Tokenizer

    task = QuestionAnswering(config)
    tokenizer = Tokenizer.from_file(str(task.tokenizer_file))
    (word,) = tokenizer.encode(" red", add_special_tokens=False).ids
    model = Told({word: (red, red), task.special_ids["cls"]: (cls, cls), task.special_ids["sep"]: (99.0, 99.0)})
    nll, targets = 0.0, 0
    predictions: dict[int, Any] = {}
    for rank in range(ranks):
        for batch in task.held_out(Share(rank, ranks, 4, 2, 0)):
            found = task.evaluate(model, batch)
            nll, targets = nll + float(found.nll), targets + task.count_targets(batch)
            predictions |= dict(found.predictions)
    totals = Totals(nll, targets, {}, task.joined(predictions))
    names = [record["id"] for record in task.data.held_out_records()]
    rows = {names[record]: task.prediction(row) for record, row in totals.predictions.items()}
    return task.metrics(totals), rows


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_answer_is_found_in_any_window(config: Config, ranks: int) -> None:
    found, rows = asked(config, red=5.0, cls=2.0, ranks=ranks)
    assert {name: row["prediction"] for name, row in rows.items()} == {"short": "red", "late": "red", "none": ""}
    assert found["eval/exact_match"] == found["eval/f1"] == 1
    assert found["eval/none_exact_match"] == pytest.approx(1 / 3)
    best = rows["late"]["n_best"][0]
    assert ROWS[1][1][best["start"] :].startswith("red")
    assert best["probability"] == rows["late"]["probability"] > 0.9
    assert len(rows["none"]["n_best"]) == 5


def test_no_answer_wins_where_every_window_is_for_it(config: Config) -> None:
    found, rows = asked(config, red=1.0, cls=2.0)
    assert [row["prediction"] for row in rows.values()] == [""] * 3
    assert found["eval/exact_match"] == found["eval/none_exact_match"]
    assert found["eval/has_answer_f1"] == 0
    assert found["eval/no_answer_accuracy"] == 1


def test_the_threshold_says_how_much_higher_no_answer_has_to_score(config: Config) -> None:
    def answers(threshold: float) -> tuple[dict[str, float], dict[str, str]]:
        told = replace(config, task=replace(config.task, no_answer_threshold=threshold))
        found, rows = asked(told, red=1.0, cls=2.0)  # no answer scores 4, red 2, any other span 0
        return found, {name: row["prediction"] for name, row in rows.items()}

    assert set(answers(1.5)[1].values()) == {""}
    found, given = answers(2.0)
    assert given == {"short": "red", "late": "red", "none": ""}
    assert found["eval/exact_match"] == found["eval/best_exact"] == found["eval/best_f1"] == 1
    assert found["eval/best_exact_thresh"] == found["eval/best_f1_thresh"] == 2
    assert answers(4.0)[1]["none"]


def test_the_loss_is_over_what_can_be_an_answer(config: Config) -> None:
    """[SEP], which the model scores highest, is none; nor is padding, nor the question."""
    task = QuestionAnswering(config)
    model = Told({task.special_ids["sep"]: (99.0, 99.0), task.special_ids["pad"]: (99.0, 99.0)})
    for batch in task.held_out(Share(0, 1, 2, 2, 0)):
        scored = batch["index"] >= 0
        candidates = batch["context"].sum(1)[scored] + 1
        loss, nll = task.loss(model, batch)
        assert float(loss) == float(nll) == pytest.approx(float(candidates.log().sum()))


def test_filler_counts_for_nothing(config: Config) -> None:
    task = QuestionAnswering(config)
    rows = [dict(task._examples[0]) | {"index": np.asarray(index)} for index in (0, -1)]
    both, alone = task.collate(rows, None), task.collate(rows[:1], None)
    assert task.count_targets(both) == 1
    assert float(task.loss(Told({}), both).loss) == pytest.approx(float(task.loss(Told({}), alone).loss))
    assert [index for index, _ in task.evaluate(Told({}), both).predictions] == [0]


def test_a_model_learns_where_the_answer_is(config: Config) -> None:
    torch.manual_seed(0)
    task = QuestionAnswering(config)
    model = task.build_model(config.model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loader = task.train_loader(Share(0, 1, 4, 4, 0))
    losses = []
    for step in range(30):
        (batch,) = loader.batches(step)
        loss = task.loss(model, batch).loss / task.count_targets(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
