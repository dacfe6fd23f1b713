"""Our encoder-decoder as transformers' Pegasus, the one of its classes that computes the same: norms before the
sub-layers and after each stack, embeddings scaled by sqrt(dim), sines then cosines from position 0, one table for
source, target and logits. Marian's norms come after; M2M100's angles and BART's positions are others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bigtrain.config import Seq2SeqConfig
from bigtrain.models.seq2seq import sinusoids
from bigtrain.models.stored import StoredTensors

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}  # ours -> theirs
POSSIBLE: dict[str, tuple[Any, ...]] = {
    "norm": ("layernorm",),
    "norm_eps": (1e-5,),  # what nn.LayerNorm has by itself: Pegasus' config has no field for it
    "activation": tuple(ACTIVATIONS),
    "bias": (True,),
}
# What is no parameter of ours. Files hold it all the same: older versions of transformers would fill in anything.
POSITIONS = ("encoder.embed_positions.weight", "decoder.embed_positions.weight")
LOGITS_BIAS = "final_logits_bias"
CONSTANTS = (*POSITIONS, LOGITS_BIAS)
TOLERANCE = 1e-3  # of a stored sine; in float32 they differ by 3e-5 at position 1,000


def settings(config: Seq2SeqConfig) -> dict[str, Any]:
    """config.json, but for the ids of special tokens."""
    ffn_dim = config.ffn_dim or 4 * config.dim
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "d_model": config.dim,
        "encoder_layers": config.n_layers,
        "decoder_layers": config.n_decoder_layers,
        "encoder_attention_heads": config.n_heads,
        "decoder_attention_heads": config.n_heads,
        "encoder_ffn_dim": ffn_dim,
        "decoder_ffn_dim": ffn_dim,
        "activation_function": ACTIVATIONS[config.activation],
        "scale_embedding": True,
        "dropout": config.dropout,
        "attention_dropout": config.dropout,
        "activation_dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "init_std": config.init_std,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "forced_eos_token_id": None,  # Pegasus' own would end a text that is cut at its longest
    }


def constants(config: Seq2SeqConfig, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """(their name, tensor) of what is computed here and stored there; `prefix` is of the base model's names."""
    for name in POSITIONS:
        yield prefix + name, sinusoids(torch.arange(config.max_seq_len), config.dim)
    if prefix:
        assert config.vocab_size is not None
        yield LOGITS_BIAS, torch.zeros(1, config.vocab_size)


def learned_constant(config: Seq2SeqConfig, stored: StoredTensors) -> str | None:
    """The first tensor of a file that is another than `constants` has: training has changed it. None: there is none."""
    expected = dict(constants(config, "model."))
    for name in stored.names:
        wanted = expected.get(name, expected.get(f"model.{name}"))
        if wanted is None:
            continue
        found = stored.tensor(name).float()
        if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=0, atol=TOLERANCE):
            return name
    return None
