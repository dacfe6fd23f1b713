"""Our model -> the config.json and the tensors that a class of transformers loads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bigtrain.config import DecoderConfig, EncoderConfig, OurModelConfig, Seq2SeqConfig, head_dim
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.models.huggingface.names import BACKBONE, GPT2, LLAMA, Family, Rule, family_of, qkv_rows, split_rows

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
}
_WITHOUT_POOLER = ("BertForMaskedLM", "BertForTokenClassification", "BertForQuestionAnswering")
_NEED_POOLER = ("BertForPreTraining", "BertForSequenceClassification")


def to_huggingface(
    config: OurModelConfig,
    weights: Iterable[tuple[str, Tensor]],
    architecture: str,
    labels: list[str] | None = None,
    problem_type: str | None = None,
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """(config.json, (their name, tensor) one at a time) of our model.

    architecture: causal_lm, base, masked_lm, pretraining (masked words and pairs), classification, tagging or
    question_answering.
    labels: of classification and tagging, in the order of the head's outputs; problem_type as transformers has it
    (regression, single_label_classification).
    Raises ConfigError naming the field that no class of transformers has. While iterated: BigtrainError for a weight
    that is missing or that the config does not have.
    """
    family = family_of(config)
    _check(config, family, architecture)
    config, weights = _with_all_heads(config, family, weights)
    name, heads = ARCHITECTURES[family.model_type, architecture]
    settings: dict[str, Any] = {"architectures": [name], "model_type": family.model_type}
    # Named, for transformers would fill in the ids of its own GPT-2, Llama and BERT.
    settings |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if isinstance(config, DecoderConfig):
        settings |= _DECODERS[family.model_type](config)
    elif isinstance(config, EncoderConfig):
        settings |= _bert(config)
    if architecture in ("classification", "tagging"):
        labels = labels or ["LABEL_0"]
        settings["id2label"] = {str(index): label for index, label in enumerate(labels)}
        settings["label2id"] = {label: index for index, label in enumerate(labels)}
        if problem_type is not None:
            settings["problem_type"] = problem_type
    prefix = family.prefix if heads else ""
    return settings, _rename(config, family, weights, prefix, name, heads)


def _rename(
    config: OurModelConfig,
    family: Family,
    weights: Iterable[tuple[str, Tensor]],
    prefix: str,
    class_name: str,
    heads: tuple[str, ...],
) -> Iterator[tuple[str, Tensor]]:
    rules = {rule.ours: rule for rule in family.rules(config)}
    missing = {ours for ours, rule in rules.items() if _belongs(rule, class_name, heads)}
    for given, tensor in weights:
        ours = given if given in rules else BACKBONE + given
        if ours not in rules:
            raise BigtrainError(f"the checkpoint's parameter {given} is none of {class_name}'s")
        missing.discard(ours)
        rule = rules[ours]
        if not _belongs(rule, class_name, heads):
            continue
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


def _belongs(rule: Rule, class_name: str, heads: tuple[str, ...]) -> bool:
    """Whether the class has this parameter."""
    if rule.of_head:
        return bool(heads) and rule.theirs[0].startswith(heads)
    return not (class_name in _WITHOUT_POOLER and rule.theirs[0].startswith("pooler."))


# ------------------------------------------------------------------------------------------------- refusals


def _check(config: OurModelConfig, family: Family, architecture: str) -> None:
    """Raises ConfigError naming the first field that the family's classes do not have as it is here."""
    if (family.model_type, architecture) not in ARCHITECTURES:
        known = [name for kind, name in ARCHITECTURES if kind == family.model_type]
        raise ConfigError("architecture", architecture, f"no {family.model_type} of that", f"one of {', '.join(known)}")
    for field, possible in _possible(config, family).items():
        value = getattr(config, field)
        if value not in possible:
            wanted = " or ".join(str(choice).lower() for choice in possible)
            raise ConfigError(
                f"model.{field}", value, f"transformers has no class for it: its {_TITLES[family.model_type]} has"
                f" {field}={wanted}",
            )  # fmt: skip
    if isinstance(config, EncoderConfig):
        name = ARCHITECTURES[family.model_type, architecture][0]
        if name in _NEED_POOLER and not config.pooler:
            raise ConfigError("model.pooler", False, f"transformers' {name} has one")
        if not config.token_types:
            raise ConfigError("model.token_types", 0, "transformers' BERT has one at least")


_TITLES = {
    "gpt2": "GPT-2, which learned positions mean,",
    "llama": "Llama, which rotary positions mean,",
    "bert": "BERT",
}


def _possible(config: OurModelConfig, family: Family) -> dict[str, tuple[Any, ...]]:
    if isinstance(config, EncoderConfig):
        return {
            "positions": ("learned",),
            "norm": ("layernorm",),
            "norm_first": (False,),
            "activation": ("gelu", "gelu_tanh"),
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


def _llama(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads or config.n_heads,
        "head_dim": head_dim(config),
        "intermediate_size": config.ffn_dim or 4 * config.dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "attention_dropout": config.dropout,
        "rope_theta": config.rope_theta,  # where transformers 4 looks for it
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _bert(config: EncoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.ffn_dim or 4 * config.dim,
        "hidden_act": "gelu_new" if config.activation == "gelu_tanh" else "gelu",
        "layer_norm_eps": config.norm_eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "type_vocab_size": config.token_types,
        "position_embedding_type": "absolute",
        "initializer_range": config.init_std,
        "tie_word_embeddings": True,
    }


_DECODERS = {GPT2.model_type: _gpt2, LLAMA.model_type: _llama}
