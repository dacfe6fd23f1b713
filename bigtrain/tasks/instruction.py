"""Fine-tuning on prompts and responses: the loss is on the responses only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import nn

from bigtrain import models
from bigtrain.batch import IGNORED, Batch, LossSums
from bigtrain.config import Config, HuggingFaceConfig, InstructionConfig, ModelConfig
from bigtrain.data.example_loader import Rows, pad
from bigtrain.tasks import resampled
from bigtrain.tasks.base import Evaluated, Totals
from bigtrain.tasks.labelled import LabelledTask
from bigtrain.tasks.resampled import Resampled


class Instruction(LabelledTask):
    """Supervised fine-tuning of InstructGPT (arXiv 2203.02155, section 3.5)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.task, InstructionConfig)
        self.config = config.task

    def build_model(self, config: ModelConfig) -> nn.Module:
        if isinstance(config, HuggingFaceConfig):
            from bigtrain.models.huggingface import auto

            return auto.CausalLM(config)
        return models.build(config)

    def collate(self, rows: Rows, random: np.random.Generator | None) -> Batch:
        """Padded at the end, where no token of the text looks: no mask is needed."""
        batch = self.inputs(rows)
        targets = pad(rows, "targets", IGNORED, self.max_length)
        batch["targets"] = targets.where(batch["index"].unsqueeze(-1) >= 0, IGNORED)
        return batch

    def count_targets(self, batch: Batch) -> int:
        return int((batch["targets"] != IGNORED).sum())

    def loss(self, model: nn.Module, batch: Batch) -> LossSums:
        return LossSums(*model(batch["tokens"], batch["targets"], label_smoothing=self.config.label_smoothing))

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluated:
        """Of each example: (negative log-likelihood of its responses in nats, their tokens)."""
        logits, targets = model(batch["tokens"]).float(), batch["targets"]
        nll = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED).sum(1)
        counts = (targets != IGNORED).sum(1)
        rows = list(zip(nll.tolist(), counts.tolist(), strict=True))
        return Evaluated(nll.sum(), {}, self.numbered(batch, rows))

    def metrics(self, totals: Totals) -> dict[str, float]:
        nll, tokens = zip(*totals.predictions.values(), strict=True)
        return _metrics(np.asarray(nll), np.asarray(tokens))

    def resampled(self, totals: Totals) -> Resampled:
        nll, tokens = zip(*totals.predictions.values(), strict=True)
        return resampled.columns(_metrics, nll=nll, tokens=tokens)

    def prediction(self, row: Any) -> dict[str, Any]:
        """A row of the predictions file: how likely the given response is."""
        nll, tokens = row
        return {"loss": nll / tokens, "tokens": tokens}


def _metrics(nll: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """nll, tokens: sums over each response (n,)."""
    loss = float(nll.sum() / tokens.sum())
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0))}
