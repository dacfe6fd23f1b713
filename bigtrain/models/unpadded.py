"""A padded batch without its padding: the real tokens of all texts in one row, and attention within each text.

Linear layers, norms and activations compute each token by itself, so they need no padding; only attention has to know
where a text begins. As in ModernBERT (arXiv 2412.13663, section 2.1.2): padding goes once, before the first block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigtrain.models import cpu_kernels

# On a CPU as much padding stays as makes the number of tokens a multiple of this: with a new size of matrix each step
# memory grew by megabytes a step (seen on two CPUs; a kernel compiled and kept for each size would explain it).
CPU_MULTIPLE = 64


@dataclass(frozen=True)
class Unpadded:
    """Where the N tokens that are computed, of B padded texts of T tokens, are: on a GPU all are real ones."""

    index: Tensor  # (N,) int64: of each in the batch's B * T
    mask: Tensor  # (B, T) bool
    starts: Tensor  # (B + 1,) int32: where each text begins among the N, and N
    longest: int  # tokens of the longest text

    @classmethod
    def of(cls, attention_mask: Tensor) -> Unpadded | None:
        """attention_mask (B, T): 1 at real tokens. None if there is nothing to take out. A text
        without any real token keeps its first."""
        mask = attention_mask.bool()
        first = torch.arange(mask.size(1), device=mask.device) == 0
        mask = mask | (first & ~mask.any(-1, keepdim=True))
        kept = mask.flatten()
        if mask.device.type == "cpu":
            surplus = -int(kept.sum()) % CPU_MULTIPLE
            kept = kept.index_fill(0, (~kept).nonzero().squeeze(-1)[:surplus], True)
        index = kept.nonzero().squeeze(-1)
        if len(index) == mask.numel():
            return None
        lengths = mask.sum(-1, dtype=torch.int32)
        return cls(index, mask, F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), int(lengths.max()))

    def take(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (1, N, ...)."""
        taken: Tensor = _Take.apply(x.flatten(0, 1), self.index)
        return taken.unsqueeze(0)

    def put_back(self, x: Tensor) -> Tensor:
        """(1, N, ...) -> (B, T, ...), 0 where nothing was taken."""
        padded: Tensor = _Put.apply(x.squeeze(0), self.index, self.mask.numel())
        return padded.view(*self.mask.shape, *x.shape[2:])

    def attention(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        """q, k, v (1, N, H, head_dim) -> (1, N, D): each token looks at all tokens of its text."""
        if _varlen_usable(q, dropout):
            from torch.nn.attention.varlen import varlen_attn

            lengths = (self.starts, self.starts, self.longest, self.longest)
            packed: Any = varlen_attn(q.squeeze(0), k.squeeze(0), v.squeeze(0), *lengths)
            return packed.flatten(1).unsqueeze(0)
        # No kernel for it: texts side by side again, in here only. One copy for all three.
        q, k, v = (x.transpose(1, 2) for x in self.put_back(torch.stack((q, k, v), dim=2)).unbind(2))
        mask = self.mask[:, None, None, :]
        if cpu_kernels.short_attention_usable(q, k, dropout):
            y = cpu_kernels.short_attention(q, k, v, mask, dropout)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        return self.take(y.transpose(1, 2).flatten(2))


def _varlen_usable(q: Tensor, dropout: float) -> bool:
    """Flash attention over texts of different lengths: in 16 bits on an Ampere GPU or later, without dropout."""
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and not dropout
        and q.size(-1) % 8 == 0
        and q.size(-1) <= 256
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


class _Take(torch.autograd.Function):
    """x[index]. Its gradient is a copy: index_select's own adds up, row by row, though no index comes twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (index,) = ctx.saved_tensors
        return _Put.apply(gradient, index, ctx.rows), None


class _Put(torch.autograd.Function):
    """`_Take` the other way round: rows that no index names are 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, index, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (index,) = ctx.saved_tensors
        return _Take.apply(gradient, index), None, None
