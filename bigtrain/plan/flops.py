"""Floating-point operations of a training step, counted matmul by matmul.

Two counts, kept apart. Model FLOPs are what the architecture asks for: forward and backward, nothing twice; MFU
divides by them (PaLM, arXiv 2204.02311, appendix B). Hardware FLOPs are those, and what is computed a second time: the
scores in flash attention's backward pass (arXiv 2205.14135, section 3.1), with activation checkpointing every block's
forward (arXiv 2205.05198, section 6); HFU divides by them. Both count the full square of the scores, as both papers
do, though a causal kernel does half of it: so HFU is never below MFU. How long a step takes goes by what is really
computed (`Scores.computed`). A multiplication and its addition are two operations; norms, activations and residuals are
counted as memory traffic instead (`elementwise_bytes`), which is what they cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from bigtrain.config import (
    Config,
    DecoderConfig,
    EncoderConfig,
    HuggingFaceConfig,
    MaskedLMConfig,
    ModelConfig,
    OurModelConfig,
    PretrainedConfig,
    Seq2SeqConfig,
    head_dim,
)
from bigtrain.errors import ConfigError
from bigtrain.plan import lengths

GATED = ("swiglu", "geglu")


@dataclass(frozen=True)
class Matmul:
    """`count` products (rows, inputs) x (inputs, outputs) of one micro-batch's forward pass."""

    part: str  # attention, feed_forward, head, pooler
    rows: float
    inputs: int
    outputs: int
    count: int
    in_block: bool = True
    # By activation checkpointing. The block's last matmul is not where nothing that follows it is needed for gradients:
    # torch stops early (torch.utils.checkpoint, `early_stop`).
    again: bool = True

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inputs * self.outputs * self.count


@dataclass(frozen=True)
class Scores:
    """`count` layers of softmax(Q K^T) V: queries (sequences, heads, queries, head_dim) against as many heads' keys."""

    sequences: float
    heads: int
    queries: int
    keys: int
    head_dim: int
    causal: bool
    count: int

    @property
    def square(self) -> float:
        """Forward operations with every query against every key: two matmuls of 2 Tq Tk head_dim each."""
        return 4.0 * self.sequences * self.heads * self.queries * self.keys * self.head_dim * self.count

    @property
    def computed(self) -> float:
        """Forward operations of a kernel that leaves out what a causal mask hides: (T + 1) / 2 keys a query."""
        return self.square * (self.queries + 1) / (2 * self.queries) if self.causal else self.square


@dataclass(frozen=True)
class Operations:
    """One micro-batch's forward pass through a model."""

    tokens: int  # of the micro-batch; a source's and a target's together
    matmuls: tuple[Matmul, ...]
    scores: tuple[Scores, ...]


@dataclass(frozen=True)
class Flops:
    """Of one micro-batch on one rank, forward and backward, in operations, scores as the full square."""

    tokens: int
    forward: dict[str, float]  # part -> of the forward pass
    model: float  # what MFU counts
    hardware: float  # what HFU counts: `model`, and what is computed again
    recomputed: float  # of `hardware`, what activation checkpointing adds

    @property
    def model_per_token(self) -> float:
        return self.model / self.tokens


def our_model(model: ModelConfig | PretrainedConfig) -> OurModelConfig:
    """The model as one of this package's architectures, with a vocabulary.

    Raises ConfigError for one whose shape is in files that are not read here, or whose vocabulary is not set.
    """
    if isinstance(model, (HuggingFaceConfig, PretrainedConfig)):
        raise ConfigError("model.kind", model.kind, "only the built-in architectures can be planned")
    if model.vocab_size is None:
        raise ConfigError("model.vocab_size", None, "needed to plan", "set it, or name a model that has one")
    return model


def sequence_length(config: Config) -> int:
    """Tokens of a training sequence (of a source, and of a target) in the mean, padding counted: of labelled examples
    as their prepared data has them, else the longest that the model or the task takes."""
    known = lengths.of(config)
    return _allowed(config) if known is None else known.typical


def longest_sequence(config: Config, held_out: bool = False) -> int:
    """Tokens of the longest training sequence, or of the longest that is held out."""
    known = lengths.of(config)
    if known is None:
        return _allowed(config)
    return known.longest_held_out if held_out else known.longest


def _allowed(config: Config) -> int:
    longest = our_model(config.model).max_seq_len
    return min(longest, getattr(config.task, "max_length", None) or longest)


