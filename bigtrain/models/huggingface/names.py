"""Which of our parameters is which of theirs: one table for each family, read from both sides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bigtrain.config import DecoderConfig, EncoderConfig, OurModelConfig, Seq2SeqConfig, head_dim

BACKBONE, HEAD, PAIR_HEAD = "backbone.", "head.", "pair_head."
# rope_type -> the settings beside it and rope_theta, and our names of them.
ROPE_SCALINGS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_seq_len",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """One of our parameters and the tensors of theirs that it is made of."""

    ours: str
    theirs: tuple[str, ...]  # their rows, one below the other
    transposed: bool = False  # a Conv1D of GPT-2, (inputs, outputs)

    @property
    def of_head(self) -> bool:
        """Whether it is of a head: those names have no prefix of the base model in any class of theirs."""
        return self.theirs[0].startswith(("lm_head.", "cls.", "classifier.", "qa_outputs.", "head.", "decoder.bias"))

    @property
    def optional(self) -> bool:
        """Whether an encoder's files may lack it: heads, and RoBERTa's pooler, which is elsewhere in a classifier."""
        return self.of_head or self.theirs[0].startswith("pooler.")


@dataclass(frozen=True)
class Family:
    model_type: str
    prefix: str  # of the base model's parameters in a model with a head
    rules: Callable[[Any], list[Rule]]  # config -> every parameter, those of all heads too
    copies: dict[str, str]  # a tensor that files may hold besides -> the one that it equals in a tied model


def family_of(config: OurModelConfig) -> Family:
    """The family whose parameters the config's are, going by its fields that tell families apart."""
    if isinstance(config, Seq2SeqConfig):
        return PEGASUS
    if isinstance(config, EncoderConfig):
        if config.positions == "rotary":
            return MODERNBERT
        return ROBERTA if config.norm_first else BERT
    return GPT2 if config.positions == "learned" else LLAMA


def split_rows(tensor: Tensor, rule: Rule, config: OurModelConfig) -> list[Tensor]:
    """The parts of our tensor that are theirs: (gate, up) and (key, value) are of equal height, (query, key, value) may
    not be."""
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
    rules = _bert_backbone(config, "attention.output.LayerNorm", "output.LayerNorm")
    rules += _module(HEAD + "dense", "cls.predictions.transform.dense")
    rules += _module(HEAD + "norm", "cls.predictions.transform.LayerNorm")
    rules += [Rule(HEAD + "bias", ("cls.predictions.bias",)), *_pair_head()]
    rules += _module(HEAD + "qa_outputs", "qa_outputs")
    return rules + _module(HEAD + "linear", "classifier")


def _roberta(config: EncoderConfig) -> list[Rule]:
    """RoBERTa-PreLayerNorm. Two of ours are in one place or another, by the class: `_belongs` in exporting.py."""
    rules = _bert_backbone(config, "attention.LayerNorm", "intermediate.LayerNorm")
    rules += _module(BACKBONE + "norm", "LayerNorm")
    if config.pooler:
        rules += _module(BACKBONE + "pooler", "classifier.dense")
    rules += _module(HEAD + "dense", "lm_head.dense")
    rules += _module(HEAD + "norm", "lm_head.layer_norm")
    rules += [Rule(HEAD + "bias", ("lm_head.bias",)), *_pair_head()]
    rules += _module(HEAD + "qa_outputs", "qa_outputs")
    return rules + _module(HEAD + "linear", "classifier") + _module(HEAD + "linear", "classifier.out_proj")


def _bert_backbone(config: EncoderConfig, attention_norm: str, feed_forward_norm: str) -> list[Rule]:
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
        rules += _module(ours + "attention_norm", theirs + attention_norm)
        rules += _module(ours + "feed_forward.up", theirs + "intermediate.dense")
        rules += _module(ours + "feed_forward.down", theirs + "output.dense")
        rules += _module(ours + "feed_forward_norm", theirs + feed_forward_norm)
    if config.pooler:
        rules += _module("pooler", "pooler.dense")
    return [Rule(BACKBONE + rule.ours, rule.theirs) for rule in rules]


def _pair_head() -> list[Rule]:
    return _module(PAIR_HEAD + "linear", "cls.seq_relationship")  # BERT alone has a class with it


