"""A bidirectional Transformer: BERT (arXiv 1810.04805) and its modern variant are two settings of one EncoderConfig.

It ends in hidden states; what they are for is a head's matter (models/heads.py). It knows nothing of parallelism.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bigtrain.config import EncoderConfig, head_dim
from bigtrain.models.layers import Block, Dropout, Embedding, Linear, make_norm, rotary_table
from bigtrain.models.network import Network
from bigtrain.models.unpadded import Unpadded


class Encoder(Network):
    """Tokens to hidden states. `config.vocab_size` must be a number."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("EncoderConfig.vocab_size must be set before the model is built")
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.dim, config.init_std)
        if config.token_types:
            self.token_types = Embedding(config.token_types, config.dim, config.init_std)
        if config.positions == "learned":
            self.positions = Embedding(config.max_seq_len, config.dim, config.init_std)
        self.embedding_norm = make_norm(config)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.n_layers))
        self.norm = make_norm(config) if config.norm_first else nn.Identity()  # post-norm blocks end in one
        self.pooler = Pooler(config) if config.pooler else None

    def forward(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        token_types: Tensor | None = None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        change: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, T) int64 -> hidden states (B, T, D).

        attention_mask (B, T): 1 at real tokens, 0 at padding, which no token attends to. None: no padding.
        token_types (B, T): which segment a token is of, by default 0; not looked at with config.token_types = 0.
        positions (B, T): of each token in its text, by default 0, 1, ...
        document_ids (B, T): of packed rows; attention stays among tokens of equal id. Give `positions` with them.
        change (B, T, D): is added to the tokens' embeddings.

        With config.unpadded the hidden states of padding mean nothing, and on a GPU the host waits to learn how much
        of it there is. Rows with document_ids are packed already: they go through as they are.
        """
        if positions is None:
            positions = torch.arange(tokens.size(1), device=tokens.device)
        unpadded = None
        if self.config.unpadded and attention_mask is not None and document_ids is None:
            unpadded = Unpadded.of(attention_mask)
        if unpadded is not None:  # from here on T is the number of real tokens, and B is 1
            positions = unpadded.take(positions.expand_as(tokens))
            token_types = None if token_types is None else unpadded.take(token_types)
            change = None if change is None else unpadded.take(change)
            tokens = unpadded.take(tokens)
        x = self.embedding(tokens)
        if change is not None:
            x = x + change
        if self.config.token_types:
            x = x + self.token_types(tokens.new_zeros(1) if token_types is None else token_types)
        rotary = None
        if self.config.positions == "learned":
            x = x + self.positions(positions)
        else:
            cos, sin = rotary_table(positions, head_dim(self.config), self.config.rope_theta, x.dtype)
            rotary = (cos.unsqueeze(-2), sin.unsqueeze(-2))  # the same for every head
        x = self.dropout(self.embedding_norm(x))
        mask = attention_pattern(attention_mask, document_ids) if unpadded is None else unpadded
        for block in self.blocks:
            x = self.run_block(block, x, mask, rotary)
        x = self.norm(x)
        return x if unpadded is None else unpadded.put_back(x)

    def pool(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """hidden (B, T, D) -> (B, D): what stands for each text, through the pooler if the config has one.

        attention_mask (B, T): 1 at real tokens, whose mean config.pooling = mean takes. None: no padding.
        """
        if self.config.pooling == "first":
            pooled = hidden[:, 0]
        elif attention_mask is None:
            pooled = hidden.mean(1)
        else:
            real = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * real).sum(1) / real.sum(1).clamp(min=1)  # a filler row has no token
        return pooled if self.pooler is None else self.pooler(pooled)


class Pooler(Linear):
    """BERT's: tanh(linear(text)). A module that is called, so that ZeRO-3 gathers its weights."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config.dim, config.dim, config.bias, config.init_std)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        return super().forward(x).tanh()


def attention_pattern(attention_mask: Tensor | None, document_ids: Tensor | None) -> Tensor | None:
    """Boolean (B, 1, 1 or T, T), True where a query may look; None where every token may look at every other."""
    if attention_mask is not None and attention_mask.device.type == "cpu" and bool(attention_mask.all()):
        attention_mask = None  # attention without a mask is faster. On a GPU, asking would make the host wait for it.
    mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
    if document_ids is not None:
        same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
        mask = same if mask is None else mask & same
    if attention_mask is None:
        return mask
    assert mask is not None
    return mask | ~mask.any(-1, keepdim=True)  # a query without any allowed key would be NaN: it may look everywhere
