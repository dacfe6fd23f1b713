"""What turns an encoder's hidden states into answers. A model of both has them as `backbone` and `head`.

Each is called as a module, so that ZeRO-3 gathers its weights, and draws its weights when it is built (layers.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.batch import IGNORED
from bigtrain.config import EncoderConfig
from bigtrain.models.cross_entropy import linear_cross_entropy
from bigtrain.models.layers import Linear, make_norm
from bigtrain.models.soft_targets import SoftTargets, WholeLogits

ALIGNMENT = 8  # columns: tensor cores want sizes that are multiples of it


class MaskedLMHead(nn.Module):
    """BERT's head for masked words: norm(gelu(dense(x))), then the token embedding's rows and a bias of its own.

    embedding: the encoder's, whose weight is shared.
    """

    def __init__(self, config: EncoderConfig, embedding: nn.Embedding) -> None:
        super().__init__()
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.dense = Linear(config.dim, config.dim, config.bias, config.init_std)
        self.norm = make_norm(config)
        self.weight = embedding.weight
        self.bias = nn.Parameter(torch.empty(embedding.num_embeddings))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        label_smoothing: float = 0.0,
        soft: SoftTargets | WholeLogits | None = None,
    ) -> Any:
        """hidden (B, T, D) -> logits (B, T, V), or with targets (B, T) -> (loss_sum, nll_sum), float32 scalars.

        targets: -100 where a token is not scored. Only the scored tokens, some 15%, are computed at all.
        soft: as in linear_cross_entropy, of the rows that `scored_rows` picks.
        """
        if targets is None:
            return F.linear(self.transform(hidden), self.weight, self.bias)
        scored = scored_rows(targets)
        x = self.transform(hidden[scored])
        # The bias rides along as one more column of the weight: the loss then needs no kernel of its own.
        ones, zeros = x.new_ones(len(x), 1), x.new_zeros(len(x), ALIGNMENT - 1)
        bias = F.pad(self.bias.unsqueeze(1), (0, ALIGNMENT - 1))
        weight = torch.cat((self.weight, bias), dim=1)
        rows = torch.cat((x, ones, zeros), dim=1)
        return linear_cross_entropy(rows, weight, targets[scored], label_smoothing, soft=soft)

    def transform(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.norm(F.gelu(self.dense(hidden), approximate=self.approximate))


def scored_rows(targets: Tensor) -> Tensor:
    """targets (B, T) -> boolean (B, T): the tokens that a head for masked words computes.

    A batch with nothing to score still runs one token through, unscored: every rank must use every weight.
    """
    scored = targets != IGNORED
    scored[(0,) * scored.dim()] |= ~scored.any()
    return scored


class ClassificationHead(nn.Module):
    """linear(dropout(pooled)): one number for each label, or with one label a regression's number."""

    def __init__(self, config: EncoderConfig, labels: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = Linear(config.dim, labels, bias=True, std=config.init_std)

    def forward(self, x: Tensor) -> Tensor:
        """pooled (B, D) -> logits (B, labels)."""
        return self.linear(self.dropout(x))


class TaggingHead(ClassificationHead):
    """linear(dropout(hidden)): hidden (B, T, D) -> logits (B, T, labels)."""


class QuestionAnsweringHead(nn.Module):
    """linear(dropout(hidden)): how well an answer would begin, and how well it would end, at each token.

    The linear layer is called as in transformers' BertForQuestionAnswering.
    """

    def __init__(self, config: EncoderConfig, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.qa_outputs = Linear(config.dim, 2, bias=True, std=config.init_std)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (B, T, D) -> logits (B, T, 2), of starts and of ends."""
        return self.qa_outputs(self.dropout(hidden))


class PairHead(ClassificationHead):
    """BERT's next sentence prediction: pooled (B, D) -> logits (B, 2), 0: B follows A, 1: it does not."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config, labels=2, dropout=0.0)
