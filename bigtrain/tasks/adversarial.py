"""Adversarial training: the worst small change of a text's embeddings, as far as its gradient can tell.

FGM (arXiv 1605.07725) takes one step along the gradient to the edge of a ball; PGD (arXiv 1706.06083) takes several
smaller ones and returns to the ball after each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PGD_STRIDE = 2.5  # steps together are this many times the ball's radius (arXiv 1706.06083's own setting)


def worst_change(loss: Callable[[Tensor], Tensor], zeros: Tensor, epsilon: float, steps: int) -> Tensor:
    """A change (B, T, D) of the embeddings, at most `epsilon` long (L2) for each text, that raises the loss.

    loss: what the model's loss (a scalar) is with a change. zeros: (B, T, D), in the model's type. One step is FGM.
    No gradient of a parameter is computed.
    """
    stride = epsilon if steps == 1 else PGD_STRIDE * epsilon / steps
    change = zeros
    for _ in range(steps):
        change = change.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(change), change)
        change = _inside(change.float() + stride * _unit(gradient.float()), epsilon).to(zeros.dtype)
    return change.detach()


def _lengths(x: Tensor) -> Tensor:
    """(B, T, D) -> (B, 1, 1)."""
    return x.flatten(1).norm(dim=1)[:, None, None]


def _unit(x: Tensor) -> Tensor:
    """Of length 1 each; a text without a gradient stays as it is."""
    return x / _lengths(x).clamp(min=torch.finfo(x.dtype).tiny)


def _inside(x: Tensor, radius: float) -> Tensor:
    return x * (radius / _lengths(x).clamp(min=radius))
