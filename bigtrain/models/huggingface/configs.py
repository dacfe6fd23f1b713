"""config.json -> our model's config. What our models cannot do exactly is refused, never approximated."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from bigtrain.config import (
    DecoderConfig,
    EncoderConfig,
    LinearScalingConfig,
    Llama3ScalingConfig,
    OurModelConfig,
    RopeScalingConfig,
    Seq2SeqConfig,
)
from bigtrain.errors import ConfigError
from bigtrain.models.huggingface import seq2seq
from bigtrain.models.huggingface.importing import check_copies, open_weights
from bigtrain.models.huggingface.names import ROPE_SCALINGS

logger = logging.getLogger(__name__)

Refuse = Callable[[str, Any, str], ConfigError]
Gelu = Literal["gelu", "gelu_tanh"]
GELU: dict[str, Gelu] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
GATED: dict[str, Literal["geglu", "swiglu"]] = {"gelu": "geglu", "silu": "swiglu"}


def read_values(directory: Path, key: str) -> tuple[dict[str, Any], Any]:
    """What config.json says, and its model_type. Raises ConfigError, naming `key`, where there is none to read."""
    try:
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return values, values.get("model_type")
    except FileNotFoundError:
        raise ConfigError(key, str(directory), "no config.json there", "name a Hugging Face directory") from None
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(key, str(directory), f"its config.json cannot be read ({error})") from None


def read_config(directory: Path, key: str = "init_from") -> OurModelConfig:
    """The config of the model in a Hugging Face directory; `key` is what errors name.

    Its defaults and older spellings are resolved as transformers does. Raises ConfigError for a directory without
    config.json or with pickled weights only, an architecture that is not ours, or a setting that we cannot express;
    BigtrainError where there are no weights.
    """
    values, kind = read_values(directory, key)
    if kind not in _READERS:
        way_out = f"one of {', '.join(_READERS)} is wanted; model=hf trains others in transformers' code"
        raise ConfigError(key, str(directory), f"its model_type is {kind}", way_out)

    def refuse(name: str, value: Any, problem: str) -> ConfigError:
        return ConfigError(key, str(directory), f"its config.json has {name}={value}: {problem}")

    if values.get("quantization_config") is not None:
        raise refuse("quantization_config", "...", "its weights are quantized; take the original ones")
    try:
        theirs = _their_class(kind).from_dict(values)
        config = _READERS[kind](theirs, refuse)
    except ConfigError:
        raise
    except Exception as error:  # transformers checks types and values, and raises many kinds
        raise ConfigError(key, str(directory), f"its config.json is no {kind}'s ({_one_line(error)})") from None
    stored = open_weights(directory, key)
    names = stored.names
    if isinstance(config, Seq2SeqConfig) and (name := seq2seq.learned_constant(config, stored)):
        problem = f"has learned {name}, which our encoder-decoder computes"
        raise ConfigError(key, str(directory), problem, "take model=hf")
    if isinstance(config, EncoderConfig):
        # config.json does not say which
        config.pooler = any(name.endswith(("pooler.dense.weight", "classifier.dense.weight")) for name in names)
        masked_words = any(name.startswith(("cls.predictions.", "lm_head.", "decoder.")) for name in names)
        if masked_words and not theirs.tie_word_embeddings:
            raise refuse("tie_word_embeddings", False, "our head for masked words shares the token embedding")
        if masked_words and kind == "roberta-prelayernorm" and config.activation != "gelu":
            raise refuse("hidden_act", theirs.hidden_act, "its head for masked words has gelu, ours as the layers")
        if kind == "modernbert" and "classifier.weight" in names:
            problem = "before its classifier is a layer that our heads do not have; model=hf takes it as it is"
            raise refuse("architectures", theirs.architectures, problem)
    check_copies(stored, config, key)
    return config


def _their_class(kind: str) -> Any:
    # One by one: transformers' top level takes seconds longer.
    if kind == "gpt2":
        from transformers.models.gpt2.configuration_gpt2 import GPT2Config as Theirs
    elif kind == "bert":
        from transformers.models.bert.configuration_bert import BertConfig as Theirs
    elif kind == "pegasus":
        from transformers.models.pegasus.configuration_pegasus import PegasusConfig as Theirs
    elif kind == "roberta-prelayernorm":
        from transformers.models.roberta_prelayernorm.configuration_roberta_prelayernorm import (
            RobertaPreLayerNormConfig as Theirs,
        )
    elif kind == "modernbert":
        from transformers.models.modernbert.configuration_modernbert import ModernBertConfig as Theirs
    elif kind == "mistral":
        from transformers.models.mistral.configuration_mistral import MistralConfig as Theirs
    else:
        from transformers.models.llama.configuration_llama import LlamaConfig as Theirs
    return Theirs


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _gpt2(theirs: Any, refuse: Refuse) -> DecoderConfig:
    for name, value in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    ):
        if getattr(theirs, name) != value:
            raise refuse(name, getattr(theirs, name), "our attention does not do that")
    return DecoderConfig(
        dim=theirs.n_embd,
        n_layers=theirs.n_layer,
        n_heads=theirs.n_head,
        ffn_dim=theirs.n_inner or 4 * theirs.n_embd,
        vocab_size=theirs.vocab_size,
        max_seq_len=theirs.n_positions,
        norm_eps=theirs.layer_norm_epsilon,
        activation=_gelu("activation_function", theirs.activation_function, refuse),
        tie_embeddings=theirs.tie_word_embeddings,
        dropout=_dropout(theirs, "resid_pdrop", "embd_pdrop", "attn_pdrop"),
        init_std=theirs.initializer_range,
    )


def _llama(theirs: Any, refuse: Refuse) -> DecoderConfig:
    """Llama, and Mistral where it attends to the whole context."""
    theta, scaling = _rope(theirs.rope_parameters or {}, refuse)
    if theirs.hidden_act != "silu":
        raise refuse("hidden_act", theirs.hidden_act, "our gated feed-forward layer has silu (swiglu)")
    window = getattr(theirs, "sliding_window", None)
    if window is not None and window < theirs.max_position_embeddings:
        raise refuse("sliding_window", window, "our attention sees the whole context")
    bias = getattr(theirs, "attention_bias", False)
    if bias != getattr(theirs, "mlp_bias", False):
        raise refuse("attention_bias", bias, "our layers have biases everywhere or nowhere")
    return DecoderConfig(
        dim=theirs.hidden_size,
        n_layers=theirs.num_hidden_layers,
        n_heads=theirs.num_attention_heads,
        n_kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim if theirs.head_dim * theirs.num_attention_heads != theirs.hidden_size else None,
        ffn_dim=theirs.intermediate_size,
        vocab_size=theirs.vocab_size,
        max_seq_len=theirs.max_position_embeddings,
        positions="rotary",
        rope_theta=theta,
        rope_scaling=scaling,
        norm="rmsnorm",
        norm_eps=theirs.rms_norm_eps,
        activation="swiglu",
        bias=bias,
        tie_embeddings=theirs.tie_word_embeddings,
        dropout=float(theirs.attention_dropout or 0.0),
        init_std=theirs.initializer_range,
    )


def _rope(parameters: dict[str, Any], refuse: Refuse) -> tuple[float, RopeScalingConfig | None]:
    rope = dict(parameters)
    theta = float(rope.pop("rope_theta", 10_000.0))
    rope.pop("type", None)  # the older name of rope_type, which transformers fills in from it
    kind, partial = rope.pop("rope_type", "default"), rope.pop("partial_rotary_factor", 1.0)
    names = ROPE_SCALINGS.get(kind)
    if names is None or rope.keys() != names.keys() or partial != 1.0:
        raise refuse("rope_scaling", parameters, f"our rotary positions know {', '.join(ROPE_SCALINGS)}")
    settings = {ours: rope[name] for name, ours in names.items()}
    if kind == "default":
        return theta, None
    return theta, LinearScalingConfig(**settings) if kind == "linear" else Llama3ScalingConfig(**settings)


def _bert(theirs: Any, refuse: Refuse) -> EncoderConfig:
    position_type = getattr(theirs, "position_embedding_type", "absolute")  # of older versions
    if position_type != "absolute":
        raise refuse("position_embedding_type", position_type, "our positions are absolute")
    for name in ("is_decoder", "add_cross_attention"):
        if getattr(theirs, name):
            raise refuse(name, True, "our encoder is none of a translation model")
    return EncoderConfig(
        dim=theirs.hidden_size,
        n_layers=theirs.num_hidden_layers,
        n_heads=theirs.num_attention_heads,
        ffn_dim=theirs.intermediate_size,
        vocab_size=theirs.vocab_size,
        max_seq_len=theirs.max_position_embeddings,
        token_types=theirs.type_vocab_size,
        norm_eps=theirs.layer_norm_eps,
        activation=_gelu("hidden_act", theirs.hidden_act, refuse),
        dropout=_dropout(theirs, "hidden_dropout_prob", "attention_probs_dropout_prob"),
        init_std=theirs.initializer_range,
    )


def _pegasus(theirs: Any, refuse: Refuse) -> Seq2SeqConfig:
    for name, value, problem in (
        ("scale_embedding", True, "our encoder-decoder scales its embeddings"),
        ("tie_word_embeddings", True, "our encoder-decoder has one table for source, target and logits"),
        ("decoder_attention_heads", theirs.encoder_attention_heads, "our decoder has as many heads as the encoder"),
        ("decoder_ffn_dim", theirs.encoder_ffn_dim, "our decoder's layers are as wide as the encoder's"),
    ):
        if getattr(theirs, name) != value:
            raise refuse(name, getattr(theirs, name), problem)
    activation = theirs.activation_function
    return Seq2SeqConfig(
        dim=theirs.d_model,
        n_layers=theirs.encoder_layers,
        n_decoder_layers=theirs.decoder_layers,
        n_heads=theirs.encoder_attention_heads,
        ffn_dim=theirs.encoder_ffn_dim,
        vocab_size=theirs.vocab_size,
        max_seq_len=theirs.max_position_embeddings,
        activation="relu" if activation == "relu" else _gelu("activation_function", activation, refuse),
        dropout=_dropout(theirs, "dropout", "attention_dropout"),
        init_std=theirs.init_std,
    )


def _roberta(theirs: Any, refuse: Refuse) -> EncoderConfig:
    if theirs.pad_token_id is None:
        raise refuse("pad_token_id", None, "its positions begin after it")
    longest = theirs.max_position_embeddings - theirs.pad_token_id - 1
    return replace(_bert(theirs, refuse), norm_first=True, max_seq_len=longest)


def _modernbert(theirs: Any, refuse: Refuse) -> EncoderConfig:
    if set(theirs.layer_types) != {"full_attention"}:
        raise refuse("local_attention", theirs.local_attention, "our attention sees the whole text in every layer")
    if theirs.hidden_activation not in GATED:
        raise refuse("hidden_activation", theirs.hidden_activation, f"one of {', '.join(GATED)} is wanted")
    if theirs.classifier_activation != "gelu":
        raise refuse("classifier_activation", theirs.classifier_activation, "our head for masked words has gelu")
    theta, scaling = _rope(theirs.rope_parameters["full_attention"], refuse)
    if scaling is not None:
        raise refuse("rope_scaling", theirs.rope_parameters, "our encoder's rotary positions are not scaled")
    for name in ("norm_bias", "mlp_bias", "classifier_bias"):
        if getattr(theirs, name) != theirs.attention_bias:
            raise refuse(name, getattr(theirs, name), "our layers have biases everywhere or nowhere")
    return EncoderConfig(
        dim=theirs.hidden_size,
        n_layers=theirs.num_hidden_layers,
        n_heads=theirs.num_attention_heads,
        ffn_dim=theirs.intermediate_size,
        vocab_size=theirs.vocab_size,
        max_seq_len=theirs.max_position_embeddings,
        positions="rotary",
        rope_theta=theta,
        token_types=0,
        norm_eps=theirs.norm_eps,
        norm_first=True,
        activation=GATED[theirs.hidden_activation],
        bias=theirs.attention_bias,
        dropout=_dropout(theirs, "mlp_dropout", "embedding_dropout", "attention_dropout"),
        init_std=theirs.initializer_range,
    )


def _gelu(name: str, value: Any, refuse: Refuse) -> Gelu:
    if value not in GELU:
        raise refuse(name, value, f"one of {', '.join(GELU)} is wanted")
    return GELU[value]


def _dropout(theirs: Any, *names: str) -> float:
    """Our one dropout: the first of theirs. It does not touch what the model computes, only how it goes on learning."""
    values = {name: float(getattr(theirs, name)) for name in names}
    if len(set(values.values())) > 1:
        told = ", ".join(f"{name}={value}" for name, value in values.items())
        logger.warning("the model has several dropouts (%s); here all are %s", told, values[names[0]])
    return values[names[0]]


_READERS: dict[str, Callable[[Any, Refuse], OurModelConfig]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _llama,
    "bert": _bert,
    "roberta-prelayernorm": _roberta,
    "modernbert": _modernbert,
    "pegasus": _pegasus,
}
