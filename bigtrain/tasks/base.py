"""What is learned: a task builds the model's head, makes batches, turns them into a loss, and sums into metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from bigtrain.batch import Batch, LossSums
from bigtrain.config import ModelConfig
from bigtrain.data.example_loader import Share
from bigtrain.held_out import HeldOut


class TrainLoader(Protocol):
    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of optimizer step `step` (from 0): a pure function."""
        ...

    def samples(self, step: int) -> list[list[int]]:
        """Which windows of the corpus, or examples, are in each of these micro-batches."""
        ...


class Evaluated(NamedTuple):
    """What one held-out batch gives."""

    nll: Tensor  # summed over the batch's targets, float32 scalar
    sums: dict[str, Tensor]  # more sums (scalars), for the task's own metrics
    predictions: list[tuple[int, Any]]  # (example number, plain data) of each example that is judged by itself


class Totals(NamedTuple):
    """The same over all held-out batches of all ranks."""

    nll: float
    targets: int
    sums: dict[str, float]
    predictions: dict[int, Any]  # by record number


class Task(Protocol):
    labels: list[str]  # by number; empty where there are none
    tokenizer_file: Path

    def build_model(self, config: ModelConfig) -> nn.Module:
        """The model with this task's head, on the current default device, weights drawn."""
        ...

    def train_loader(self, share: Share) -> TrainLoader: ...

    def held_out(self, share: Share, max_batches: int | None = None) -> HeldOut:
        """Held-out batches of this rank, all of them or an even sample."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> LossSums:
        """Run the model on one micro-batch."""
        ...

    def count_targets(self, batch: Batch) -> int:
        """How many targets the batch's loss sums over. Called on the host, before the batch moves."""
        ...

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluated: ...

    def joined(self, predictions: dict[int, Any]) -> dict[int, Any]:
        """Predictions by example number -> by record number, where a record may be several examples."""
        ...

    def metrics(self, totals: Totals) -> dict[str, float]:
        """Held-out metrics, `eval/loss` among them."""
        ...

    def facts(self) -> dict[str, Any]:
        """What result.json says of the data."""
        ...
