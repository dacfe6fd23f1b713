"""What data, models, tasks and engines hand to each other: batches of tensors, and the sums of their loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Batch = dict[str, Tensor]

IGNORED = -100  # a target that is not scored, as torch's cross_entropy has it


def count_tokens(batch: Batch) -> int:
    """Tokens of a batch that are no padding; of an encoder-decoder's those of its targets too."""
    mask = batch.get("attention_mask")
    tokens = batch["tokens"].numel() if mask is None else int(mask.sum())
    return tokens + (int((batch["targets"] != IGNORED).sum()) if "targets_in" in batch else 0)


class LossSums(NamedTuple):
    """Sums over the targets of one micro-batch, float32 scalars; dividing is the trainer's, globally."""

    loss: Tensor  # what is differentiated: with label smoothing, z-loss and the like
    nll: Tensor  # plain negative log-likelihood in nats, detached
