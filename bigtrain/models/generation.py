"""Our models behind transformers' `generate`: greedy, sampling and beam search are theirs, with their KV cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput

from bigtrain.models.decoder import Decoder

# transformers 5.24 renamed the cache, as `generate` passes it to a model and looks for it in what the model returns.
_CACHE = ("cache", "past_key_values")
_CACHE_OF_OUTPUT = next(field.name for field in dataclasses.fields(CausalLMOutputWithPast) if field.name in _CACHE)


class DecoderForGeneration(PreTrainedModel, GenerationMixin):
    """What `generate` needs of a model, around a Decoder.

    vocab_size: the tokenizer's, or None for the decoder's. The decoder's may be larger (rounded up for speed): words
    that do not exist are never written.
    """

    config_class = PreTrainedConfig
    main_input_name = "input_ids"

    def __init__(self, decoder: Decoder, vocab_size: int | None = None) -> None:
        shape = decoder.config
        self.vocab_size = vocab_size or shape.vocab_size
        super().__init__(
            PreTrainedConfig(
                num_hidden_layers=shape.n_layers,  # of the cache
                vocab_size=self.vocab_size,
                max_position_embeddings=shape.max_seq_len,
                is_encoder_decoder=False,
            )
        )
        self.decoder = decoder

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        logits_to_keep: int = 0,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids (B, T), attention_mask (B, S + T), position_ids (B or 1, T) with S cached tokens -> logits.

        logits are (B, logits_to_keep, V), or (B, T, V) if that is 0.
        """
        cache = past_key_values if cache is None else cache
        hidden = self.decoder.forward_hidden(
            input_ids, cache=cache, positions=position_ids, attention_mask=attention_mask
        )
        logits = self.decoder.head(hidden[:, -logits_to_keep:])[..., : self.vocab_size]
        return CausalLMOutputWithPast(logits=logits, **{_CACHE_OF_OUTPUT: cache})


class Seq2SeqForGeneration(PreTrainedModel, GenerationMixin):
    """What `generate` needs of a model, around a Seq2Seq or the engine's wrapper of one, given a source's memory."""

    config_class = PreTrainedConfig
    main_input_name = "input_ids"

    def __init__(self, model: nn.Module, n_decoder_layers: int, vocab_size: int, device: torch.device) -> None:
        super().__init__(
            PreTrainedConfig(num_hidden_layers=n_decoder_layers, vocab_size=vocab_size, is_encoder_decoder=True)
        )
        self.model, self.vocab_size, self.place = model, vocab_size, device

    @property
    def device(self) -> torch.device:
        """Of the inputs: a weight may be nowhere until it is used, on the disk or sharded."""
        return self.place

    def forward(
        self,
        encoder_outputs: Any,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        cache: Any = None,
        past_key_values: Any = None,
        **unused: Any,
    ) -> Seq2SeqLMOutput:
        """encoder_outputs[0] (B, S, D), attention_mask (B, S), decoder_input_ids (B, T) -> logits (B, T, V)."""
        cache = past_key_values if cache is None else cache
        logits = self.model(None, attention_mask, decoder_input_ids, memory=encoder_outputs[0], cache=cache)
        return Seq2SeqLMOutput(logits=logits[..., : self.vocab_size], **{_CACHE_OF_OUTPUT: cache})


def translate(
    model: nn.Module,
    n_decoder_layers: int,
    memory: Tensor,
    attention_mask: Tensor,
    special_ids: dict[str, int],
    vocab_size: int,
    max_new_tokens: int,
    options: dict[str, Any],
) -> list[list[int]]:
    """The target tokens that `model`, which has read the sources into memory (B, S, D), writes for each.

    They begin after the start token [CLS] and end before [SEP], or after max_new_tokens. `options`: of
    GenerationConfig. Ranks that are one process group go on together until the last one's texts have ended: where
    parameters are sharded every forward pass is a collective.
    """
    settings = GenerationConfig(
        decoder_start_token_id=special_ids["cls"],
        eos_token_id=special_ids["sep"],
        pad_token_id=special_ids["pad"],
        max_new_tokens=max_new_tokens,
        **options,
    )
    output = Seq2SeqForGeneration(model, n_decoder_layers, vocab_size, memory.device).generate(
        attention_mask=attention_mask,
        encoder_outputs=BaseModelOutput(last_hidden_state=memory),
        generation_config=settings,
        synced_gpus=dist.is_initialized() and dist.get_world_size() > 1,
    )
    end = special_ids["sep"]
    rows: list[list[int]] = output[:, 1:].tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]
