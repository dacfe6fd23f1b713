"""Pairs of texts: a label or a number of each, learned from a file, measured, and how sure the measure is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigtrain import evaluate
from bigtrain.config import from_dict
from bigtrain.data.example_loader import Share
from bigtrain.data.prepare_examples import prepare_examples
from bigtrain.tasks.classification import Classification

WORDS = 8  # of a text, each of which is up or down


def pairs(path: Path, regression: bool) -> Path:
    """What is asked is in neither text alone: how far apart the two are, or which of them has more."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(700):
        a, b = (random.permutation(["up"] * n + ["down"] * (WORDS - n)) for n in random.integers(0, WORDS + 1, 2))
        more = (a == "up").sum() - (b == "up").sum()
        label: Any = float(more) / WORDS if regression else "first" if more > 0 else "second"
        rows.append({"text": " ".join(a), "text_pair": " ".join(b), "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("regression", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_pairs_are_learned(regression: bool, tmp_path: Path) -> None:
    config = from_dict(
        {
            "model": {"kind": "encoder", "dim": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 40, "vocab_size": 320},
            "task": {"kind": "classification", "regression": regression, "dropout": 0.0},
            "data": {
                "kind": "labelled", "path": str(pairs(tmp_path / "pairs.jsonl", regression)), "held_out": 0.3,
                "cache_dir": str(tmp_path / "cache"), "tokenizer": {"vocab_size": 300},
            },
            "logger": {"progress": False},
        }
    )  # fmt: skip
    config.data.prepared_dir = str(prepare_examples(config).directory)
    task = Classification(config)
    assert task.labels == ([] if regression else ["first", "second"])
    torch.manual_seed(0)
    model = task.build_model(config.model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loader = task.train_loader(Share(0, 1, 32, 32, 0))
    for step in range(500 if regression else 150):
        (batch,) = loader.batches(step)
        (task.loss(model, batch).loss / task.count_targets(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    totals = evaluate.measure(task, model.eval(), Share(0, 1, 32, 32, 0), torch.device("cpu"))
    found = task.metrics(totals)
    if not regression:
        assert found["eval/accuracy"] > found["eval/majority"] + 0.2
        assert found["eval/matthews"] > 0.5
        return
    assert found["eval/pearson"] > 0.75  # of one text alone: 0.71
    assert found["eval/mean_squared_error"] == pytest.approx(found["eval/loss"])
    assert all(task.prediction(row) == {"prediction": row[0]} for row in totals.predictions.values())

    # The interval is about Fisher's (1915): the inverse hyperbolic tangent of r is normal with variance 1/(n - 3).
    interval = evaluate.intervals(task, totals, seed=0)
    r, n = found["eval/pearson"], len(totals.predictions)
    low, high = (math.tanh(math.atanh(r) + side * 1.96 / math.sqrt(n - 3)) for side in (-1, 1))
    assert interval["eval/pearson_low"] < r < interval["eval/pearson_high"]
    width = interval["eval/pearson_high"] - interval["eval/pearson_low"]
    assert 0.5 * (high - low) < width < 2 * (high - low)
    assert "eval/loss_low" not in interval
