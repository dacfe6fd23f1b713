"""An encoder-decoder Transformer (arXiv 1706.03762) with its norms before the sub-layers, where deep ones stay stable
(arXiv 2002.04745).

It knows nothing of parallelism, and has no buffer that the meta device or `zero.Init` could lose.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.config import Seq2SeqConfig
from bigtrain.models import decoder, encoder
from bigtrain.models.cross_entropy import Head
from bigtrain.models.layers import Block, Cache, Embedding, Linear, make_norm, residual_std
from bigtrain.models.network import Network


class Seq2SeqCache(Protocol):
    """Keys and values of earlier target tokens and of the source, as transformers' `EncoderDecoderCache` has them."""

    self_attention_cache: Cache
    cross_attention_cache: Any  # a Cache with `layers`, whose keys and values can be read
    is_updated: dict[int, bool]  # layer -> whether the source's are there


class Seq2Seq(Network):
    """Source and target tokens to logits, or straight to the summed loss. `config.vocab_size` must be a number."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("Seq2SeqConfig.vocab_size must be set before the model is built")
        self.config, self.n_decoder_layers = config, config.n_decoder_layers
        # As the paper's code has it: embeddings of the positions' size once they are scaled by sqrt(dim), and logits of
        # size 1, for which the same table is not scaled.
        self.embedding = Embedding(config.vocab_size, config.dim, config.dim**-0.5)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder_blocks = nn.ModuleList(Block(config, index, causal=False) for index in range(config.n_layers))
        self.encoder_norm = make_norm(config)
        self.decoder_blocks = nn.ModuleList(DecoderBlock(config, index) for index in range(config.n_decoder_layers))
        self.norm = make_norm(config)
        self.head = Head(config.dim, config.vocab_size, config.init_std, self.embedding)

    def tie_weights(self) -> None:
        self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor | None,
        attention_mask: Tensor | None = None,
        targets_in: Tensor | None = None,
        targets: Tensor | None = None,
        label_smoothing: float = 0.0,
        memory: Tensor | None = None,
        cache: Seq2SeqCache | None = None,
    ) -> Any:
        """tokens (B, S) and targets_in (B, T) int64 -> logits (B, T, V), or with targets -> (loss_sum, nll_sum).

        attention_mask (B, S): 1 at real tokens of the source, 0 at padding. None: no padding.
        targets_in: what stands before each token that is to be predicted: the start token, then the target. Padding at
        its end needs no mask, for what is before it does not see it. Without it the result is the source as the
        decoder reads it, `memory` (B, S, D), which a later call takes instead of the tokens: all of a model's uses go
        through this one call, which is what ZeRO-3 and FSDP gather parameters for.
        targets (B, T): -100 where a token is not scored; the results are those of Decoder.forward.
        cache: of the P earlier target tokens; those of `targets_in` are added to it.
        """
        if memory is None:
            assert tokens is not None
            memory = self.encode(tokens, attention_mask)
        if targets_in is None:
            return memory
        hidden = self.decode(targets_in, memory, attention_mask, cache)
        return self.head(hidden, targets, label_smoothing)

    def encode(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        """tokens (B, S) -> memory (B, S, D)."""
        x = self._embed(tokens, 0)
        mask = encoder.attention_pattern(attention_mask, None)
        for block in self.encoder_blocks:
            x = self.run_block(block, x, mask)
        return self.encoder_norm(x)

    def decode(
        self, targets_in: Tensor, memory: Tensor, attention_mask: Tensor | None, cache: Seq2SeqCache | None = None
    ) -> Tensor:
        """targets_in (B, T), memory (B, S, D) -> hidden states (B, T, D) after the last norm."""
        length, past = targets_in.size(1), cache.self_attention_cache.get_seq_length() if cache is not None else 0
        x = self._embed(targets_in, past)
        mask = decoder.attention_pattern(length, past, None, None, x.device)
        memory_mask = encoder.attention_pattern(attention_mask, None)
        for block in self.decoder_blocks:
            x = self.run_block(block, x, mask, memory, memory_mask, cache)
        return self.norm(x)

    def _embed(self, tokens: Tensor, past: int) -> Tensor:
        x = self.embedding(tokens) * self.config.dim**0.5
        positions = torch.arange(past, past + tokens.size(1), device=tokens.device)
        return self.dropout(x + sinusoids(positions, self.config.dim).to(x.dtype))


class DecoderBlock(Block):
    """Block with attention to the source between its two sub-layers."""

    def __init__(self, config: Seq2SeqConfig, layer_index: int) -> None:
        super().__init__(config, layer_index, causal=True)
        self.cross_attention_norm = make_norm(config)
        self.cross_attention = CrossAttention(config, layer_index)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        cache: Seq2SeqCache | None = None,
    ) -> Tensor:
        """x (B, T, D), memory (B, S, D) -> (B, T, D); masks are booleans, True where a query may look."""
        own = cache.self_attention_cache if cache is not None else None
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, None, own))
        x = x + self.dropout(self.cross_attention(self.cross_attention_norm(x), memory, memory_mask, cache))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class CrossAttention(nn.Module):
    """Queries of the target; keys and values, one projection's two halves, of the source."""

    def __init__(self, config: Seq2SeqConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.dim // config.n_heads
        self.dropout = config.dropout
        self.query = Linear(config.dim, config.dim, config.bias, config.init_std)
        self.key_value = Linear(config.dim, 2 * config.dim, config.bias, config.init_std)
        self.out = Linear(config.dim, config.dim, config.bias, residual_std(config))

    def forward(
        self, x: Tensor, memory: Tensor, mask: Tensor | None = None, cache: Seq2SeqCache | None = None
    ) -> Tensor:
        """x (B, T, D), memory (B, S, D), mask (B, 1, 1, S) -> (B, T, D)."""
        q = self._heads(self.query(x))
        if cache is not None and cache.is_updated.get(self.layer_index):
            layer = cache.cross_attention_cache.layers[self.layer_index]
            k, v = layer.keys, layer.values
        else:
            k, v = map(self._heads, self.key_value(memory).chunk(2, dim=-1))
            if cache is not None:
                k, v = cache.cross_attention_cache.update(k, v, self.layer_index)
                cache.is_updated[self.layer_index] = True
        y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, head_dim)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """(T,) -> (T, dim) float32, section 3.5 of the paper: all the sines, then all the cosines, as its code has them."""
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    angles = positions.float().unsqueeze(-1) * 10_000.0**-exponents
    return torch.cat((angles.sin(), angles.cos()), dim=-1)