def shortened(config: Config) -> Config | None:
    """`config` with sequences an eighth as long, where they are only known to be no longer than the model takes: the
    short end of what a step may take. None where the lengths are known."""
    if not lengths.unknown(config):
        return None
    short = max(8, _allowed(config) // 8)
    return replace(config, model=replace(config.model, max_seq_len=short), task=_of_length(config.task, short))


def _of_length(task: Any, most: int) -> Any:
    return replace(task, max_length=most) if getattr(task, "max_length", None) else task


def operations(config: Config, sequences: int) -> Operations:
    """What so many `sequences` cost in a forward pass with the loss."""
    model, length = our_model(config.model), sequence_length(config)
    tokens = (2 if isinstance(model, Seq2SeqConfig) else 1) * sequences * length
    return Operations(
        tokens, tuple(_matmuls(config, model, sequences, length)), tuple(_scores(model, sequences, length))
    )


def _matmuls(config: Config, model: OurModelConfig, sequences: int, length: int) -> Iterator[Matmul]:
    rows, dim, head_size = sequences * length, model.dim, head_dim(model)
    assert model.vocab_size is not None
    kv_heads = (isinstance(model, DecoderConfig) and model.n_kv_heads) or model.n_heads
    layers = model.n_layers + (model.n_decoder_layers if isinstance(model, Seq2SeqConfig) else 0)
    ffn_dim = model.ffn_dim or 4 * dim
    yield Matmul("attention", rows, dim, (model.n_heads + 2 * kv_heads) * head_size, layers)
    yield Matmul("attention", rows, model.n_heads * head_size, dim, layers)
    yield Matmul("feed_forward", rows, dim, ffn_dim * (2 if model.activation in GATED else 1), layers)
    norm_first = not isinstance(model, EncoderConfig) or model.norm_first
    yield Matmul("feed_forward", rows, ffn_dim, dim, layers, again=not norm_first or model.dropout > 0)
    if isinstance(model, Seq2SeqConfig):
        yield Matmul("attention", rows, dim, dim, 2 * model.n_decoder_layers)  # cross-attention: query and out
        yield Matmul("attention", rows, dim, 2 * dim, model.n_decoder_layers)  # keys and values of the source
    if isinstance(model, EncoderConfig):
        if isinstance(config.task, MaskedLMConfig):  # only what is masked is scored (models/heads.py)
            scored = rows * config.task.mask_fraction
            yield Matmul("head", scored, dim, dim, 1, in_block=False)
            yield Matmul("head", scored, dim + 8, model.vocab_size, 1, in_block=False)
        if model.pooler and (
            config.task.kind == "classification" or getattr(config.task, "sentence", "none") != "none"
        ):
            yield Matmul("pooler", sequences, dim, dim, 1, in_block=False)
    else:
        yield Matmul("head", rows, dim, model.vocab_size, 1, in_block=False)


def _scores(model: OurModelConfig, sequences: int, length: int) -> Iterator[Scores]:
    size, causal = head_dim(model), isinstance(model, DecoderConfig)
    yield Scores(sequences, model.n_heads, length, length, size, causal, model.n_layers)
    if isinstance(model, Seq2SeqConfig):
        yield Scores(sequences, model.n_heads, length, length, size, True, model.n_decoder_layers)
        yield Scores(sequences, model.n_heads, length, length, size, False, model.n_decoder_layers)


FLASH_BACKWARD = 2.5  # of the forward: five matmuls (scores again, dV, dP, dQ, dK) against two (arXiv 2205.14135)


def count(config: Config, sequences: int) -> Flops:
    """Forward and backward of one micro-batch of `sequences`.

    model = 3 (sum of 2 m n k + 4 T^2 dim layers): a backward pass is two matmuls for each of the forward's.
    Weights that are not trained (train.lora) need no gradient of their own: one of the two falls away.
    """
    work = operations(config, sequences)
    forward: dict[str, float] = {}
    for matmul in work.matmuls:
        forward[matmul.part] = forward.get(matmul.part, 0.0) + matmul.flops
    forward["scores"] = sum(scores.square for scores in work.scores)
    backward = 1.0 if config.train.lora.rank else 2.0
    model = 3 * forward["scores"]
    for matmul in work.matmuls:
        model += matmul.flops * (1 + (backward if matmul.in_block else 2.0))
    recomputed = 0.0
    if config.train.activation_checkpointing:
        recomputed = sum(m.flops for m in work.matmuls if m.in_block and m.again) + forward["scores"]
    hardware = model + (FLASH_BACKWARD - 2) * forward["scores"] + recomputed
    return Flops(work.tokens, forward, model, hardware, recomputed)


def elementwise_bytes(config: Config, sequences: int, element_bytes: int) -> float:
    """Memory traffic of a forward pass's norms, residuals, activations, rotations and loss, in bytes; the backward
    pass moves about twice as much. Each kernel reads its inputs and writes its output once, nothing being fused, which
    is how eager PyTorch runs."""
    model, length = our_model(config.model), sequence_length(config)
    tokens = operations(config, sequences).tokens
    ffn_dim = model.ffn_dim or 4 * model.dim
    per_layer = 2 * 2 * model.dim  # two norms: read, write
    per_layer += 2 * 3 * model.dim  # two residual sums: read two, write one
    per_layer += (5 if model.activation in GATED else 2) * ffn_dim  # act(gate) * value, or act(x)
    if getattr(model, "positions", "") == "rotary":
        per_layer += 2 * 5 * model.dim  # queries and keys, each by cos and sin
    if model.dropout:
        per_layer += 2 * 2 * model.dim
    per_token = float(model.n_layers * per_layer)
    if isinstance(model, Seq2SeqConfig):  # half of the tokens in each of the two stacks, one more norm and sum
        per_token = (model.n_layers * per_layer + model.n_decoder_layers * (per_layer + 5 * model.dim)) / 2
    head = max(
        (m for m in operations(config, sequences).matmuls if m.part == "head"), key=lambda m: m.outputs, default=None
    )
    logits = 3.0 * head.rows * head.outputs if head else 0.0  # written, read and overwritten by their gradient
    return element_bytes * (tokens * per_token + logits + 2.0 * sequences * length * model.dim)


def padded(size: float, tile: int) -> float:
    """A dimension as a kernel's tiles cover it."""
    return math.ceil(size / tile) * tile
