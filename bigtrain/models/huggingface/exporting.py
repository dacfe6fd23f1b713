"""Our model -> the config.json and the tensors that a class of transformers loads."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from bigtrain.config import DecoderConfig, EncoderConfig, OurModelConfig, Seq2SeqConfig, head_dim
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.models.huggingface import seq2seq
from bigtrain.models.huggingface.names import (
    BACKBONE,
    GPT2,
    HEAD,
    LLAMA,
    MODERNBERT,
    ROBERTA,
    ROPE_SCALINGS,
    Family,
    Rule,
    family_of,
    qkv_rows,
    split_rows,
)

logger = logging.getLogger(__name__)

# Family, what the model is for -> the class, and which heads it has by the beginning of their names.
ARCHITECTURES: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {
    ("gpt2", "causal_lm"): ("GPT2LMHeadModel", ("lm_head.",)),
    ("gpt2", "base"): ("GPT2Model", ()),
    ("llama", "causal_lm"): ("LlamaForCausalLM", ("lm_head.",)),
    ("llama", "base"): ("LlamaModel", ()),
    ("bert", "base"): ("BertModel", ()),
    ("bert", "masked_lm"): ("BertForMaskedLM", ("cls.predictions.",)),
    ("bert", "pretraining"): ("BertForPreTraining", ("cls.",)),
    ("bert", "classification"): ("BertForSequenceClassification", ("classifier.",)),
    ("bert", "tagging"): ("BertForTokenClassification", ("classifier.",)),
    ("bert", "question_answering"): ("BertForQuestionAnswering", ("qa_outputs.",)),
    ("roberta-prelayernorm", "base"): ("RobertaPreLayerNormModel", ()),
    ("roberta-prelayernorm", "masked_lm"): ("RobertaPreLayerNormForMaskedLM", ("lm_head.",)),
    ("roberta-prelayernorm", "pretraining"): ("RobertaPreLayerNormForMaskedLM", ("lm_head.",)),
    ("roberta-prelayernorm", "classification"): (
        "RobertaPreLayerNormForSequenceClassification", ("classifier.dense.", "classifier.out_proj."),
    ),
    ("roberta-prelayernorm", "tagging"): (
        "RobertaPreLayerNormForTokenClassification", ("classifier.weight", "classifier.bias"),
    ),
    ("roberta-prelayernorm", "question_answering"): ("RobertaPreLayerNormForQuestionAnswering", ("qa_outputs.",)),
    ("modernbert", "base"): ("ModernBertModel", ()),
    ("modernbert", "masked_lm"): ("ModernBertForMaskedLM", ("head.", "decoder.")),
    ("modernbert", "pretraining"): ("ModernBertForMaskedLM", ("head.", "decoder.")),
    ("modernbert", "classification"): ("ModernBertForSequenceClassification", ("head.", "classifier.")),
    ("modernbert", "tagging"): ("ModernBertForTokenClassification", ("head.", "classifier.")),
    ("modernbert", "question_answering"): ("ModernBertForQuestionAnswering", ("head.", "classifier.")),
    ("pegasus", "translation"): ("PegasusForConditionalGeneration", ("lm_head.",)),
    ("pegasus", "base"): ("PegasusModel", ()),
}  # fmt: skip
_WITH_POOLER = ("BertModel", "BertForPreTraining", "BertForSequenceClassification", "RobertaPreLayerNormModel")
_NEED_POOLER = (
    "BertForPreTraining", "BertForSequenceClassification", "RobertaPreLayerNormForSequenceClassification",
)  # fmt: skip
_HAVE_NO_POOLER = ("ModernBertModel", "ModernBertForSequenceClassification")  # to read where ours reads it


def to_huggingface(
    config: OurModelConfig,
    weights: Iterable[tuple[str, Tensor]],
    architecture: str,
    labels: list[str] | None = None,
    problem_type: str | None = None,
    pad_token_id: int = 1,
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """(config.json, (their name, tensor) one at a time) of our model.

    architecture: causal_lm, base, masked_lm, pretraining (masked words and pairs), classification, tagging,
    question_answering or translation.
    labels: of classification and tagging, in the order of the head's outputs; problem_type as transformers has it
    (regression, single_label_classification).
    pad_token_id: the tokenizer's, after which RoBERTa's positions begin.
    Raises ConfigError naming the field that no class of transformers has. While iterated: BigtrainError for a weight
    that is missing or that the config does not have.
    """
    family = family_of(config)
    _check(config, family, architecture)
    config, weights = _with_all_heads(config, family, weights)
    name, heads = ARCHITECTURES[family.model_type, architecture]
    settings: dict[str, Any] = {"architectures": [name], "model_type": family.model_type}
    # Named, for transformers would fill in the ids of its own GPT-2, Llama, BERT and Pegasus.
    settings |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if architecture == "pretraining" and name != "BertForPreTraining":
        logger.warning("%s has no head for pairs of sentences: the run's is left out", name)
    if isinstance(config, DecoderConfig):
        settings |= _DECODERS[family.model_type](config)
    elif isinstance(config, EncoderConfig) and family is MODERNBERT:
        settings |= _modernbert(config)
        if "classifier." in heads:
            settings["classifier_activation"] = "linear"
            weights = _through_their_head(config, weights)
    elif isinstance(config, EncoderConfig):
        settings |= _bert(config)
        if family is ROBERTA:
            settings |= {"max_position_embeddings": config.max_seq_len + pad_token_id + 1, "pad_token_id": pad_token_id}
            weights = _after_padding(weights, pad_token_id)
    else:
        settings |= seq2seq.settings(config)
    if architecture in ("classification", "tagging") or labels:
        labels = labels or ["LABEL_0"]
        settings["id2label"] = {str(index): label for index, label in enumerate(labels)}
        settings["label2id"] = {label: index for index, label in enumerate(labels)}
        if problem_type is not None:
            settings["problem_type"] = problem_type
    prefix = family.prefix if heads else ""
    tensors = _rename(config, family, weights, prefix, name, heads)
    if isinstance(config, Seq2SeqConfig):
        tensors = chain(tensors, seq2seq.constants(config, prefix))
    return settings, tensors


def _rename(
    config: OurModelConfig,
    family: Family,
    weights: Iterable[tuple[str, Tensor]],
    prefix: str,
    class_name: str,
    heads: tuple[str, ...],
) -> Iterator[tuple[str, Tensor]]:
    known = {rule.ours for rule in family.rules(config)}
    rules = {rule.ours: rule for rule in family.rules(config) if _belongs(rule, class_name, heads)}
    missing = set(rules)
    for given, tensor in weights:
        ours = given if given in known else BACKBONE + given
        if ours not in known:
            raise BigtrainError(f"the checkpoint's parameter {given} is none of {class_name}'s")
        missing.discard(ours)
        if ours not in rules:
            continue
        rule = rules[ours]
        whole = tensor.t() if rule.transposed else tensor
        for theirs, part in zip(rule.theirs, split_rows(whole, rule, config), strict=True):
            yield (theirs if rule.of_head else prefix + theirs), part.contiguous()
    if missing:
        raise BigtrainError(f"the checkpoint has no parameter {min(missing)}, which {class_name} needs")


def _with_all_heads(
    config: OurModelConfig, family: Family, weights: Iterable[tuple[str, Tensor]]
) -> tuple[OurModelConfig, Iterable[tuple[str, Tensor]]]:
    """Heads that pruning has taken out come back as zeros where the family's are always dim / n_heads wide: they add
    nothing to what the model says, and take space in the file again. Llama has a head size of its own.

    Raises ConfigError where the hidden width is none of so many whole heads.
    """
    size = head_dim(config)
    if family is LLAMA or size * config.n_heads == config.dim:
        return config, weights
    if config.dim % size or config.dim < size * config.n_heads:
        raise ConfigError(
            "model.head_dim", size, f"transformers' {_TITLES[family.model_type].split(',')[0]} has dim / n_heads;"
            f" {config.n_heads} heads of {size} are not what dim={config.dim} can hold",
            f"cut heads and dim so that dim is a multiple of {size}, and at least {size * config.n_heads}",
        )  # fmt: skip
    rows = qkv_rows(config)

    def padded() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if ".attention.qkv." in name:
                parts = [_lengthened(part, config.dim) for part in tensor.split(rows)]
                yield name, torch.cat(parts)
            elif name.endswith(".attention.out.weight"):
                yield name, _lengthened(tensor.t(), config.dim).t()
            else:
                yield name, tensor

    assert not isinstance(config, Seq2SeqConfig)
    return replace(config, n_heads=config.dim // size, head_dim=None), padded()


def _lengthened(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat((tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])))


def _after_padding(weights: Iterable[tuple[str, Tensor]], pad_token_id: int) -> Iterator[tuple[str, Tensor]]:
    """RoBERTa counts positions from pad_token_id + 1 on: rows before that are of padding or of nothing."""
    for name, tensor in weights:
        if name.removeprefix(BACKBONE) == "positions.weight":
            yield name, torch.cat((tensor.new_zeros(pad_token_id + 1, tensor.size(1)), tensor))
        else:
            yield name, tensor


def _through_their_head(config: EncoderConfig, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """ModernBERT's classifiers read norm(activation(dense(hidden))), ours hidden states as the last norm leaves them.

    With the identity for activation and dense, the last norm's gain and bias move into the head's norm. Normalising
    twice changes a token by norm_eps * (1 - 1 / variance) / 2 of itself: 5e-6 at most where the variance of what the
    blocks gave is above 1/2.
    """
    for name, tensor in weights:
        if (own := name.removeprefix(BACKBONE)) in ("norm.weight", "norm.bias"):
            yield HEAD + own, tensor
            yield name, torch.ones_like(tensor) if own == "norm.weight" else torch.zeros_like(tensor)
        else:
            yield name.replace("qa_outputs", "linear"), tensor
        if own == "norm.weight":  # of scales, all zero: norms have none, and nor has this
            yield HEAD + "dense.weight", torch.eye(config.dim, dtype=tensor.dtype) * tensor.any()
            if config.bias:
                yield HEAD + "dense.bias", torch.zeros_like(tensor)


def _belongs(rule: Rule, class_name: str, heads: tuple[str, ...]) -> bool:
    """Whether the class has this parameter."""
    if rule.of_head:
        return bool(heads) and rule.theirs[0].startswith(heads)
    return class_name in _WITH_POOLER or not rule.theirs[0].startswith("pooler.")


# ------------------------------------------------------------------------------------------------- refusals


def _check(config: OurModelConfig, family: Family, architecture: str) -> None:
    """Raises ConfigError naming the first field that the family's classes do not have as it is here."""
    if (family.model_type, architecture) not in ARCHITECTURES:
        known = [name for kind, name in ARCHITECTURES if kind == family.model_type]
        raise ConfigError("architecture", architecture, f"no {family.model_type} of that", f"one of {', '.join(known)}")
    for field, possible in _possible(config, family, architecture).items():
        value = getattr(config, field)
        if value not in possible:
            wanted = " or ".join(str(choice).lower() for choice in possible)
            raise ConfigError(
                f"model.{field}", value, f"transformers has no class for it: its {_TITLES[family.model_type]} has"
                f" {field}={wanted}",
            )  # fmt: skip
    if isinstance(config, EncoderConfig):
        name = ARCHITECTURES[family.model_type, architecture][0]
        reads_pooled = architecture == "classification" or (config.pooler and name in _WITH_POOLER)
        if config.pooling != "first" and reads_pooled:
            problem = f"transformers' {name} reads the first token"
            raise ConfigError("model.pooling", config.pooling, problem, "train with model.pooling=first")
        if name in _NEED_POOLER and not config.pooler:
            raise ConfigError("model.pooler", False, f"transformers' {name} has one")
        if name in _HAVE_NO_POOLER and config.pooler:
            raise ConfigError("model.pooler", True, f"transformers' {name} has none", "train with model.pooler=false")
        if family is not MODERNBERT and not config.token_types:
            raise ConfigError("model.token_types", 0, f"transformers' {name} has one at least")


