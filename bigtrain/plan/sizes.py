"""Every parameter of a model by name, shape and part, without building it.

The list is that of `named_parameters()` of the real module, in its order, shared ones once: ZeRO pads parameter by
parameter, so that a sum would not do. Tests hold it to the modules, and the sums to published integers.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

from bigtrain import config as schema
from bigtrain.compress_config import CompressConfig
from bigtrain.config import (
    Config,
    DecoderConfig,
    EncoderConfig,
    HuggingFaceConfig,
    LoRAConfig,
    MaskedLMConfig,
    ModelConfig,
    OurModelConfig,
    Seq2SeqConfig,
    head_dim,
    starts_normed,
)
from bigtrain.errors import ConfigError

VOCABULARY_MULTIPLE = 64  # as launch/train.py rounds the tokenizer's
LABELS = 2  # of a classifier or tagger whose data is not prepared yet: a few thousand parameters at most

FORMULAS = {  # of each part, in the symbols of the config
    "embedding": "(vocab_size + token_types) x dim",
    "positions": "max_seq_len x dim",
    "attention": "layers x ((heads + 2 kv_heads) x head_dim x dim + heads x head_dim x dim), and biases",
    "feed_forward": "layers x 2 dim x ffn_dim (3 where gated), and biases",
    "norms": "dim each, twice where there is a bias",
    "head": "the task's layers, or an untied vocab_size x dim",
    "lora": "rank x (inputs + outputs) of each layer chosen",
}


@dataclass(frozen=True)
class Parameter:
    """One tensor of weights."""

    name: str
    shape: tuple[int, ...]
    part: str  # embedding, positions, attention, feed_forward, norms, head, lora
    trained: bool = True

    @cached_property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def hidden(self) -> bool:
        """Whether it is a matrix of one of the layers: those are what Muon steps (engine/optimizers.py)."""
        return len(self.shape) >= 2 and "blocks." in self.name


@dataclass(frozen=True)
class Sizes:
    """The parameters of the model that a config trains, its task's head included."""

    parameters: tuple[Parameter, ...]

    @cached_property
    def total(self) -> int:
        return sum(each.count for each in self.parameters)

    @cached_property
    def trained(self) -> int:
        return sum(each.count for each in self.parameters if each.trained)

    @cached_property
    def hidden(self) -> int:
        """Of the trained, those in matrices of the layers."""
        return sum(each.count for each in self.parameters if each.trained and each.hidden)

    def by_part(self) -> dict[str, int]:
        parts: dict[str, int] = {}
        for each in self.parameters:
            parts[each.part] = parts.get(each.part, 0) + each.count
        return parts


def with_vocabulary(config: Config) -> Config:
    """`config` with the model's vocabulary as `train` will set it, as far as it is known before the data is prepared.

    Raises ConfigError for an architecture that is transformers', which has no closed form here.
    """
    if isinstance(config.model, HuggingFaceConfig):
        raise ConfigError("model.kind", "hf", "only the built-in architectures can be planned", "take model=pretrained")
    if config.model.vocab_size is not None:
        return config
    tokenizer = config.data.tokenizer
    file = _tokenizer_file(tokenizer.path) if tokenizer.path else None
    rounded = _rounded(tokenizer.vocab_size if file is None else _words(file))
    return replace(config, model=replace(config.model, vocab_size=rounded))


def guesses_vocabulary(config: Config) -> bool:
    """Whether the vocabulary is that of a tokenizer which is not on this machine: a guess, also once it is set."""
    tokenizer = config.data.tokenizer
    followed = config.model.vocab_size in (None, _rounded(tokenizer.vocab_size))
    return followed and tokenizer.path is not None and _tokenizer_file(tokenizer.path) is None


