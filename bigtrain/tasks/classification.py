"""A label, or a number, for a text or a pair of texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.batch import IGNORED, Batch, LossSums
from bigtrain.config import ClassificationConfig, Config, HuggingFaceConfig, ModelConfig
from bigtrain.data.example_loader import Rows, stack
from bigtrain.models.heads import ClassificationHead
from bigtrain.tasks import metrics, resampled
from bigtrain.tasks.adversarial import worst_change
from bigtrain.tasks.augment import augmented
from bigtrain.tasks.base import Evaluated, Totals
from bigtrain.tasks.labelled import LabelledTask, WithHead, build_encoder
from bigtrain.tasks.resampled import Resampled


class Classification(LabelledTask):
    """BERT's sentence-level fine-tuning (arXiv 1810.04805, section 4.1)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.task, ClassificationConfig)
        self.config, self.dim = config.task, config.model.dim

    def build_model(self, config: ModelConfig) -> nn.Module:
        outputs = 1 if self.config.regression else len(self.labels)
        if isinstance(config, HuggingFaceConfig):
            from bigtrain.models.huggingface import auto

            return auto.Classifier(config, "classification", outputs, self.special_ids["pad"])
        backbone = build_encoder(config, pooled=True)
        head = ClassificationHead(backbone.config, outputs, self.config.dropout)
        return WithHead(backbone, head, pooled=True)

    def collate(self, rows: Rows, random: np.random.Generator | None) -> Batch:
        if random is not None:
            unknown = self.special_ids.get("unk", self.special_ids["pad"])
            rows = augmented(rows, self.config, self.special_ids.values(), unknown, random)
        batch = self.inputs(rows)
        label = stack(rows, "label")
        if self.config.regression:
            batch["value"] = label
        else:
            batch["label"] = label.long().where(batch["index"] >= 0, IGNORED)
        return batch

    def count_targets(self, batch: Batch) -> int:
        return int((batch["index"] >= 0).sum())

    def loss(self, model: nn.Module, batch: Batch) -> LossSums:
        def sums(change: Tensor | None = None, through: nn.Module = model) -> LossSums:
            return self._sums(self.outputs(through, batch, change), batch, self.config.label_smoothing)

        if self.config.adversarial == "none":
            return sums()
        steps = 1 if self.config.adversarial == "fgm" else self.config.adversarial_steps
        zeros = batch["tokens"].new_zeros(*batch["tokens"].shape, self.dim, dtype=next(model.parameters()).dtype)
        bare = getattr(model, "module", model)  # an engine's wrapper would take these passes for the step's own
        change = worst_change(lambda change: sums(change, bare).loss, zeros, self.config.adversarial_epsilon, steps)
        clean = sums()
        return LossSums((clean.loss + sums(change).loss) / 2, clean.nll)

    def _sums(self, outputs: torch.Tensor, batch: Batch, smoothing: float) -> LossSums:
        if self.config.regression:
            error = (outputs.float().squeeze(-1) - batch["value"]).square() * (batch["index"] >= 0)
            return LossSums(error.sum(), error.detach().sum())
        logits, label = outputs.float(), batch["label"]
        loss = F.cross_entropy(logits, label, reduction="sum", label_smoothing=smoothing)
        nll = F.cross_entropy(logits.detach(), label, reduction="sum") if smoothing else loss.detach()
        return LossSums(loss, nll)

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluated:
        outputs = self.outputs(model, batch)
        if self.config.regression:
            rows: list[Any] = list(zip(outputs.float().squeeze(-1).tolist(), batch["value"].tolist(), strict=True))
        else:
            rows = list(zip(outputs.float().softmax(-1).tolist(), batch["label"].tolist(), strict=True))
        return Evaluated(self._sums(outputs, batch, 0.0).nll, {}, self.numbered(batch, rows))

    def metrics(self, totals: Totals) -> dict[str, float]:
        found = list(totals.predictions.values())
        loss = {"eval/loss": totals.nll / totals.targets}
        if self.config.regression:
            return loss | metrics.regression([p for p, _ in found], [t for _, t in found])
        return loss | metrics.classification(*self._labels(totals), len(self.labels))

    def resampled(self, totals: Totals) -> Resampled:
        if self.config.regression:
            predicted, true = zip(*totals.predictions.values(), strict=True)
            return resampled.columns(metrics.regression, predicted=predicted, true=true)
        return resampled.classification(*self._labels(totals), len(self.labels))

    def predicted_and_true(self, totals: Totals) -> tuple[list[int], list[int]] | None:
        return None if self.config.regression else self._labels(totals)

    def _labels(self, totals: Totals) -> tuple[list[int], list[int]]:
        found = totals.predictions.values()
        return [int(np.argmax(probabilities)) for probabilities, _ in found], [label for _, label in found]

    def prediction(self, row: Any) -> dict[str, Any]:
        """A row of the predictions file."""
        output, _ = row
        if self.config.regression:
            return {"prediction": output}
        best = int(np.argmax(output))
        return {"prediction": self.labels[best], "probability": output[best]}
