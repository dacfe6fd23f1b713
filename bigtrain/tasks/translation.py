"""A text from a text by an encoder-decoder: translation between languages, summaries, paraphrases."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from bigtrain import models
from bigtrain.batch import IGNORED, Batch, LossSums
from bigtrain.config import Config, HuggingFaceConfig, ModelConfig, Seq2SeqConfig, TranslationConfig
from bigtrain.data.example_loader import Rows, pad
from bigtrain.data.tokenizer import find_tokenizer
from bigtrain.tasks import metrics, resampled
from bigtrain.tasks.base import Evaluated, Totals
from bigtrain.tasks.labelled import LabelledTask
from bigtrain.tasks.resampled import Resampled


class Translation(LabelledTask):
    """Each token of the target from the source and the target's earlier tokens (arXiv 1706.03762). An evaluation
    writes its own text for every held-out source besides."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert isinstance(config.task, TranslationConfig)
        assert isinstance(config.model, (Seq2SeqConfig, HuggingFaceConfig))
        self.config = config.task

    def build_model(self, config: ModelConfig) -> nn.Module:
        if isinstance(config, HuggingFaceConfig):
            from bigtrain.models.huggingface import auto

            return auto.Seq2Seq(config)
        return models.build(config)

    @cached_property
    def _tokenizer(self) -> Any:
        return find_tokenizer(str(self.tokenizer_file))

    @cached_property
    def _texts(self) -> list[tuple[str, str]]:
        """(source, target) of each held-out example, as they were given."""
        return [(record["source"], record["target"]) for record in self.data.held_out_records()]

    def collate(self, rows: Rows, random: np.random.Generator | None) -> Batch:
        batch = self.inputs(rows)
        # One longer than the model takes: the first token is only read, and the last one only predicted.
        target = pad(rows, "target", IGNORED, self.max_length + 1)
        batch["targets_in"] = target[:, :-1].masked_fill(target[:, :-1] == IGNORED, self.special_ids["pad"])
        batch["targets"] = target[:, 1:].masked_fill(batch["index"].unsqueeze(-1) < 0, IGNORED)
        return batch

    def count_targets(self, batch: Batch) -> int:
        return int((batch["targets"] != IGNORED).sum())

    def loss(self, model: nn.Module, batch: Batch) -> LossSums:
        return LossSums(*self._sums(model, batch, self.config.label_smoothing))

    def _sums(
        self, model: nn.Module, batch: Batch, smoothing: float, memory: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums: tuple[torch.Tensor, torch.Tensor] = model(
            batch["tokens"], batch["attention_mask"], batch["targets_in"], batch["targets"], smoothing, memory
        )
        return sums

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluated:
        from bigtrain.models.generation import translate  # transformers takes seconds to import

        memory = model(batch["tokens"], batch["attention_mask"])
        _, nll = self._sums(model, batch, 0.0, memory)
        layers, mask = models.decoder_layers(model), batch["attention_mask"]
        written = translate(
            model, layers, memory, mask, self.special_ids, self.data.vocab_size,
            self.config.max_new_tokens, {"do_sample": False, "num_beams": self.config.num_beams},
        )  # fmt: skip
        texts = self._tokenizer.decode_batch(written)
        rows = [(index, (text, *self._texts[index])) for index, text in self.numbered(batch, texts)]
        return Evaluated(nll, {}, rows)

    def metrics(self, totals: Totals) -> dict[str, float]:
        loss = totals.nll / totals.targets
        written, sources, targets = zip(*totals.predictions.values(), strict=True)
        return {"eval/loss": loss, "eval/perplexity": float(np.exp(min(loss, 700.0)))} | metrics.translation(
            written, targets, sources
        )

    def resampled(self, totals: Totals) -> Resampled:
        written, sources, targets = zip(*totals.predictions.values(), strict=True)
        return resampled.translation(written, targets, sources)

    def prediction(self, row: Any) -> dict[str, Any]:
        """A row of the predictions file: what the model wrote."""
        return {"prediction": row[0]}
