"""What the tasks on labelled examples share: an encoder with a head, padded batches, numbered predictions."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bigtrain import models
from bigtrain.batch import Batch
from bigtrain.config import Config, EncoderConfig, ModelConfig
from bigtrain.data.example_loader import (
    DrawnTrainLoader,
    ExampleEvalLoader,
    ExampleTrainLoader,
    Rows,
    Share,
    pad,
    stack,
)
from bigtrain.data.examples import Examples, load_examples
from bigtrain.held_out import HeldOut
from bigtrain.models import Encoder
from bigtrain.models.network import Network
from bigtrain.tasks.base import Totals, TrainLoader
from bigtrain.tasks.resampled import Resampled


class WithHead(Network):
    """`backbone.*` and `head.*`: an encoder, and what a task puts on it."""

    def __init__(self, backbone: Encoder, head: nn.Module, pooled: bool) -> None:
        super().__init__()
        self.backbone, self.head, self.pooled = backbone, head, pooled

    def tie_weights(self) -> None:
        self.backbone.tie_weights()

    def set_activation_checkpointing(self, enabled: bool) -> None:
        self.backbone.set_activation_checkpointing(enabled)

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        token_types: Tensor | None = None,
        change: Tensor | None = None,
    ) -> Any:
        """tokens (B, T) -> what the head makes of the pooled text (B, D) or of every hidden state (B, T, D).

        change (B, T, D): of the tokens' embeddings.
        """
        hidden = self.backbone(tokens, attention_mask=attention_mask, token_types=token_types, change=change)
        return self.head(self.backbone.pool(hidden, attention_mask) if self.pooled else hidden)


def build_encoder(config: ModelConfig, pooled: bool) -> Encoder:
    """pooled: whether the pooled text is used. A pooler that is not would have no gradient, which DDP refuses."""
    assert isinstance(config, EncoderConfig)
    encoder = models.build(dataclasses.replace(config, pooler=config.pooler and pooled))
    assert isinstance(encoder, Encoder)
    return encoder


class LabelledTask(ABC):
    """A task on prepared examples. What is left to a task: its head, its targets, its loss, its metrics."""

    def __init__(self, config: Config) -> None:
        self.data = load_examples(Path(config.data.prepared_dir or ""))
        self.labels = self.data.labels
        self.tokenizer_file = self.data.tokenizer_file
        self.special_ids = self.data.special_ids
        self.max_length = config.model.max_seq_len

    @abstractmethod
    def collate(self, rows: Rows, random: np.random.Generator | None) -> Batch:
        """Rows -> (B, T) tensors; the generator is there while training, for augmentation."""

    def joined(self, predictions: dict[int, Any]) -> dict[int, Any]:
        """What was found of the examples of one record, in their order, becomes one (`join`)."""
        record_of = Examples(self.data, "held_out").records()
        parts: dict[int, list[tuple[int, Any]]] = {}
        for index in sorted(predictions):
            parts.setdefault(int(record_of[index]), []).append((index, predictions[index]))
        return {record: self.join(record, found) for record, found in parts.items()}

    def join(self, record: int, parts: list[tuple[int, Any]]) -> Any:
        """(example number, what `evaluate` gave for it) of all examples of a record -> what `metrics` is given for it.

        Here of a record that is one example always.
        """
        return parts[0][1]

    @abstractmethod
    def metrics(self, totals: Totals) -> dict[str, float]: ...

    def resampled(self, totals: Totals) -> Resampled:
        """`metrics` of samples of the records, by their places in `totals.predictions`; the loss may be left out.

        Here as `metrics` counts them, which takes long for many samples of a large set.
        """
        found = list(totals.predictions.values())
        return lambda chosen: self.metrics(
            totals._replace(predictions={i: found[j] for i, j in enumerate(chosen.tolist())})
        )

    def predicted_and_true(self, totals: Totals) -> tuple[list[int], list[int]] | None:
        """The numbers of the labels that were given, and of those that are right; None for what gives no labels."""
        return None

    def by_label(self, totals: Totals) -> list[dict[str, Any]] | None:
        """The table by label, of a task that counts more than single labels; None: the labels are counted."""
        return None

    @abstractmethod
    def prediction(self, row: Any) -> dict[str, Any]:
        """A row of the predictions file, of what `join` gave for a record."""

    def train_loader(self, share: Share) -> TrainLoader:
        examples = Examples(self.data, "train")
        if share.draw is not None:
            return DrawnTrainLoader(examples, self.collate, share)
        return ExampleTrainLoader(examples, self.collate, share)

    def held_out(self, share: Share, max_batches: int | None = None) -> HeldOut:
        return ExampleEvalLoader(Examples(self.data, "held_out"), self.collate, share, max_batches)

    def inputs(self, rows: Rows) -> Batch:
        """tokens, attention_mask (1 at a token, 0 at padding) and token_types (B, T); index (B,), -1 at filler rows."""
        tokens = pad(rows, "tokens", self.special_ids["pad"], self.max_length)
        lengths = torch.tensor([len(row["tokens"]) for row in rows])
        batch = {
            "tokens": tokens,
            "attention_mask": (torch.arange(tokens.size(1)) < lengths.unsqueeze(-1)).long(),
            "index": stack(rows, "index"),
        }
        if "token_types" in rows[0]:
            batch["token_types"] = pad(rows, "token_types", 0, self.max_length)
        return batch

    def outputs(self, model: nn.Module, batch: Batch, change: Tensor | None = None) -> Tensor:
        adversary = {} if change is None else {"change": change}
        result: Tensor = model(batch["tokens"], batch["attention_mask"], batch.get("token_types"), **adversary)
        return result

    def numbered(self, batch: Batch, rows: list[Any]) -> list[tuple[int, Any]]:
        """Rows with their examples' numbers, without filler."""
        return [(index, row) for index, row in zip(batch["index"].tolist(), rows, strict=True) if index >= 0]

    def facts(self) -> dict[str, Any]:
        found = {"data/examples": self.data.examples, "data/examples_cut": self.data.cut, "data/labels": self.labels}
        told = {"data/notes": self.data.notes, "data/left_out": self.data.left_out}
        return found | {name: value for name, value in told.items() if value}
