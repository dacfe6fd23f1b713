"""Pretraining with whole words masked, and the order of two segments instead of next-sentence prediction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from bigtrain import evaluate
from bigtrain.config import from_dict
from bigtrain.data import prepare
from bigtrain.data.example_loader import Share
from bigtrain.tasks.masked_lm import MaskedLM


def test_the_order_of_segments_is_learned_beside_whole_words(tmp_path: Path) -> None:
    """Texts that always count upwards, so that the order of two segments can be told."""
    random = np.random.default_rng(0)
    names = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("a", "e", "i", "o", "u")]
    for number in range(60):
        begin = int(random.integers(len(names) - 40))
        (tmp_path / f"{number}.txt").write_text(" ".join(names[begin : begin + 40]))
    config = from_dict(
        {
            "model": {"kind": "encoder", "dim": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 32, "vocab_size": 384},
            "task": {"kind": "masked_lm", "sentence": "order", "whole_word": True},
            "data": {
                "kind": "text", "path": str(tmp_path / "*.txt"), "cache_dir": str(tmp_path / "cache"), "held_out": 0.2,
                "tokenizer": {"vocab_size": 330}, "workers": 1,
            },
            "logger": {"progress": False},
        }
    )  # fmt: skip
    config.data.prepared_dir = str(prepare(config).directory)
    task = MaskedLM(config)
    torch.manual_seed(0)
    model = task.build_model(config.model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loader, held_out = task.train_loader(Share(0, 1, 32, 32, 0)), Share(0, 1, 16, 16, 0)
    before = task.metrics(evaluate.measure(task, model.eval(), held_out, torch.device("cpu")))
    model.train()
    for step in range(200):
        (batch,) = loader.batches(step)
        (task.loss(model, batch).loss / task.count_targets(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = task.metrics(evaluate.measure(task, model.eval(), held_out, torch.device("cpu")))
    assert after["eval/sentence_accuracy"] > 0.8  # one half by chance
    assert after["eval/loss"] < before["eval/loss"] - 1