def _rounded(words: int) -> int:
    return math.ceil(words / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _tokenizer_file(path: str) -> Path | None:
    """As data/tokenizer.py finds it; None for the name of a hub model."""
    given = Path(path).expanduser()
    candidates = (given, given / "tokenizer.json", given / "tokenizer" / "tokenizer.json")
    return next((file for file in candidates if file.is_file()), None)


def _words(file: Path) -> int:
    """Rows that a tokenizer's ids need (data/tokenizer.vocabulary_size), without the library. Raises ConfigError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]  # of Unigram a list, else token -> id
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        return max([*ids, *(token["id"] for token in content["added_tokens"])]) + 1
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError("data.tokenizer.path", str(file), "is no tokenizer") from None


def teacher(config: Config) -> Config | None:
    """A distillation's teacher as a run on the student's sequences; None without one, and for what is no run here.

    Raises ConfigError if its config.yaml cannot be read.
    """
    distil = config.compress.distil
    if distil is None or distil.teacher is None or not (file := Path(distil.teacher) / "config.yaml").is_file():
        return None
    model = _model_of_run(file)
    if isinstance(model, HuggingFaceConfig):
        return None
    train = replace(config.train, lora=LoRAConfig(), freeze=[])
    return with_vocabulary(replace(config, model=model, train=train, compress=CompressConfig()))


@lru_cache  # a search asks for it at every candidate
def _model_of_run(file: Path) -> ModelConfig:
    return schema.load(file).model


def of_run(config: Config) -> Sizes:
    """What a run of `config` (with its vocabulary set) builds: the model with its task's head, LoRA, frozen weights."""
    model, task = config.model, config.task
    assert not isinstance(model, HuggingFaceConfig)
    if isinstance(model, EncoderConfig):
        sentence = isinstance(task, MaskedLMConfig) and task.sentence != "none"
        pooled = sentence or task.kind == "classification"  # a pooler that nothing reads is not built
        backbone = replace(model, pooler=model.pooler and pooled)
        parameters = [replace(each, name=f"backbone.{each.name}") for each in _encoder(backbone)]
        parameters += _head(config, model)
    else:
        parameters = list(_decoder(model) if isinstance(model, DecoderConfig) else _seq2seq(model))
    if config.train.lora.rank:
        parameters = _with_lora(parameters, config)
    frozen = config.train.freeze
    if frozen:
        parameters = [
            replace(each, trained=each.trained and not any(fnmatch.fnmatch(each.name, pattern) for pattern in frozen))
            for each in parameters
        ]
    return Sizes(tuple(parameters))


def element_bytes(config: Config) -> int:
    """Of a weight as it is multiplied."""
    return 4 if config.train.precision == "fp32" else 2


def of_model(config: OurModelConfig) -> Sizes:
    """The bare architecture, as `models.build` makes it. `config.vocab_size` must be a number."""
    if isinstance(config, Seq2SeqConfig):
        return Sizes(tuple(_seq2seq(config)))
    return Sizes(tuple(_encoder(config) if isinstance(config, EncoderConfig) else _decoder(config)))


# ------------------------------------------------------------------------------------------------ the parts


def _decoder(config: DecoderConfig) -> Iterator[Parameter]:
    vocabulary = config.vocab_size or 0
    yield Parameter("embedding.weight", (vocabulary, config.dim), "embedding")
    if config.positions == "learned":
        yield Parameter("positions.weight", (config.max_seq_len, config.dim), "positions")
    for index in range(config.n_layers):
        yield from _block(config, f"blocks.{index}", config.n_kv_heads or config.n_heads)
    yield from _norm(config, "norm")
    if not config.tie_embeddings:
        yield Parameter("head.weight", (vocabulary, config.dim), "head")


def _encoder(config: EncoderConfig) -> Iterator[Parameter]:
    yield Parameter("embedding.weight", (config.vocab_size or 0, config.dim), "embedding")
    if config.token_types:
        yield Parameter("token_types.weight", (config.token_types, config.dim), "embedding")
    if config.positions == "learned":
        yield Parameter("positions.weight", (config.max_seq_len, config.dim), "positions")
    yield from _norm(config, "embedding_norm")
    for index in range(config.n_layers):
        yield from _block(config, f"blocks.{index}", config.n_heads, normed=starts_normed(config) and index == 0)
    if config.norm_first:
        yield from _norm(config, "norm")
    if config.pooler:
        yield from _linear("pooler", config.dim, config.dim, config.bias, "head")


def _seq2seq(config: Seq2SeqConfig) -> Iterator[Parameter]:
    yield Parameter("embedding.weight", (config.vocab_size or 0, config.dim), "embedding")
    for index in range(config.n_layers):
        yield from _block(config, f"encoder_blocks.{index}", config.n_heads)
    yield from _norm(config, "encoder_norm")
    for index in range(config.n_decoder_layers):
        name = f"decoder_blocks.{index}"
        yield from _block(config, name, config.n_heads)
        yield from _norm(config, f"{name}.cross_attention_norm")
        for layer, outputs in (("query", config.dim), ("key_value", 2 * config.dim), ("out", config.dim)):
            yield from _linear(f"{name}.cross_attention.{layer}", config.dim, outputs, config.bias, "attention")
    yield from _norm(config, "norm")


def _block(config: OurModelConfig, name: str, n_kv_heads: int, normed: bool = False) -> Iterator[Parameter]:
    """normed: its input is normalised already, so that it has no first norm (layers.Block)."""
    dim, head_size = config.dim, head_dim(config)
    ffn_dim = config.ffn_dim or 4 * dim
    rows = 2 * ffn_dim if config.activation in ("swiglu", "geglu") else ffn_dim
    if not normed:
        yield from _norm(config, f"{name}.attention_norm")
    heads = config.n_heads + 2 * n_kv_heads
    yield from _linear(f"{name}.attention.qkv", dim, heads * head_size, config.bias, "attention")
    yield from _linear(f"{name}.attention.out", config.n_heads * head_size, dim, config.bias, "attention")
    yield from _norm(config, f"{name}.feed_forward_norm")
    yield from _linear(f"{name}.feed_forward.up", dim, rows, config.bias, "feed_forward")
    yield from _linear(f"{name}.feed_forward.down", ffn_dim, dim, config.bias, "feed_forward")


def _linear(name: str, inputs: int, outputs: int, bias: bool, part: str) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (outputs, inputs), part)
    if bias:
        yield Parameter(f"{name}.bias", (outputs,), part)


