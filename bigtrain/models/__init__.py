"""Models in compact code of our own: `build` makes one from its section of the config."""

from __future__ import annotations

from typing import Any, overload

from torch import nn

from bigtrain.config import DecoderConfig, EncoderConfig, OurModelConfig, Seq2SeqConfig
from bigtrain.models.decoder import Decoder
from bigtrain.models.encoder import Encoder
from bigtrain.models.seq2seq import Seq2Seq
from bigtrain.models.sizes import count_parameters, flops_per_token

__all__ = ["Decoder", "Encoder", "Seq2Seq", "build", "count_parameters", "decoder_layers", "flops_per_token"]


def decoder_layers(model: nn.Module) -> int:
    """Of an encoder-decoder, ours or transformers', or an engine's wrapper of one."""
    inner: Any = getattr(model, "module", model)
    layers: int = inner.n_decoder_layers
    return layers


@overload
def build(config: DecoderConfig) -> Decoder: ...
@overload
def build(config: EncoderConfig) -> Encoder: ...
@overload
def build(config: Seq2SeqConfig) -> Seq2Seq: ...
@overload
def build(config: OurModelConfig) -> Decoder | Encoder | Seq2Seq: ...
def build(config: OurModelConfig) -> Decoder | Encoder | Seq2Seq:
    """Our model that `config` describes, on the current default device (`with torch.device(...)`) and dtype."""
    if isinstance(config, Seq2SeqConfig):
        return Seq2Seq(config)
    return Encoder(config) if isinstance(config, EncoderConfig) else Decoder(config)