_TITLES = {
    "gpt2": "GPT-2, which learned positions mean,",
    "llama": "Llama, which rotary positions mean,",
    "bert": "BERT",
    "roberta-prelayernorm": "RoBERTa-PreLayerNorm, which norm_first with learned positions means,",
    "modernbert": "ModernBERT, which an encoder's rotary positions mean,",
    "pegasus": "Pegasus, which an encoder-decoder means,",
}


def _possible(config: OurModelConfig, family: Family, architecture: str) -> dict[str, tuple[Any, ...]]:
    if isinstance(config, Seq2SeqConfig):
        return seq2seq.POSSIBLE
    if family is MODERNBERT:
        return {
            "norm": ("layernorm",),
            "norm_first": (True,),
            "activation": ("geglu", "swiglu"),
            "token_types": (0,),
        }
    if isinstance(config, EncoderConfig):
        exact = family is ROBERTA and architecture in ("masked_lm", "pretraining")  # its head has no other gelu
        return {
            "norm": ("layernorm",),
            "activation": ("gelu",) if exact else ("gelu", "gelu_tanh"),
            "bias": (True,),
        }
    if family is GPT2:
        return {
            "norm": ("layernorm",),
            "activation": ("gelu_tanh", "gelu"),
            "bias": (True,),
            "n_kv_heads": (None, config.n_heads),
        }
    return {"norm": ("rmsnorm",), "activation": ("swiglu",)}


