"""GPT-2, BERT and DistilBERT in transformers' own code learn the same on two ranks under every engine, with and without
LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.distributed.ranks import run_ranks

OFF = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16} | OFF
BERT = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
DISTIL = {
    "vocab_size": 97, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 16,
    "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
    "distilbert": ("DistilBertModel", "DistilBertConfig", DISTIL),
}
Cell = tuple[str, str, list[str], int]  # model, task, engines, rank of LoRA
QUICK: list[Cell] = [
    ("gpt2", "causal_lm", ["zero0", "zero1", "fsdp2"], 4),
    ("bert", "masked_lm", ["zero0", "ddp", "fsdp2"], 0),
]
EVERY: list[Cell] = [
    (kind, task, ["zero0", "zero1", "zero2", "zero3", "zero3_offload", "ddp", "fsdp2"], rank)
    for kind, task in (
        ("gpt2", "causal_lm"), ("gpt2", "classification"), ("bert", "masked_lm"), ("bert", "classification"),
        ("bert", "tagging"), ("distilbert", "classification"),
    )
    for rank in (0, 4)
]  # fmt: skip


@pytest.mark.soak
@pytest.mark.parametrize("cells", [QUICK, EVERY], ids=["quick", "every"])
def test_the_same_curve_under_every_engine(cells: list[Cell], tmp_path: Path) -> None:
    for kind, (name, config, values) in MODELS.items():
        torch.manual_seed(0)
        getattr(transformers, name)(getattr(transformers, config)(**values)).save_pretrained(tmp_path / kind)
    given = [
        {"directory": f"{tmp_path}/{kind}", "task": task, "engines": engines, "rank": rank}
        for kind, task, engines, rank in cells
    ]
    ranks = run_ranks("tests.models.auto_engines:curves", 2, {"cells": given}, timeout=900)
    for cell, found, other in zip(cells, *ranks, strict=True):
        reference = found["zero0"]
        assert reference["losses"][-1] < reference["losses"][0], cell
        for engine, learned in found.items():
            assert learned["losses"] == pytest.approx(reference["losses"], abs=2e-4), (cell, engine)
            assert other[engine]["losses"] == learned["losses"]
            assert learned["trained"] == reference["trained"]
            assert changed(learned) == expected(learned, lora=cell[3] > 0), (cell, engine)


def changed(learned: dict[str, Any]) -> set[str]:
    return {name for name, distance in learned["moved"].items() if distance or name.endswith("key.bias")}  # no effect


def expected(learned: dict[str, Any], lora: bool) -> set[str]:
    """Everything; with LoRA the linear layers of the blocks, and what is new, under the plain model's names."""
    assert not any("lora" in name for name in learned["moved"])
    if not lora:
        assert learned["moved"].keys() == set(learned["trained"])
        return set(learned["trained"])
    layers = {
        name for name in learned["moved"]
        if name.endswith(".weight") and any(part.isdigit() for part in name.split(".")) and not is_norm(name)
    }  # fmt: skip
    new = {name for name in learned["trained"] if "lora" not in name}
    unmoved = {name for name in learned["moved"] if name.endswith("key.bias")}
    return layers | new | unmoved


def is_norm(name: str) -> bool:
    return "norm" in name.lower() or ".ln_" in name