def _norm(config: OurModelConfig, name: str) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (config.dim,), "norms")
    if config.bias and config.norm == "layernorm":
        yield Parameter(f"{name}.bias", (config.dim,), "norms")


def _head(config: Config, model: EncoderConfig) -> Iterator[Parameter]:
    """What a task puts on an encoder (models/heads.py). The masked-token head's own weight is the embedding's."""
    task = config.task
    if isinstance(task, MaskedLMConfig):
        # its own parameters come first, then its layers'; the shared weight was counted with the embedding
        yield Parameter("head.bias", (model.vocab_size or 0,), "head")
        yield from _linear("head.dense", model.dim, model.dim, model.bias, "head")
        yield from (replace(each, part="head") for each in _norm(model, "head.norm"))
        if task.sentence != "none":
            yield from _linear("pair_head.linear", model.dim, 2, True, "head")
    elif task.kind == "question_answering":
        yield from _linear("head.qa_outputs", model.dim, 2, True, "head")
    else:
        outputs = 1 if getattr(task, "regression", False) else LABELS
        yield from _linear("head.linear", model.dim, outputs, True, "head")


def _with_lora(parameters: list[Parameter], config: Config) -> list[Parameter]:
    """models/lora.py: two thin matrices beside each linear layer that is chosen; all else frozen but `train`'s."""
    lora = config.train.lora
    result: list[Parameter] = []
    for position, each in enumerate(parameters):
        layer, _, kind = each.name.rpartition(".")
        result.append(replace(each, trained=any(fnmatch.fnmatch(each.name, pattern) for pattern in lora.train)))
        linear = len(each.shape) == 2 and each.part in ("attention", "feed_forward", "head")
        shared = each.name == "head.weight" and isinstance(config.model, DecoderConfig)  # Head is no linear layer
        if kind == "bias" and position and parameters[position - 1].name == f"{layer}.weight":
            linear, each = len(parameters[position - 1].shape) == 2, parameters[position - 1]
        elif position + 1 < len(parameters) and parameters[position + 1].name == f"{layer}.bias":
            linear = False  # after its bias
        if linear and not shared and any(fnmatch.fnmatch(layer, pattern) for pattern in lora.targets):
            outputs, inputs = each.shape
            result.append(Parameter(f"{layer}.lora_a", (lora.rank, inputs), "lora"))
            result.append(Parameter(f"{layer}.lora_b", (outputs, lora.rank), "lora"))
    return result