def _modernbert(config: EncoderConfig) -> list[Rule]:
    bias = config.bias
    rules = [Rule("embedding.weight", ("embeddings.tok_embeddings.weight",))]
    rules += _module("embedding_norm", "embeddings.norm", bias=bias)
    for index in range(config.n_layers):
        ours, theirs = f"blocks.{index}.", f"layers.{index}."
        if index:  # the embeddings are normalised already
            rules += _module(ours + "attention_norm", theirs + "attn_norm", bias=bias)
        rules += _module(ours + "attention.qkv", theirs + "attn.Wqkv", bias=bias)
        rules += _module(ours + "attention.out", theirs + "attn.Wo", bias=bias)
        rules += _module(ours + "feed_forward_norm", theirs + "mlp_norm", bias=bias)
        rules += _module(ours + "feed_forward.up", theirs + "mlp.Wi", bias=bias)
        rules += _module(ours + "feed_forward.down", theirs + "mlp.Wo", bias=bias)
    rules += _module("norm", "final_norm", bias=bias)
    if config.pooler:  # which none of their classes has
        rules += _module("pooler", "pooler.dense", bias=bias)
    rules = [Rule(BACKBONE + rule.ours, rule.theirs) for rule in rules]
    rules += _module(HEAD + "dense", "head.dense", bias=bias) + _module(HEAD + "norm", "head.norm", bias=bias)
    rules += [Rule(HEAD + "bias", ("decoder.bias",)), *_pair_head()]
    return rules + _module(HEAD + "linear", "classifier")


def _pegasus(config: Seq2SeqConfig) -> list[Rule]:
    rules = [Rule("embedding.weight", ("shared.weight",))]
    for stack, n_layers in (("encoder", config.n_layers), ("decoder", config.n_decoder_layers)):
        for index in range(n_layers):
            ours, theirs = f"{stack}_blocks.{index}.", f"{stack}.layers.{index}."
            rules += _module(ours + "attention_norm", theirs + "self_attn_layer_norm")
            rules += _module(ours + "attention.qkv", *(f"{theirs}self_attn.{name}_proj" for name in "qkv"))
            rules += _module(ours + "attention.out", theirs + "self_attn.out_proj")
            if stack == "decoder":
                source = theirs + "encoder_attn"
                rules += _module(ours + "cross_attention_norm", source + "_layer_norm")
                rules += _module(ours + "cross_attention.query", source + ".q_proj")
                rules += _module(ours + "cross_attention.key_value", source + ".k_proj", source + ".v_proj")
                rules += _module(ours + "cross_attention.out", source + ".out_proj")
            rules += _module(ours + "feed_forward_norm", theirs + "final_layer_norm")
            rules += _module(ours + "feed_forward.up", theirs + "fc1")
            rules += _module(ours + "feed_forward.down", theirs + "fc2")
    return rules + _module("encoder_norm", "encoder.layer_norm") + _module("norm", "decoder.layer_norm")


def _module(ours: str, *theirs: str, transposed: bool = False, bias: bool = True) -> list[Rule]:
    rules = [Rule(f"{ours}.weight", tuple(f"{name}.weight" for name in theirs), transposed)]
    return [*rules, Rule(f"{ours}.bias", tuple(f"{name}.bias" for name in theirs))] if bias else rules


_WORDS = "embeddings.word_embeddings.weight"
GPT2 = Family("gpt2", "transformer.", _gpt2, {"lm_head.weight": "wte.weight"})
LLAMA = Family("llama", "model.", _llama, {"lm_head.weight": "embed_tokens.weight"})
BERT = Family(
    "bert", "bert.", _bert,
    {"cls.predictions.decoder.weight": _WORDS, "cls.predictions.decoder.bias": "cls.predictions.bias"},
)  # fmt: skip
ROBERTA = Family(
    "roberta-prelayernorm", "roberta_prelayernorm.", _roberta,
    {"lm_head.decoder.weight": _WORDS, "lm_head.decoder.bias": "lm_head.bias"},
)  # fmt: skip
MODERNBERT = Family("modernbert", "model.", _modernbert, {"decoder.weight": "embeddings.tok_embeddings.weight"})
PEGASUS = Family(
    "pegasus", "model.", _pegasus,
    dict.fromkeys(("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "shared.weight"),
)  # fmt: skip
