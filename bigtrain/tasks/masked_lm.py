"""BERT's pretraining: restore masked tokens, and tell whether a segment follows the other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.batch import IGNORED, Batch, LossSums
from bigtrain.config import Config, HuggingFaceConfig, MaskedLMConfig, ModelConfig
from bigtrain.data import load_prepared
from bigtrain.data.example_loader import Share
from bigtrain.data.masked_loader import (
    MaskedEvalLoader,
    MaskedRows,
    MaskedTrainLoader,
    Vocabulary,
    word_beginnings,
)
from bigtrain.data.tokenizer import require_special, special_ids
from bigtrain.held_out import HeldOut
from bigtrain.models.heads import MaskedLMHead, PairHead
from bigtrain.tasks.base import Evaluated, Totals
from bigtrain.tasks.labelled import WithHead, build_encoder


class MaskedLMModel(WithHead):
    """An encoder with the masked-token head, and if segments are to be judged, `pair_head` on the pooled vector."""

    def __init__(self, backbone: Any, head: MaskedLMHead, pair_head: PairHead | None) -> None:
        super().__init__(backbone, head, pooled=False)
        self.pair_head = pair_head

    def tie_weights(self) -> None:
        self.head.weight = self.backbone.embedding.weight

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        token_types: Tensor | None = None,
        targets: Tensor | None = None,
        predict: bool = False,
    ) -> tuple[Any, Tensor | None]:
        """tokens (B, T) -> (what the head gives: logits or, with targets, (loss_sum, nll_sum); pair logits (B, 2)).

        predict: logits (N, V) of the N scored tokens alone.
        """
        hidden = self.backbone(tokens, attention_mask=attention_mask, token_types=token_types)
        pair = None if self.pair_head is None else self.pair_head(self.backbone.pool(hidden, attention_mask))
        if predict:
            assert targets is not None
            return self.head(hidden[targets != IGNORED]), pair
        return self.head(hidden, targets), pair


class MaskedLM:
    """arXiv 1810.04805, section 3.1; the loss is the mean over masked tokens plus the mean over pairs."""

    def __init__(self, config: Config) -> None:
        assert isinstance(config.task, MaskedLMConfig)
        self.config, self.length = config.task, config.model.max_seq_len
        self.labels: list[str] = []
        self.data = load_prepared(Path(config.data.prepared_dir or ""))
        self.tokenizer_file = self.data.tokenizer_file
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.tokenizer_file))
        ids = special_ids(tokenizer)
        require_special(ids, ("pad", "cls", "sep", "mask"), config.data.tokenizer.path)
        by_id = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
        size = self.data.vocab_size
        self.vocabulary = Vocabulary(size, ids, word_beginnings(by_id, size))
        # Pairs are fewer than masked tokens by about this factor, and their mean is to count as much.
        self.pair_weight = self.config.mask_fraction * self.length

    def build_model(self, config: ModelConfig) -> nn.Module:
        if isinstance(config, HuggingFaceConfig):
            from bigtrain.models.huggingface import auto

            return auto.MaskedLM(config)
        pairs = self.config.sentence != "none"
        backbone = build_encoder(config, pooled=pairs)
        head = MaskedLMHead(backbone.config, backbone.embedding)
        return MaskedLMModel(backbone, head, PairHead(backbone.config) if pairs else None)

    def _rows(self, split: str) -> MaskedRows:
        return MaskedRows(self.data, split, self.length, self.config, self.vocabulary)

    def train_loader(self, share: Share) -> MaskedTrainLoader:
        return MaskedTrainLoader(self._rows("train"), self.vocabulary.special_ids["pad"], self.length, share)

    def held_out(self, share: Share, max_batches: int | None = None) -> HeldOut:
        pad_id = self.vocabulary.special_ids["pad"]
        return MaskedEvalLoader(self._rows("held_out"), pad_id, self.length, share, max_batches)

    def count_targets(self, batch: Batch) -> int:
        return int((batch["targets"] != IGNORED).sum())

    def loss(self, model: nn.Module, batch: Batch) -> LossSums:
        (loss, nll), pair = model(batch["tokens"], batch["attention_mask"], batch["token_types"], batch["targets"])
        if pair is not None:
            loss = loss + self.pair_weight * F.cross_entropy(pair.float(), batch["pair"], reduction="sum")
        return LossSums(loss, nll)

    def evaluate(self, model: nn.Module, batch: Batch) -> Evaluated:
        targets = batch["targets"]
        logits, pair = model(batch["tokens"], batch["attention_mask"], batch["token_types"], targets, predict=True)
        scored = targets[targets != IGNORED]
        sums = {"masked_correct": (logits.argmax(-1) == scored).sum()}
        if pair is not None:
            sums["pairs_correct"] = (pair.argmax(-1) == batch["pair"]).sum()
            sums["pairs"] = (batch["pair"] != IGNORED).sum()
        return Evaluated(F.cross_entropy(logits.float(), scored, reduction="sum"), sums, [])

    def joined(self, predictions: dict[int, Any]) -> dict[int, Any]:
        return predictions

    def metrics(self, totals: Totals) -> dict[str, float]:
        """`eval/loss` in nats per masked token and its perplexity; the accuracies of both parts."""
        loss = totals.nll / totals.targets
        found = {
            "eval/loss": loss,
            "eval/perplexity": math.exp(min(loss, 700.0)),
            "eval/masked_accuracy": totals.sums["masked_correct"] / totals.targets,
        }
        if totals.sums.get("pairs"):
            found["eval/sentence_accuracy"] = totals.sums["pairs_correct"] / totals.sums["pairs"]
        return found

    def facts(self) -> dict[str, Any]:
        return {"data/left_out": self.data.left_out} if self.data.left_out else {}