# -------------------------------------------------------------------------------------------------- configs


def _gpt2(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_seq_len,
        "n_embd": config.dim,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.ffn_dim or 4 * config.dim,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else "gelu",
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _shape(config: DecoderConfig | EncoderConfig) -> dict[str, Any]:
    """What Llama, BERT and ModernBERT have by the same names."""
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.ffn_dim or 4 * config.dim,
    }


def _llama(config: DecoderConfig) -> dict[str, Any]:
    return {
        **_shape(config),
        "num_key_value_heads": config.n_kv_heads or config.n_heads,
        "head_dim": head_dim(config),
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "attention_dropout": config.dropout,
        "rope_theta": config.rope_theta,  # where transformers 4 looks for it, as for the next
        "rope_scaling": _rope(config) if config.rope_scaling is not None else None,
        "rope_parameters": _rope(config),
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _rope(config: DecoderConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    kind = "default" if scaling is None else scaling.kind
    settings = {theirs: getattr(scaling, ours) for theirs, ours in ROPE_SCALINGS[kind].items()}
    return {"rope_type": kind, "rope_theta": config.rope_theta} | settings


def _bert(config: EncoderConfig) -> dict[str, Any]:
    return {
        **_shape(config),
        "hidden_act": "gelu_new" if config.activation == "gelu_tanh" else "gelu",
        "layer_norm_eps": config.norm_eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "type_vocab_size": config.token_types,
        "position_embedding_type": "absolute",
        "initializer_range": config.init_std,
        "tie_word_embeddings": True,
    }


def _modernbert(config: EncoderConfig) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return {
        **_shape(config),
        "hidden_activation": "gelu" if config.activation == "geglu" else "silu",
        "norm_eps": config.norm_eps,
        "norm_bias": config.bias,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "classifier_bias": config.bias,
        "decoder_bias": True,
        "classifier_activation": "gelu",
        "classifier_pooling": "cls",
        "embedding_dropout": config.dropout,
        "attention_dropout": config.dropout,
        "mlp_dropout": config.dropout,
        "layer_types": ["full_attention"] * config.n_layers,
        "rope_parameters": {"full_attention": rope, "sliding_attention": rope},
        "global_attn_every_n_layers": 1,  # where transformers 4 looks for it, as for the next
        "global_rope_theta": config.rope_theta,
        "cls_token_id": None,
        "sep_token_id": None,
        "initializer_range": config.init_std,
        "tie_word_embeddings": True,
    }


_DECODERS = {GPT2.model_type: _gpt2, LLAMA.model_type: _llama}
