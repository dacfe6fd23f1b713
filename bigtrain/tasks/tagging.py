"""A tag for each word: named entities, parts of speech, roles."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.batch import IGNORED, Batch, LossSums
from bigtrain.config import Config, HuggingFaceConfig, ModelConfig, TaggingConfig
from bigtrain.data.example_loader import Rows, pad
from bigtrain.models.heads import TaggingHead
from bigtrain.tasks import metrics, resampled
from bigtrain.tasks.base import Evaluated, Totals
from bigtrain.tasks.labelled import LabelledTask, WithHead, build_encoder
from bigtrain.tasks.resampled import Resampled


class Tagging(LabelledTask):
    """BERT's token-level fine-tuning (arXiv 1810.04805, section 5.3): a word's first token carries its tag."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.task, TaggingConfig)
        self.config = config.task

    def build_model(self, config: ModelConfig) -> nn.Module:
        if isinstance(config, HuggingFaceConfig):
            from bigtrain.models.huggingface import auto

            return auto.Classifier(config, "tagging", len(self.labels), self.special_ids["pad"])
        backbone = build_encoder(config, pooled=False)
        head = TaggingHead(backbone.config, len(self.labels), self.config.dropout)
        return WithHead(backbone, head, pooled=False)

    def collate(self, rows: Rows, random: np.random.Generator | None) -> Batch:
        batch = self.inputs(rows)
        targets = pad(rows, "targets", IGNORED, self.max_length)
        batch["targets"] = targets.where(batch["index"].unsqueeze(-1) >= 0, IGNORED)
        return batch

    def count_targets(self, batch: Batch) -> int:
        return int((batch["targets"] != IGNORED).sum())

    def loss(self, model: nn.Module, batch: Batch) -> LossSums:
        loss = self._loss(self.outputs(model, batch), batch)
        return LossSums(loss, loss.detach())

    def _loss(self, logits: Tensor, batch: Batch) -> Tensor:
        flat = logits.flatten(0, 1).float()
        return F.cross_entropy(flat, batch["targets"].flatten(), ignore_index=IGNORED, reduction="sum")

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluated:
        logits = self.outputs(model, batch)
        predicted, targets = logits.argmax(-1).cpu(), batch["targets"].cpu()
        scored = targets != IGNORED
        rows = [
            (p[keep].tolist(), t[keep].tolist()) for p, t, keep in zip(predicted, targets, scored, strict=True)
        ]  # fmt: skip
        return Evaluated(self._loss(logits, batch), {}, self.numbered(batch, rows))

    def join(self, record: int, parts: list[tuple[int, Any]]) -> Any:
        """A sentence that was too long is whole again."""
        return tuple([tag for _, row in parts for tag in row[side]] for side in (0, 1))

    def metrics(self, totals: Totals) -> dict[str, float]:
        return {"eval/loss": totals.nll / totals.targets} | metrics.tagging(*self._tags(totals))

    def resampled(self, totals: Totals) -> Resampled:
        return resampled.tagging(*self._tags(totals))

    def _tags(self, totals: Totals) -> tuple[list[list[str]], list[list[str]]]:
        """(predicted, true) of each sentence."""
        found = [totals.predictions[index] for index in sorted(totals.predictions)]
        predicted, true = ([[self.labels[tag] for tag in row[side]] for row in found] for side in (0, 1))
        return predicted, true

    def by_label(self, totals: Totals) -> list[dict[str, Any]] | None:
        """Whole entities by their type; None where the tags are of single words, as parts of speech are."""
        if not all(label == "O" or label[1:2] == "-" for label in self.labels):
            return None
        return metrics.entities(*self._tags(totals))

    def predicted_and_true(self, totals: Totals) -> tuple[list[int], list[int]]:
        """Word by word."""
        predicted, true = ([tag for row in totals.predictions.values() for tag in row[side]] for side in (0, 1))
        return predicted, true

    def prediction(self, row: Any) -> dict[str, Any]:
        """A row of the predictions file: a tag for each word."""
        return {"prediction": [self.labels[tag] for tag in row[0]]}
