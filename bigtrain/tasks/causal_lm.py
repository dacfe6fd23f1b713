"""Causal language modelling: predict each next token of the text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn

from bigtrain import models
from bigtrain.batch import IGNORED, Batch, LossSums
from bigtrain.config import CausalLMConfig, Config, HuggingFaceConfig, LabelledDataConfig, ModelConfig
from bigtrain.data import load_prepared
from bigtrain.data.example_loader import Share
from bigtrain.data.loader import EvalLoader, TrainLoader
from bigtrain.held_out import HeldOut
from bigtrain.tasks.base import Evaluated, Totals


class CausalLM:
    """The task of GPT (Radford et al. 2018, section 3.1)."""

    def __init__(self, config: Config) -> None:
        assert isinstance(config.task, CausalLMConfig)
        assert not isinstance(config.data, LabelledDataConfig)
        self.config = config.task
        self.labels: list[str] = []
        self.data = load_prepared(Path(config.data.prepared_dir or ""))
        self.tokenizer_file = self.data.tokenizer_file
        self.length = config.model.max_seq_len
        self.isolate_documents = config.data.isolate_documents

    def build_model(self, config: ModelConfig) -> nn.Module:
        if isinstance(config, HuggingFaceConfig):
            from bigtrain.models.huggingface import auto

            return auto.CausalLM(config)
        return models.build(config)

    def train_loader(self, share: Share) -> TrainLoader:
        return TrainLoader(
            self.data, self.length, share.global_batch, share.micro_batch, share.seed, share.rank, share.world_size,
            isolate_documents=self.isolate_documents, shift=share.shift,
        )  # fmt: skip

    def held_out(self, share: Share, max_batches: int | None = None) -> HeldOut:
        return EvalLoader(
            self.data, self.length, share.micro_batch, share.rank, share.world_size,
            max_batches=max_batches, isolate_documents=self.isolate_documents,
        )  # fmt: skip

    def loss(self, model: nn.Module, batch: Batch) -> LossSums:
        loss, nll = model(
            batch["tokens"],
            batch["targets"],
            document_ids=batch.get("document_ids"),
            label_smoothing=self.config.label_smoothing,
            z_loss=self.config.z_loss,
        )
        return LossSums(loss, nll)

    def count_targets(self, batch: Batch) -> int:
        return int((batch["targets"] != IGNORED).sum())

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluated:
        return Evaluated(self.loss(model, batch).nll, {}, [])

    def joined(self, predictions: dict[int, Any]) -> dict[int, Any]:
        return predictions

    def metrics(self, totals: Totals) -> dict[str, float]:
        """`eval/loss` in nats per token, `eval/perplexity`, and `eval/bits_per_byte`, which a tokenizer cannot flatter.

        Bits per byte needs all of the held-out text: with only a part scored, its bytes are taken in proportion
        to its tokens.
        """
        loss = totals.nll / totals.targets
        held_out_bytes = self.data.bytes["held_out"] * totals.targets / max(self.data.tokens["held_out"] - 1, 1)
        return {
            "eval/loss": loss,
            "eval/perplexity": math.exp(min(loss, 700.0)),
            "eval/bits_per_byte": totals.nll / math.log(2) / held_out_bytes,
        }

    def facts(self) -> dict[str, Any]:
        left_out = {"data/left_out": self.data.left_out} if self.data.left_out else {}
        return {"eval/gzip_bits_per_byte": self.data.gzip_bits_per_byte} | left_out
