"""The `compress` section of the config: what changes the model while it trains. Each part is off while it is null.

Part of the schema (`config.py`), and like it without torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class RampConfig:
    """How much of a transform holds at a step: a pure function of the step, from 0 to 1 (`compress/schedule.py`)."""

    # constant: all of it from `begin` on; cubic: fast first, slow last (Zhu & Gupta, arXiv 1710.01878, equation 1).
    kind: Literal["constant", "linear", "cubic", "multi_step"] = "cubic"
    begin: int = 0  # the optimizer step after which it first changes anything
    end: int = 0  # linear, cubic: the step from which all of it holds
    every: int = 10  # linear, cubic: steps between two changes
    steps: list[int] = field(default_factory=list)  # multi_step: when it changes ...
    fractions: list[float] = field(default_factory=list)  # ... and to how much of the whole


@dataclass
class PruneConfig:
    """Weights of linear layers held at zero by a mask (unstructured pruning): smaller when packed, not faster."""

    # Which go: magnitude: the smallest |w|; wanda: |w| times the norm of its input, row by row (arXiv 2306.11695);
    # movement: those that training moves towards zero, by the sum of -w * gradient (arXiv 2005.07683).
    method: Literal["magnitude", "wanda", "movement"] = "magnitude"
    sparsity: float = 0.5  # removed (set to zero), of the weights chosen; with `pattern` it follows from that
    scope: Literal["global", "layer"] = "global"  # whether weights compete across layers or within each
    pattern: str | None = None  # N:M, at most N of each M neighbours in a row are kept: "2:4", "4:8"; null: anywhere
    include: list[str] = field(default_factory=lambda: ["*"])  # patterns of linear layers' names
    # Heads, and the pooler that they read: where it was never trained its weights are the smallest, and all would go.
    exclude: list[str] = field(
        default_factory=lambda: ["*head", "*head.*", "*pooler", "*pooler.*", "*classifier*", "*qa_outputs"]
    )
    schedule: RampConfig = field(default_factory=RampConfig)


@dataclass
class DistilConfig:
    """Learn from a larger, trained model besides the data (arXiv 1503.02531). The loss is
    (1 - alpha) * the task's + alpha * (logits * T^2 KL + hidden * distance + attention * KL)."""

    teacher: str | None = None  # a run, a Hugging Face directory or a hub model, with the same tokenizer
    alpha: float = 0.5
    temperature: float = 2.0
    logits: float = 1.0  # weight of the divergence from the teacher's distributions
    hidden: float = 0.0  # weight of the distance between hidden states after layers that belong together
    hidden_distance: Literal["mse", "cosine"] = "mse"
    attention: float = 0.0  # weight of the relations among queries, keys and values (MiniLMv2, arXiv 2012.15828)
    layers: list[int] = field(default_factory=list)  # the teacher's for each of the student's; empty: evenly spread
    init_from_teacher: bool = False  # start with the teacher's weights, those layers' among them
    teacher_sharded: bool = False  # the teacher over all ranks as ZeRO-3 has it, instead of whole on each
    cache_top_k: int = 0  # keep the teacher's K likeliest tokens of each sample in data.cache_dir; 0: ask every time


@dataclass
class QuantizeConfig:
    """Quantization-aware training: linear layers compute with weights rounded to integers (`compress/quantize.py`)."""

    bits: int = 8  # 8, 4 or 2, of a weight
    group_size: int | None = None  # weights of a row that share a scale; null: the whole row
    activations: bool = False  # int8 inputs too, with a scale for each token; bits=8
    start: int = 0  # the optimizer step after which training sees quantized weights
    freeze: int | None = None  # the step after which scales stay as they are; null: they follow the weights
    include: list[str] = field(default_factory=lambda: ["*"])  # patterns of linear layers' names
    exclude: list[str] = field(default_factory=lambda: ["*head", "*head.*", "*classifier*", "*qa_outputs"])


@dataclass
class Float8Config:
    """Matmuls of linear layers in float8, forward and backward, on GPUs that have it (`compress/float8.py`)."""

    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"  # whose scale is whose; torchao's
    include: list[str] = field(default_factory=lambda: ["*"])  # patterns of linear layers' names
    exclude: list[str] = field(default_factory=lambda: ["*head", "*head.*", "*classifier*", "*qa_outputs"])


@dataclass
class CompressConfig:
    """Which transforms change the model while it trains: `compress=[prune_global,...]`, a file each."""

    prune: PruneConfig | None = None
    distil: DistilConfig | None = None
    quantize: QuantizeConfig | None = None
    float8: Float8Config | None = None


def n_of_m(pattern: str | None) -> tuple[int, int] | None:
    """(N, M) of "N:M". Raises ValueError for another text, or where not 0 < N < M."""
    if pattern is None:
        return None
    n, m = (int(part) for part in pattern.split(":"))
    if not 0 < n < m:
        raise ValueError(pattern)
    return n, m
