"""How large a model is, without building it: on the meta device 405B parameters take no memory and half a second."""

from __future__ import annotations

import torch

from bigtrain.config import EncoderConfig, HuggingFaceConfig, ModelConfig, Seq2SeqConfig, head_dim
from bigtrain.models.decoder import Decoder
from bigtrain.models.encoder import Encoder
from bigtrain.models.seq2seq import Seq2Seq


def count_parameters(config: ModelConfig) -> int:
    """Distinct parameters: a tied embedding counts once. An encoder's without any task's head."""
    if isinstance(config, HuggingFaceConfig):
        from bigtrain.models.huggingface.auto import count_parameters as count

        return count(config)
    with torch.device("meta"):
        if isinstance(config, Seq2SeqConfig):
            model: torch.nn.Module = Seq2Seq(config)
        else:
            model = Encoder(config) if isinstance(config, EncoderConfig) else Decoder(config)
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(config: ModelConfig) -> float:
    """Floating-point operations of one token's forward and backward pass, recomputation not counted.

    6 per weight that is multiplied (embedding look-ups are not) and 12 * n_layers * dim * T for attention scores and
    values (PaLM, arXiv 2204.02311, appendix B, which counts the full square: causal attention does half of it).
    An encoder's are those of its blocks, at T = max_seq_len; a task's head comes on top.
    An encoder-decoder's are the mean over the tokens of a source and of a target that are both T = max_seq_len long.
    Of an architecture that is transformers' 6 per weight, whatever it is for: an estimate.
    """
    if isinstance(config, HuggingFaceConfig):
        return 6.0 * count_parameters(config)
    assert config.vocab_size is not None
    if isinstance(config, Seq2SeqConfig):
        scores = 12.0 * (config.n_layers + 2 * config.n_decoder_layers) * config.dim * config.max_seq_len
        return (6.0 * count_parameters(config) + scores) / 2  # each weight for either the one text or the other
    rows = config.max_seq_len if config.positions == "learned" else 0
    multiplied = float(count_parameters(config))
    if isinstance(config, EncoderConfig):
        rows += config.vocab_size + config.token_types
        if config.pooler:  # its weights are multiplied once a sequence
            pooler = config.dim * (config.dim + config.bias)
            multiplied -= pooler * (1 - 1 / config.max_seq_len)
    elif not config.tie_embeddings:
        rows += config.vocab_size
    width = config.n_heads * head_dim(config)
    return 6.0 * (multiplied - rows * config.dim) + 12.0 * config.n_layers * width * config.max_seq_len
