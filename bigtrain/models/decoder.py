"""A causal Transformer: GPT-2 and Llama are two settings of one DecoderConfig.

The model knows nothing of parallelism: ZeRO shards it from outside, and it runs alike on one CPU and many GPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.config import DecoderConfig, head_dim
from bigtrain.models.cross_entropy import Head
from bigtrain.models.layers import Block, Cache, Dropout, Embedding, make_norm, rotary_table
from bigtrain.models.network import Network


class Decoder(Network):
    """Tokens to logits, or with targets straight to the summed loss. `config.vocab_size` must be a number."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("DecoderConfig.vocab_size must be set before the model is built")
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.dim, config.init_std)
        if config.positions == "learned":
            self.positions = Embedding(config.max_seq_len, config.dim, config.init_std)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.n_layers))
        self.norm = make_norm(config)
        self.head = Head(
            config.dim, config.vocab_size, config.init_std, self.embedding if config.tie_embeddings else None
        )

    def tie_weights(self) -> None:
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        document_ids: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        """tokens (B, T) int64 -> logits (B, T, V), or with targets -> (loss_sum, nll_sum).

        targets (B, T) int64, -100 where a token is not scored: both results are float32 scalars summed over the
        scored tokens; loss_sum is what to differentiate, label smoothing and z-loss included, nll_sum is detached
        plain cross-entropy in nats. The other arguments are those of `forward_hidden`.
        """
        hidden = self.forward_hidden(tokens, document_ids, cache, positions, attention_mask)
        return self.head(hidden, targets, label_smoothing, z_loss)

    def forward_hidden(
        self,
        tokens: Tensor,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, T) -> hidden states (B, T, D) after the last norm: `self.head(hidden)` makes logits of them.

        document_ids (B, T): attention stays among tokens of equal id.
        cache: keys and values of S earlier tokens; those of `tokens` are added to it. Any object with transformers'
        `update(key, value, layer_index)` and `get_seq_length()`.
        positions (B, T): of each token in its text; by default S, S + 1, ...
        attention_mask (B, S + T): 0 at padding, which no token attends to. A left-padded batch needs both this and
        `positions`, counted from each text's first real token.
        """
        length, past = tokens.size(1), cache.get_seq_length() if cache is not None else 0
        if positions is None:
            positions = torch.arange(past, past + length, device=tokens.device)
        x = self.embedding(tokens)
        rotary = None
        if self.config.positions == "learned":
            x = x + self.positions(positions)
        else:
            config = self.config
            cos, sin = rotary_table(positions, head_dim(config), config.rope_theta, x.dtype, config.rope_scaling)
            rotary = (cos.unsqueeze(-2), sin.unsqueeze(-2))  # the same for every head
        mask = attention_pattern(length, past, document_ids, attention_mask, tokens.device)
        x = self.dropout(x)
        for block in self.blocks:
            x = self.run_block(block, x, mask, rotary, cache)
        return self.norm(x)


def attention_pattern(
    length: int, past: int, document_ids: Tensor | None, attention_mask: Tensor | None, device: torch.device
) -> Tensor | None:
    """Boolean (B or 1, 1, T, S + T), True where a query may look; None where plain causal attention says it all."""
    if document_ids is None and attention_mask is None and (past == 0 or length == 1):
        return None
    mask = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)[None, None]
    if document_ids is not None:
        mask = mask & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    if attention_mask is not None:
        mask = mask & attention_mask.bool()[:, None, None, :]
        # A padding token may look at itself: a row without any allowed key would be NaN.
        mask = mask | torch.eye(length, past + length, dtype=torch.bool, device=device).roll(past, 1)
    return mask
