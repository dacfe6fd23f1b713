"""The language-model head and its loss in one: the (tokens, vocabulary) logits never exist as a whole in float32.

Cross-entropy of a 50,000-word vocabulary is the largest activation of a small model. Here it is computed for some
rows at a time, and the gradients with respect to the hidden states and the head's weight are computed on the spot, in
the forward pass, so that no logits are kept for the backward pass (the idea of Liger Kernel's fused linear
cross-entropy, arXiv 2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bigtrain.batch import IGNORED
from bigtrain.models import cpu_kernels
from bigtrain.models.layers import draw_normal
from bigtrain.models.soft_targets import SoftTargets, WholeLogits

CHUNK_BYTES = 512 * 2**20  # of logits at a time: small against a GPU's memory, large enough to fill it with work
CACHE_BYTES = 4 * 2**20  # of float32 logits at a time on a CPU, where they should not leave the cache
TILE_WORDS = 4096  # of the weight's gradient at a time on a CPU: a vocabulary that is no multiple of 16 slows it down


class Head(nn.Module):
    """Hidden states to logits, or straight to the loss. `tied` shares the token embedding's weight."""

    def __init__(self, dim: int, vocab_size: int, std: float, tied: nn.Embedding | None) -> None:
        super().__init__()
        self.std = std
        self.tied = tied is not None
        self.weight = nn.Parameter(torch.empty(vocab_size, dim)) if tied is None else tied.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if not self.tied:
            draw_normal(self.weight, self.std)

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        soft: SoftTargets | WholeLogits | None = None,
    ) -> Any:
        """hidden (B, T, D) -> logits (B, T, V), or with targets (B, T) -> (loss_sum, nll_sum), float32 scalars.

        soft: as in linear_cross_entropy.
        """
        if targets is None:
            return F.linear(hidden, self.weight)
        rows = hidden.flatten(0, -2)
        return linear_cross_entropy(rows, self.weight, targets.flatten(), label_smoothing, z_loss, soft)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    soft: SoftTargets | WholeLogits | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed loss of logits = hidden @ weight.T against targets, without keeping the logits.

    hidden (N, D), weight (V, D), targets (N,) with -100 for tokens that do not count. Returns loss_sum, with label
    smoothing and z_loss * log(Z)^2 in it, and nll_sum, the plain cross-entropy in nats, detached. Differentiable once.
    soft: what a teacher says of the N rows, whose divergence takes its share of loss_sum; or of a teacher itself, what
    is to keep the rows: then nothing is computed.
    """
    if isinstance(soft, WholeLogits):
        return soft.keep(hidden, weight)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    want_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss, nll = _LinearCrossEntropy.apply(hidden, weight, targets, label_smoothing, z_loss, want_gradients, soft)
    return loss, nll.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        smoothing: float,
        z_loss: float,
        want_gradients: bool,
        soft: SoftTargets | None,
    ) -> tuple[Tensor, Tensor]:
        rows, vocab_size = len(hidden), len(weight)
        # A teacher's divergence takes some five times as much: both logits and probabilities, in float32.
        row_bytes = vocab_size * (hidden.element_size() if soft is None else 20)
        chunk = max(1, min(rows, CHUNK_BYTES // row_bytes))
        loss_sum, nll_sum = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden) if want_gradients else None
        d_weight = None
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            logits = hidden[part] @ weight.t()
            if soft is None:
                loss, nll = softmax_gradient_(logits, targets[part], smoothing, z_loss, want_gradients)
            else:
                loss, nll = distillation_gradient_(logits, targets[part], part, smoothing, z_loss, soft, want_gradients)
            loss_sum += loss.sum()
            nll_sum += nll.sum()
            if d_hidden is None:
                continue
            d_hidden[part] = logits @ weight
            product = _weight_gradient(logits, hidden[part])
            if chunk == rows:
                d_weight = product
            elif d_weight is None:
                d_weight = product.float()  # a sum of many chunks in bfloat16 would lose the small ones
            else:
                d_weight += product
        if d_weight is not None:
            ctx.gradients = (d_hidden, d_weight.to(weight.dtype))
        ctx.mark_non_differentiable(nll_sum)
        return loss_sum, nll_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss's gradients are freed: backward runs once (retain_graph does not keep them)")
        d_hidden, d_weight = ctx.gradients
        ctx.gradients = None
        return d_hidden.mul_(d_loss), d_weight.mul_(d_loss), None, None, None, None, None


def _weight_gradient(d_logits: Tensor, hidden: Tensor) -> Tensor:
    """d_logits (N, V), hidden (N, D) -> (V, D)."""
    if d_logits.device.type != "cpu":
        return d_logits.t() @ hidden
    result = hidden.new_empty(d_logits.size(1), hidden.size(1))
    for columns, rows in zip(d_logits.split(TILE_WORDS, 1), result.split(TILE_WORDS), strict=True):
        torch.mm(columns.t(), hidden, out=rows)
    return result


def softmax_gradient_(
    logits: Tensor, targets: Tensor, smoothing: float, z_loss: float, want_gradients: bool = True
) -> tuple[Tensor, Tensor]:
    """Loss and plain cross-entropy of each row of logits (N, V), as (N,) float32, 0 where the target is -100.

    With want_gradients the logits are overwritten by the gradient of the rows' losses with respect to them.
    """
    if cpu_kernels.usable(logits):
        return cpu_kernels.cross_entropy_(logits, targets, smoothing, z_loss)
    rows = max(1, CACHE_BYTES // (4 * logits.size(-1)))
    if logits.device.type == "cpu" and len(logits) > rows:
        parts = zip(logits.split(rows), targets.split(rows), strict=True)
        losses, nlls = zip(
            *(softmax_gradient_(*part, smoothing, z_loss, want_gradients) for part in parts), strict=True
        )
        return torch.cat(losses), torch.cat(nlls)
    scored = targets != IGNORED
    column = targets.where(scored, 0).unsqueeze(-1)
    x = logits.float()
    log_z = x.logsumexp(-1)
    chosen = x.gather(-1, column).squeeze(-1)
    nll = (log_z - chosen) * scored
    loss = nll
    if smoothing:
        loss = (log_z - (1 - smoothing) * chosen - smoothing * x.mean(-1)) * scored
    if z_loss:
        loss = loss + z_loss * log_z.square() * scored
    if want_gradients:
        p = (x.sub_(log_z.unsqueeze(-1)) if x is not logits else x - log_z.unsqueeze(-1)).exp_()
        p.mul_(((1 + 2 * z_loss * log_z) * scored).unsqueeze(-1))
        if smoothing:
            p.sub_((smoothing / p.size(-1)) * scored.unsqueeze(-1))
        p.scatter_add_(-1, column, ((smoothing - 1) * scored.float()).unsqueeze(-1))
        logits.copy_(p)
    return loss, nll


def distillation_gradient_(
    logits: Tensor,
    targets: Tensor,
    part: slice,
    smoothing: float,
    z_loss: float,
    soft: SoftTargets,
    want_gradients: bool = True,
) -> tuple[Tensor, Tensor]:
    """`softmax_gradient_` of the targets and of the teacher, mixed; `part`: which rows of the teacher's these are."""
    rows = max(1, CACHE_BYTES // (4 * logits.size(-1)))
    if logits.device.type == "cpu" and len(logits) > rows:
        found = [
            distillation_gradient_(
                logits[start : start + rows], targets[start : start + rows],
                slice(part.start + start, part.start + min(start + rows, len(logits))),
                smoothing, z_loss, soft, want_gradients,
            )
            for start in range(0, len(logits), rows)
        ]  # fmt: skip
        losses, nlls = zip(*found, strict=True)
        return torch.cat(losses), torch.cat(nlls)
    taught, gradient = soft.gradient(logits, targets != IGNORED, part)
    loss, nll = softmax_gradient_(logits, targets, smoothing, z_loss, want_gradients)
    if want_gradients:
        logits.copy_(gradient.mul_(soft.alpha * soft.weight).add_(logits, alpha=1 - soft.alpha))
    return (1 - soft.alpha) * loss + soft.alpha * soft.weight * taught, nll
