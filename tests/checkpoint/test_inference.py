"""A model that no device holds: spread over memory and disk by accelerate, it computes the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigtrain import models
from bigtrain.checkpoint import inference
from bigtrain.checkpoint.integrity import seal
from bigtrain.checkpoint.weights import write_weights
from bigtrain.config import DecoderConfig, EncoderConfig, Seq2SeqConfig
from bigtrain.models.heads import ClassificationHead, MaskedLMHead, PairHead
from bigtrain.tasks.labelled import WithHead, build_encoder
from bigtrain.tasks.masked_lm import MaskedLMModel

GPT = DecoderConfig(dim=32, n_layers=3, n_heads=4, vocab_size=97, max_seq_len=16, init_std=0.3)
LLAMA = replace(
    GPT, n_kv_heads=2, positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, tie_embeddings=False
)
BERT = EncoderConfig(dim=32, n_layers=3, n_heads=4, vocab_size=97, max_seq_len=16, init_std=0.3)
SEQ2SEQ = Seq2SeqConfig(dim=32, n_layers=2, n_decoder_layers=2, n_heads=4, vocab_size=97, max_seq_len=16, init_std=0.3)
TOKENS = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.ones(2, 12, dtype=torch.long)
MASK[1, 8:] = 0


def pretraining() -> nn.Module:
    backbone = build_encoder(BERT, pooled=True)
    return MaskedLMModel(backbone, MaskedLMHead(backbone.config, backbone.embedding), PairHead(backbone.config))


def classifier(**changes: Any) -> nn.Module:
    backbone = build_encoder(replace(BERT, **changes), pooled=True)
    return WithHead(backbone, ClassificationHead(backbone.config, 3, 0.1), pooled=True)


def logits(output: Any) -> Tensor:
    return torch.cat([part.flatten() for part in output]) if isinstance(output, tuple) else output


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "gpt": (lambda: models.build(GPT), (TOKENS,)),
    "llama": (lambda: models.build(LLAMA), (TOKENS,)),
    "bert, pretraining": (pretraining, (TOKENS, MASK, 1 - MASK)),
    "bert, classification": (classifier, (TOKENS, MASK, 1 - MASK)),
    "modern bert": (lambda: classifier(norm_first=True, positions="rotary", activation="geglu"), (TOKENS, MASK)),
    "encoder-decoder": (lambda: models.build(SEQ2SEQ), (TOKENS, MASK, TOKENS)),
}


def saved(build: Callable[[], nn.Module], checkpoint: Path) -> int:
    """The model's bytes."""
    torch.manual_seed(0)
    weights = {name: parameter.detach() for name, parameter in build().named_parameters()}
    checkpoint.mkdir()
    write_weights(checkpoint, weights.items())
    seal(checkpoint, {"step": 1})
    return sum(4 * weight.numel() for weight in weights.values())


@pytest.mark.soak
@torch.inference_mode()
@pytest.mark.parametrize("kind", MODELS)
def test_a_part_in_memory_and_the_rest_on_disk_is_the_same_model(kind: str, tmp_path: Path) -> None:
    build, inputs = MODELS[kind]
    size = saved(build, tmp_path / "step-1")
    whole, _ = inference.load(build, tmp_path / "step-1", "cpu")
    spread, device = inference.load(build, tmp_path / "step-1", "auto", {"cpu": f"{size * 2 // 3000}KB"})
    assert device.type == "cpu"
    assert {"cpu", "disk"} == set(spread.device_map.values())
    assert any(parameter.is_meta for parameter in spread.parameters())
    torch.testing.assert_close(logits(spread(*inputs)), logits(whole(*inputs)), rtol=1e-6, atol=1e-6)


@pytest.mark.soak
@torch.inference_mode()
def test_what_does_not_fit_is_spread_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, inputs = MODELS["gpt"]
    saved(build, tmp_path / "step-1")
    expected = inference.load(build, tmp_path / "step-1", "auto")[0](*inputs)
    monkeypatch.setattr(inference, "HEADROOM", 1e15)
    spread, _ = inference.load(build, tmp_path / "step-1", "auto")
    assert spread.device_map
    assert torch.equal(spread(*inputs), expected)
    plain, _ = inference.load(build, tmp_path / "step-1", "cpu")  # what is asked for by name is taken
    assert not hasattr(plain, "device_map")
