"""Saved activations against what autograd really saves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bigtrain import models
from bigtrain.config import Config, DecoderConfig, EncoderConfig, OurModelConfig, Seq2SeqConfig
from bigtrain.models import cpu_kernels
from bigtrain.plan import activations

BATCH, LENGTH = 3, 96
GPT: dict[str, Any] = {"dim": 128, "vocab_size": 512, "max_seq_len": LENGTH, "n_layers": 2}
LLAMA = GPT | {"ffn_dim": 352, "positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False}
VARIANTS: dict[str, OurModelConfig] = {
    "gpt, heads of 32": DecoderConfig(**GPT, n_heads=4),
    "gpt, heads of 64": DecoderConfig(**GPT, n_heads=2),
    "gpt with dropout": DecoderConfig(**GPT, n_heads=2, dropout=0.1),
    "gpt with grouped queries": DecoderConfig(**GPT, n_heads=2, n_kv_heads=1),
    "llama": DecoderConfig(**LLAMA, n_heads=2),
    "llama with grouped queries": DecoderConfig(**LLAMA, n_heads=4, n_kv_heads=2),
    "bert": EncoderConfig(**GPT, n_heads=2, dropout=0.0),
    "bert with dropout": EncoderConfig(**GPT, n_heads=2, dropout=0.1),
    "bert, normalised before adding": EncoderConfig(**GPT, n_heads=2, dropout=0.1, norm_first=True),
    "modern bert": EncoderConfig(
        **GPT, n_heads=2, dropout=0.0, positions="rotary", norm_first=True, activation="geglu", token_types=0
    ),
    "relu": Seq2SeqConfig(**GPT, n_heads=2, n_decoder_layers=2, dropout=0.0),
    "relu with dropout": Seq2SeqConfig(**GPT, n_heads=2, n_decoder_layers=2, dropout=0.1),
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def really_saved(config: OurModelConfig, dtype: torch.dtype, documents: bool) -> int:
    """Bytes of the storages, without the weights', that autograd holds at the end of the blocks."""
    model = models.build(config).to(dtype).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}
    held = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    tokens = torch.randint(0, 512, (BATCH, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if isinstance(model, models.Seq2Seq):
            model.decode(tokens, model.encode(tokens, None), None)
        elif isinstance(model, models.Encoder):
            model(tokens, token_types=torch.zeros_like(tokens))
        else:
            model.forward_hidden(tokens, document_ids=torch.zeros_like(tokens) if documents else None)
    return sum(found.values())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", VARIANTS)
def test_saved_activations_to_a_thousandth(name: str, precision: str) -> None:
    check(VARIANTS[name], precision, documents=False)


def test_a_mask_for_each_text_costs_its_square_in_every_layer() -> None:
    check(VARIANTS["gpt, heads of 64"], "bf16", documents=True)


def check(model: OurModelConfig, precision: str, documents: bool) -> None:
    kernels = cpu_kernels.library() is not None
    element = 4 if precision == "fp32" else 2
    setting = activations.Setting("cpu", element, BATCH, LENGTH, documents, cpu_kernels=kernels)
    found = activations.of(Config(model=model), setting)
    real = really_saved(model, PRECISIONS[precision], documents)
    assert found.saved(checkpointing=False) == pytest.approx(real, rel=1e-3)
    deeper = replace(model, n_layers=3)
    more = activations.of(Config(model=deeper), setting).saved(False) - found.saved(False)
    assert more == found.blocks[1 if not isinstance(model, Seq2SeqConfig) else 0]


def test_formulas_of_the_literature() -> None:
    """Korthikanti et al., arXiv 2205.05198, equation 2 less what flash attention does not keep and dropout's masks:
    32 T h for a GPT block in bf16, and here statistics of the norms and the sums of exponentials."""
    setting = activations.Setting("cuda", 2, 4, 1024)
    config = DecoderConfig(dim=768, n_heads=12, n_layers=12, vocab_size=50257, max_seq_len=1024)
    tokens = 4 * 1024
    assert activations.of(Config(model=config), setting).blocks[0] == 32 * tokens * 768 + 4 * 12 * tokens + 16 * tokens
