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
    sparsity: float = 0.5  # of the weights chosen; with `pattern` it follows from that
    scope: Literal["global", "layer"] = "global"  # whether weights compete across layers or within each
    pattern: str | None = None  # N:M, at most N of each M neighbours in a row are kept: "2:4", "4:8"; null: anywhere
    include: list[str] = field(default_factory=lambda: ["*"])  # patterns of linear layers' names
    exclude: list[str] = field(default_factory=lambda: ["head", "*_head", "lm_head"])
    schedule: RampConfig = field(default_factory=RampConfig)


@dataclass
class CompressConfig:
    """Which transforms change the model while it trains: `compress=[prune_global,...]`, a file each."""

    prune: PruneConfig | None = None
