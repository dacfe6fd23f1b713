"""Which parameters decay, which learn slower, which not at all."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers

from bigtrain.config import AdamWConfig, DecoderConfig, EncoderConfig, MuonConfig, Seq2SeqConfig
from bigtrain.engine.optimizers import freeze, parameter_groups
from bigtrain.errors import ConfigError
from bigtrain.models import Decoder, Encoder
from bigtrain.models.seq2seq import Seq2Seq


@pytest.fixture
def encoder() -> Encoder:
    with torch.device("meta"):
        return Encoder(EncoderConfig(dim=16, n_layers=3, n_heads=2, vocab_size=50))


def rates(model: torch.nn.Module, decay: float) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, AdamWConfig(lr=1.0), decay)
    return {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}


def test_norms_and_biases_do_not_decay(encoder: Encoder) -> None:
    for group in parameter_groups(encoder, AdamWConfig(weight_decay=0.1)):
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.dim() >= 2 else 0.0)


def test_lower_layers_learn_slower(encoder: Encoder) -> None:
    found = rates(encoder, 0.5)
    assert len(found) == len(list(encoder.parameters()))
    assert {rate for name, rate in found.items() if name.startswith("pooler.")} == {1.0}
    assert found["blocks.2.attention.qkv.weight"] == 0.5
    assert found["blocks.0.feed_forward.up.bias"] == 0.125
    assert found["embedding.weight"] == found["token_types.weight"] == found["embedding_norm.bias"] == 0.0625
    assert set(rates(encoder, 1.0).values()) == {1.0}


def test_an_encoder_decoders_layers_go_by_their_own_stack() -> None:
    with torch.device("meta"):
        model = Seq2Seq(Seq2SeqConfig(dim=16, n_layers=2, n_decoder_layers=4, n_heads=2, vocab_size=50))
    found = rates(model, 0.5)
    assert len(found) == len(list(model.parameters()))
    assert found["embedding.weight"] == 0.5**5
    assert found["encoder_norm.weight"] == found["norm.weight"] == 1.0
    of_blocks = {f"{stack}_blocks.{i}." for stack, n in (("encoder", 2), ("decoder", 4)) for i in range(n)}
    assert of_blocks == {name for name in of_blocks if any(given.startswith(name) for given in found)}
    for name, rate in found.items():
        if match := re.match(r"(encoder|decoder)_blocks\.(\d)\.", name):
            assert rate == 0.5 ** ({"encoder": 2, "decoder": 4}[match[1]] - int(match[2])), name


@pytest.mark.parametrize(
    ("kind", "sizes", "depths"),
    [
        (
            "Bert", {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16},
            {"embeddings.word_embeddings.": 4, "embeddings.position_embeddings.": 4, "embeddings.LayerNorm.": 4,
             "encoder.layer.0.": 3, "encoder.layer.2.": 1, "pooler.": 0},
        ),
        (
            "GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2},
            {"wte.": 3, "wpe.": 3, "h.0.": 2, "h.1.": 1, "ln_f.": 0},
        ),
        (
            "T5", {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2},
            {"shared.": 4, "encoder.block.0.": 2, "encoder.block.1.": 1, "encoder.final_layer_norm.": 0,
             "decoder.block.0.": 3, "decoder.block.2.": 1, "decoder.final_layer_norm.": 0},
        ),
    ],
)  # fmt: skip
def test_a_model_of_transformers_is_taken_apart_alike(kind: str, sizes: dict[str, int], depths: dict[str, int]) -> None:
    theirs = getattr(transformers, f"{kind}Config")(vocab_size=50, **sizes)
    with torch.device("meta"):
        found = rates(getattr(transformers, f"{kind}Model")(theirs), 0.5)
    for start, below in depths.items():
        assert {rate for name, rate in found.items() if name.startswith(start)} == {0.5**below}, start


MATRICES = {  # of a layer, without the prefix of its name
    "ours": {"attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down"},
    "GPT2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "T5": {"SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o", "DenseReluDense.wi",
           "DenseReluDense.wo", "EncDecAttention.q", "EncDecAttention.k", "EncDecAttention.v", "EncDecAttention.o"},
    "Llama": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
              "mlp.up_proj", "mlp.down_proj"},
}  # fmt: skip
MATRICES["decoder"] = MATRICES["encoder"] = MATRICES["ours"]
MATRICES["seq2seq"] = MATRICES["ours"] | {f"cross_attention.{name}" for name in ("query", "key_value", "out")}


def model_of(kind: str) -> torch.nn.Module:
    shape: dict[str, Any] = {"dim": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 50}
    theirs: dict[str, dict[str, Any]] = {
        "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
        "T5": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2},
        "Llama": {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "tie_word_embeddings": False,
        },
    }  # fmt: skip
    with torch.device("meta"):
        match kind:
            case "decoder":
                return Decoder(DecoderConfig(**shape, tie_embeddings=False))
            case "encoder":
                return Encoder(EncoderConfig(**shape, pooler=True))
            case "seq2seq":
                return Seq2Seq(Seq2SeqConfig(**shape))
        made = {"GPT2": "GPT2LMHeadModel", "T5": "T5ForConditionalGeneration", "Llama": "LlamaForCausalLM"}[kind]
        config = getattr(transformers, f"{kind}Config")(vocab_size=50, **theirs[kind])
        return getattr(transformers, made)(config)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["decoder", "encoder", "seq2seq", "GPT2", "T5", "Llama"])
def test_muon_gets_the_matrices_of_the_layers_and_nothing_else(kind: str) -> None:
    """Not tables of tokens, positions, token types or distances, no pooler and no head, tied or not."""
    model = model_of(kind)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found, rest = set(), set()
    for group in parameter_groups(model, MuonConfig(lr=1.0, adam_lr=0.5)):
        for parameter in group["params"]:
            assert parameter.use_muon == group["use_muon"] == (group["lr"] == 1.0)
            (found if group["use_muon"] else rest).add(names[id(parameter)])
    ends = {".".join(name.removesuffix(".weight").split(".")[-2:]) for name in found}
    assert ends == MATRICES[kind]
    assert not any(".".join(name.split(".")[-3:-1]) in ends and name.endswith(".weight") for name in rest)


def test_frozen_parameters_are_in_no_group(encoder: Encoder) -> None:
    freeze(encoder, ["embedding*", "blocks.[01].*"])
    found = rates(encoder, 1.0)
    assert not any(name.startswith(("embedding", "blocks.0", "blocks.1")) for name in found)
    assert "blocks.2.attention.qkv.weight" in found


@pytest.mark.parametrize(("patterns", "said"), [(["layers.*"], "matches no parameter"), (["*"], "nothing to train")])
def test_what_cannot_be_frozen(encoder: Encoder, patterns: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        freeze(encoder, patterns)
