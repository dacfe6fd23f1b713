"""Which of our parameters is which of theirs: one table for each family, read from both sides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bigtrain.config import DecoderConfig, EncoderConfig, OurModelConfig, Seq2SeqConfig, head_dim
from bigtrain.errors import ConfigError

BACKBONE, HEAD, PAIR_HEAD = "backbone.", "head.", "pair_head."


@dataclass(frozen=True)
class Rule:
    """One of our parameters and the tensors of theirs that it is made of."""

    ours: str
    theirs: tuple[str, ...]  # their rows, one below the other
    transposed: bool = False  # a Conv1D of GPT-2, (inputs, outputs)

    @property
    def of_head(self) -> bool:
        """Whether it is of a head: those names have no prefix of the base model in any class of theirs."""
        return self.theirs[0].startswith(("lm_head.", "cls.", "classifier.", "qa_outputs."))


@dataclass(frozen=True)
class Family:
    model_type: str
    prefix: str  # of the base model's parameters in a model with a head
    rules: Callable[[Any], list[Rule]]  # config -> every parameter, those of all heads too


def family_of(config: OurModelConfig) -> Family:
    """The family whose parameters the config's are, going by its fields that tell families apart.

    Raises ConfigError for an encoder-decoder, of which there is none.
    """
    if isinstance(config, Seq2SeqConfig):
        raise ConfigError("model.kind", config.kind, "transformers has no class for it")
    if isinstance(config, EncoderConfig):
        return BERT
    return GPT2 if config.positions == "learned" else LLAMA


def split_rows(tensor: Tensor, rule: Rule, config: OurModelConfig) -> list[Tensor]:
    """The parts of our tensor that are theirs: (gate, up) are of equal height, (query, key, value) may not be."""
    if len(rule.theirs) < 3:
        return list(tensor.chunk(len(rule.theirs)))
    return list(tensor.split(qkv_rows(config)))


def qkv_rows(config: OurModelConfig) -> tuple[int, int, int]:
    """Rows of queries, keys and values in `attention.qkv`."""
    n_kv_heads = (config.n_kv_heads if isinstance(config, DecoderConfig) else None) or config.n_heads
    rows = n_kv_heads * head_dim(config)
    return config.n_heads * head_dim(config), rows, rows


def _gpt2(config: DecoderConfig) -> list[Rule]:
    rules = [Rule("embedding.weight", ("wte.weight",)), Rule("positions.weight", ("wpe.weight",))]
    for index in range(config.n_layers):
        ours, theirs = f"blocks.{index}.", f"h.{index}."
        rules += _module(ours + "attention_norm", theirs + "ln_1")
        rules += _module(ours + "attention.qkv", theirs + "attn.c_attn", transposed=True)
        rules += _module(ours + "attention.out", theirs + "attn.c_proj", transposed=True)
        rules += _module(ours + "feed_forward_norm", theirs + "ln_2")
        rules += _module(ours + "feed_forward.up", theirs + "mlp.c_fc", transposed=True)
        rules += _module(ours + "feed_forward.down", theirs + "mlp.c_proj", transposed=True)
    rules += _module("norm", "ln_f")
    return rules if config.tie_embeddings else [*rules, Rule("head.weight", ("lm_head.weight",))]


def _llama(config: DecoderConfig) -> list[Rule]:
    rules = [Rule("embedding.weight", ("embed_tokens.weight",))]
    for index in range(config.n_layers):
        ours, theirs = f"blocks.{index}.", f"layers.{index}."
        attention = [f"{theirs}self_attn.{name}_proj" for name in "qkv"]
        rules += _module(ours + "attention_norm", theirs + "input_layernorm", bias=False)
        rules += _module(ours + "attention.qkv", *attention, bias=config.bias)
        rules += _module(ours + "attention.out", theirs + "self_attn.o_proj", bias=config.bias)
        rules += _module(ours + "feed_forward_norm", theirs + "post_attention_layernorm", bias=False)
        rules += _module(
            ours + "feed_forward.up", theirs + "mlp.gate_proj", theirs + "mlp.up_proj", bias=config.bias
        )  # fmt: skip
        rules += _module(ours + "feed_forward.down", theirs + "mlp.down_proj", bias=config.bias)
    rules += _module("norm", "norm", bias=False)
    return rules if config.tie_embeddings else [*rules, Rule("head.weight", ("lm_head.weight",))]


def _bert(config: EncoderConfig) -> list[Rule]:
    rules = [
        Rule("embedding.weight", ("embeddings.word_embeddings.weight",)),
        Rule("token_types.weight", ("embeddings.token_type_embeddings.weight",)),
        Rule("positions.weight", ("embeddings.position_embeddings.weight",)),
        *_module("embedding_norm", "embeddings.LayerNorm"),
    ]
    for index in range(config.n_layers):
        ours, theirs = f"blocks.{index}.", f"encoder.layer.{index}."
        attention = [f"{theirs}attention.self.{name}" for name in ("query", "key", "value")]
        rules += _module(ours + "attention.qkv", *attention)
        rules += _module(ours + "attention.out", theirs + "attention.output.dense")
        rules += _module(ours + "attention_norm", theirs + "attention.output.LayerNorm")
        rules += _module(ours + "feed_forward.up", theirs + "intermediate.dense")
        rules += _module(ours + "feed_forward.down", theirs + "output.dense")
        rules += _module(ours + "feed_forward_norm", theirs + "output.LayerNorm")
    if config.pooler:
        rules += _module("pooler", "pooler.dense")
    rules = [Rule(BACKBONE + rule.ours, rule.theirs) for rule in rules]
    rules += _module(HEAD + "dense", "cls.predictions.transform.dense")
    rules += _module(HEAD + "norm", "cls.predictions.transform.LayerNorm")
    rules += [Rule(HEAD + "bias", ("cls.predictions.bias",))]
    rules += _module(PAIR_HEAD + "linear", "cls.seq_relationship")
    rules += _module(HEAD + "qa_outputs", "qa_outputs")
    return rules + _module(HEAD + "linear", "classifier")


def _module(ours: str, *theirs: str, transposed: bool = False, bias: bool = True) -> list[Rule]:
    rules = [Rule(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), transposed)]
    return [*rules, Rule(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs))] if bias else rules


GPT2 = Family("gpt2", "transformer.", _gpt2)
LLAMA = Family("llama", "model.", _llama)
BERT = Family("bert", "bert.", _bert)
