"""Why a model said what it said: where each head looks, and what each token contributes to one score.

Integrated gradients (arXiv 1703.01365) are captum's; attention probabilities, which fused attention never shows, are
computed again from what each layer was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.errors import BigtrainError
from bigtrain.models.layers import Attention, apply_rotary

STEPS = (64, 2048)  # of the integral: at first, and at most; a score may jump within a hundredth of the way
TOLERANCE = 0.01  # of the score's change, by which the attributions' sum may be off before more steps are taken
BATCH_TOKENS = 4096  # run through the model at a time


@dataclass(frozen=True)
class Attribution:
    tokens: Tensor  # (T,) float32: what each token adds to the score
    score: float  # of the text
    baseline: float  # of the text without its content
    delta: float  # the sum of `tokens`, less the score's change: 0 if the integral were exact
    steps: int


def attribute(
    score: Callable[..., Tensor], embedding: nn.Module, tokens: Tensor, baseline: Tensor, *inputs: Any
) -> Attribution:
    """Integrated gradients of `score` over the embeddings of `tokens` (1, T), on the way from those of `baseline`.

    score: (tokens (B, T), *inputs) -> (B,), calling `embedding` on the tokens. The number of steps is doubled until the
    attributions sum to the score's change within TOLERANCE of it. Raises BigtrainError where captum is missing.
    """
    try:
        from captum.attr import LayerIntegratedGradients
    except ImportError:
        raise BigtrainError("attributions need captum: pip install 'bigtrain[inspect]'") from None
    with torch.no_grad():
        reached, begun = float(score(tokens, *inputs)), float(score(baseline, *inputs))
    integrated = LayerIntegratedGradients(score, embedding)
    steps, most = STEPS
    while True:
        found = integrated.attribute(
            tokens, baselines=baseline, additional_forward_args=inputs or None, n_steps=steps,
            method="riemann_trapezoid",  # many Gauss points take longer to find than to run
            internal_batch_size=max(1, BATCH_TOKENS // tokens.size(1)),
        )  # fmt: skip
        by_token = found.detach().float().sum(-1)[0].cpu()
        delta = float(by_token.sum()) - (reached - begun)
        if abs(delta) <= TOLERANCE * abs(reached - begun) or steps == most:
            return Attribution(by_token, reached, begun, delta, steps)
        steps *= 2


@contextmanager
def attention_of(model: nn.Module) -> Iterator[list[Tensor]]:
    """Gathers each layer's attention probabilities (B, H, T, T) of what is run inside, float32 on the CPU."""
    found: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, Attention)
        found.append(attention_probabilities(module, *arguments[:3]).float().cpu())

    handles = [part.register_forward_hook(keep) for part in model.modules() if isinstance(part, Attention)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def attention_probabilities(
    attention: Attention, x: Tensor, mask: Tensor | None = None, rotary: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """softmax(q k / sqrt(head_dim)) (B, H, T, T) of what `attention` is called with: x (B, T, D), mask, rotary."""
    groups = (attention.n_heads, attention.n_kv_heads, attention.n_kv_heads)
    q, k, _ = attention.qkv(x).unflatten(-1, (-1, attention.head_dim)).split(groups, dim=2)
    if rotary is not None:
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
    k = k.repeat_interleave(attention.n_heads // attention.n_kv_heads, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).float() * attention.head_dim**-0.5
    if mask is None and attention.causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)
