"""What every engine does for the trainer. The trainer knows nothing of sharding; an engine knows nothing of tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from bigtrain.batch import Batch, LossSums

T = TypeVar("T")
LossFunction = Callable[[nn.Module, Batch], LossSums]
Write = Callable[[], list[Path]]  # writes files, in any thread, and says which


class StepOutcome(NamedTuple):
    grad_norm: Tensor | float | None  # global, before clipping; None where the engine does not compute it
    applied: bool  # False: a gradient was not finite and the update was left out


class Engine(Protocol):
    """How a run is distributed.

    Gradients are those of sum(loss) * scale over all micro-batches of all ranks: the trainer passes
    scale = 1 / global number of target tokens, and no engine averages behind its back.
    """

    optimizer: torch.optim.Optimizer  # over this rank's part of the master weights
    model: nn.Module  # the bare model: its parameters may be sharded
    device: torch.device
    rank: int
    world_size: int

    @property
    def loss_scale(self) -> float:
        """What gradients are multiplied by until the step: 1 without loss scaling."""
        ...

    def forward_backward(self, loss_function: LossFunction, batch: Batch, scale: float, last: bool) -> LossSums:
        """`last`: no further micro-batch before the step, so gradients may be reduced now."""
        ...

    def evaluate(self, function: Callable[[nn.Module, Batch], T], batch: Batch) -> T:
        """`function` of the model as it must be called, without gradients."""
        ...

    def step(self, lr_multiplier: float) -> StepOutcome:
        """Clip, update with lr = peak * lr_multiplier, clear the gradients.

        Where a gradient is not finite nothing is updated, on any rank, and the outcome says so.
        """
        ...

    def discard(self) -> None:
        """Clear the gradients of a whole step instead of updating; every rank calls it, after `last` was passed."""
        ...

    def save(self, directory: Path, later: bool) -> list[Write]:
        """Save what `load` needs for an exact continuation. Every rank calls it; may raise on one rank only.

        Returns what is still to be written, of a copy that training does not touch: with `later`, as much as host
        memory allows. The rest is written when this returns.
        """
        ...

    def load(self, directory: Path) -> None: ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor on the CPU, in compute dtype) on rank 0, one at a time; every rank must iterate it.

        Other ranks get empty tensors.
        """
        ...

    def effective_config(self) -> dict[str, object]:
        """The configuration as the library behind the engine sees it, for the run directory."""
        ...
