"""The layers of every model here: each one knows its own initialisation, and none knows about parallelism.

A layer draws its weights in its constructor (`reset_parameters`), which is the only moment at which
`deepspeed.zero.Init` still shows it the whole parameter; on the meta device the draw does nothing and
`Network.init_weights` repeats it once memory exists. Draws are made in float32 whatever the parameter's type, so
one seed gives the same weights at every precision and ZeRO stage.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.config import (
    DecoderConfig,
    EncoderConfig,
    LinearScalingConfig,
    OurModelConfig,
    RopeScalingConfig,
    head_dim,
    starts_normed,
)
from bigtrain.models import cpu_kernels
from bigtrain.models.unpadded import Unpadded


class Cache(Protocol):
    """Keys and values of earlier tokens, as transformers' `Cache` classes have them."""

    def update(self, key: Tensor, value: Tensor, layer_index: int, /) -> tuple[Tensor, Tensor]: ...

    def get_seq_length(self) -> int: ...


@torch.no_grad()
def draw_normal(parameter: Tensor, std: float) -> None:
    if not parameter.is_meta:  # where torch would import a second's worth of modules, to draw nothing
        parameter.copy_(parameter.float().normal_(0.0, std))


class Linear(nn.Linear):
    """y = x W^T + b with W ~ N(0, std^2) and b = 0."""

    def __init__(self, inputs: int, outputs: int, bias: bool, std: float) -> None:
        self.std = std  # before nn.Linear's constructor, which calls reset_parameters
        super().__init__(inputs, outputs, bias)

    def reset_parameters(self) -> None:
        draw_normal(self.weight, self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """A table of `count` rows drawn from N(0, std^2)."""

    def __init__(self, count: int, dim: int, std: float) -> None:
        self.std = std
        super().__init__(count, dim)

    def reset_parameters(self) -> None:
        draw_normal(self.weight, self.std)


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU in bfloat16 a faster one."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.p and cpu_kernels.usable(input):
            return cpu_kernels.dropout(input, self.p)
        return super().forward(input)


def make_norm(config: OurModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.dim, config.norm_eps)
    return nn.LayerNorm(config.dim, config.norm_eps, bias=config.bias)


def rotary_table(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling: RopeScalingConfig | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE (arXiv 2104.09864), each (..., T, head_dim) for positions (..., T).

    Angles are float32: a bfloat16 one is off by whole turns from position 256 on. Computed once a forward, so that
    the model has no buffer that the meta device or `zero.Init` could lose.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequencies = theta**-exponents  # radians a position
    if scaling is not None:
        frequencies = _scaled(frequencies, scaling)
    angles = positions.float().unsqueeze(-1) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _scaled(frequencies: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """(head_dim / 2,) -> as slow as a longer context wants them."""
    if isinstance(scaling, LinearScalingConfig):
        return frequencies / scaling.factor
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def apply_rotary(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (B, T, H, head_dim): dimension i is paired with i + head_dim / 2, as in Llama's Hugging Face code."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Self-attention, causal in a decoder, with n_kv_heads shared among n_heads queries there (grouped-query attention,
    arXiv 2305.13245).

    `qkv` holds the projections of queries, keys and values one below the other: one matmul instead of three.
    """

    def __init__(self, config: OurModelConfig, layer_index: int, causal: bool) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.causal = causal
        self.n_heads = config.n_heads
        self.n_kv_heads = (isinstance(config, DecoderConfig) and config.n_kv_heads) or config.n_heads
        self.head_dim = head_dim(config)
        self.dropout = config.dropout
        self.qkv = Linear(
            config.dim, (self.n_heads + 2 * self.n_kv_heads) * self.head_dim, config.bias, config.init_std
        )
        self.out = Linear(self.n_heads * self.head_dim, config.dim, config.bias, residual_std(config))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | Unpadded | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D).

        mask: boolean (B or 1, 1, T or 1, S), True where a query may look; None: at all tokens,
        or where the attention is causal, at all earlier ones and itself. Unpadded: x (1, N, D) holds the tokens of
        several texts one after another, and each is to see its own text.
        """
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, -1, self.head_dim)  # (B, T, H + 2 KV, head_dim)
        q, k, v = qkv.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=2)
        if rotary is not None:
            q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        dropout = self.dropout if self.training else 0.0
        if isinstance(mask, Unpadded):
            return self.out(mask.attention(q, k, v, dropout))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, head_dim)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_index)
        grouped = self.n_kv_heads != self.n_heads
        if self.causal and mask is None and cache is None and not dropout and cpu_kernels.attention_usable(q):
            if grouped:
                k, v = (x.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1) for x in (k, v))
            y = cpu_kernels.causal_attention(q, k, v)
        elif not self.causal and not grouped and cpu_kernels.short_attention_usable(q, k, dropout):
            y = cpu_kernels.short_attention(q, k, v, mask, dropout)
        else:
            causal = self.causal and mask is None and length > 1  # one new token sees every cached one
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=grouped)
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """down(act(up(x))); with SwiGLU and GeGLU (arXiv 2002.05202) `up` holds the gate's rows, then the values' rows."""

    def __init__(self, config: OurModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        ffn_dim = config.ffn_dim or 4 * config.dim
        rows = 2 * ffn_dim if config.activation in ("swiglu", "geglu") else ffn_dim
        self.up = Linear(config.dim, rows, config.bias, config.init_std)
        self.down = Linear(ffn_dim, config.dim, config.bias, residual_std(config))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        x = self.up(x)
        if self.activation in ("swiglu", "geglu"):
            gate, value = x.chunk(2, dim=-1)
            x = (F.silu(gate) if self.activation == "swiglu" else F.gelu(gate)) * value
        elif self.activation == "gelu_tanh" and cpu_kernels.usable(x):
            x = cpu_kernels.gelu_tanh(x)
        elif self.activation == "relu":
            x = F.relu(x)
        else:
            x = F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return self.down(x)


class Block(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + feed_forward(norm(x)). Post-norm (BERT): norm(x + attention(x)) ..."""

    def __init__(self, config: OurModelConfig, layer_index: int, causal: bool | None = None) -> None:
        """causal: None for what the kind of the config says."""
        super().__init__()
        causal = isinstance(config, DecoderConfig) if causal is None else causal
        self.norm_first = not isinstance(config, EncoderConfig) or config.norm_first
        normed = isinstance(config, EncoderConfig) and starts_normed(config) and layer_index == 0
        self.attention_norm = nn.Identity() if normed else make_norm(config)
        self.attention = Attention(config, layer_index, causal)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """x (B, T, D) -> (B, T, D); `context` is what Attention.forward takes after x."""
        if self.norm_first:
            x = x + self.dropout(self.attention(self.attention_norm(x), *context))
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, *context)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


def residual_std(config: OurModelConfig) -> float:
    """Projections that write into the residual stream start smaller, so that its variance does not grow with depth
    (GPT-2 report, section 2.3; Megatron-LM does the same for Llama). Post-norm keeps it from growing by itself."""
    if isinstance(config, EncoderConfig) and not config.norm_first:
        return config.init_std
    return config.init_std / (2 * config.n_layers) ** 0.5
