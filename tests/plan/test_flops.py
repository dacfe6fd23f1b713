"""Operations against what torch's own counter sees the real models do, and against published utilisations."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bigtrain import models
from bigtrain.config import (
    Config,
    DecoderConfig,
    EncoderConfig,
    HuggingFaceConfig,
    LoRAConfig,
    MaskedLMConfig,
    ModelConfig,
    Seq2SeqConfig,
    TrainConfig,
)
from bigtrain.errors import ConfigError
from bigtrain.models.heads import MaskedLMHead
from bigtrain.plan import flops

SHAPE = {"dim": 64, "n_layers": 3, "n_heads": 4, "vocab_size": 192, "max_seq_len": 32, "dropout": 0.0}
DECODERS = {
    "gpt": DecoderConfig(**SHAPE),
    "llama": DecoderConfig(
        **SHAPE, n_kv_heads=2, ffn_dim=176, positions="rotary", norm="rmsnorm", activation="swiglu", bias=False,
        tie_embeddings=False,
    ),
}  # fmt: skip
SEQUENCES = 2


def counted(run: object) -> float:
    """Multiplications of the forward and backward pass that torch sees; it counts no attention on the CPU, so that the
    math kernel, which is plain matmuls, is made to do it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run().backward()  # type: ignore[operator]
    return float(counter.get_total_flops())


@pytest.fixture(autouse=True)
def _no_kernels_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigtrain.models.cpu_kernels.attention_usable", lambda *_: False)
    monkeypatch.setattr("bigtrain.models.cpu_kernels.short_attention_usable", lambda *_: False)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_decoder_as_torch_counts_it(name: str, checkpointing: bool) -> None:
    config = Config(model=DECODERS[name], train=TrainConfig(activation_checkpointing=checkpointing))
    model = models.build(DECODERS[name])
    model.set_activation_checkpointing(checkpointing)
    tokens = torch.randint(0, 192, (SEQUENCES, 32))
    count = flops.count(config, SEQUENCES)
    # The math kernel does the whole square, and its backward pass twice as much.
    work = flops.operations(config, SEQUENCES)
    again = 1 if checkpointing else 0
    expected = count.model + again * (
        sum(m.flops for m in work.matmuls if m.in_block and m.again) + sum(s.square for s in work.scores)
    )
    assert counted(lambda: model(tokens, tokens)[0]) == expected
    assert count.tokens == SEQUENCES * 32


def test_encoder_with_masked_words_as_torch_counts_it() -> None:
    shape = EncoderConfig(**SHAPE, pooler=True)
    config = Config(model=shape, task=MaskedLMConfig(mask_fraction=0.25))
    encoder = models.Encoder(shape)
    head = MaskedLMHead(shape, encoder.embedding)
    tokens = torch.randint(0, 192, (SEQUENCES, 32))
    targets = torch.where(torch.arange(32) % 4 == 0, tokens, -100)

    def loss() -> torch.Tensor:
        hidden = encoder(tokens)
        return head(hidden, targets)[0] + encoder.pool(hidden).sum()

    assert counted(loss) == flops.count(config, SEQUENCES).model


def test_encoder_decoder_as_torch_counts_it() -> None:
    shape = Seq2SeqConfig(**SHAPE, n_decoder_layers=2)
    model = models.Seq2Seq(shape)
    source, target = torch.randint(0, 192, (2, SEQUENCES, 32))
    count = flops.count(Config(model=shape), SEQUENCES)
    assert counted(lambda: model(source, None, target, target)[0]) == count.model
    assert count.tokens == 2 * SEQUENCES * 32


@pytest.mark.parametrize("model", [DECODERS["gpt"], DECODERS["llama"], Seq2SeqConfig(**SHAPE)])
def test_model_flops_are_those_that_a_run_reports(model: ModelConfig) -> None:
    """The plan's MFU and the run's have one numerator, but for norms, biases and gains, which only the run counts."""
    planned = flops.count(Config(model=model), SEQUENCES).model_per_token
    assert planned == pytest.approx(models.flops_per_token(model), rel=0.02)
    assert planned < models.flops_per_token(model)


def test_a_causal_kernel_does_half_and_its_backward_the_scores_again() -> None:
    config = Config(model=DECODERS["gpt"])
    count, work = flops.count(config, SEQUENCES), flops.operations(config, SEQUENCES)
    square = count.forward["scores"]
    assert square == 4 * SEQUENCES * 32 * 32 * 64 * 3
    assert sum(scores.computed for scores in work.scores) == square * 33 / 64  # what takes time
    assert count.hardware == count.model + square / 2  # in one measure: one matmul more than the four of the gradients
    assert count.recomputed == 0


@pytest.mark.parametrize("lora", [0, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model", [*DECODERS.values(), EncoderConfig(**SHAPE), Seq2SeqConfig(**SHAPE)])
def test_hardware_does_all_that_the_model_asks_for(model: ModelConfig, checkpointing: bool, lora: int) -> None:
    train = TrainConfig(activation_checkpointing=checkpointing, lora=LoRAConfig(rank=lora))
    count = flops.count(Config(model=model, train=train), SEQUENCES)
    assert count.hardware > count.model > 0


def test_recomputation_is_hardware_only() -> None:
    without = flops.count(Config(model=DECODERS["gpt"]), SEQUENCES)
    again = flops.count(Config(model=DECODERS["gpt"], train=TrainConfig(activation_checkpointing=True)), SEQUENCES)
    assert again.model == without.model
    assert again.hardware == without.hardware + again.recomputed
    assert 0 < again.recomputed < without.model / 3


def test_lora_leaves_out_the_gradients_of_frozen_weights() -> None:
    full = flops.count(Config(model=DECODERS["gpt"]), SEQUENCES)
    lora = flops.count(Config(model=DECODERS["gpt"], train=TrainConfig(lora=LoRAConfig(rank=4))), SEQUENCES)
    in_blocks = full.forward["attention"] + full.forward["feed_forward"]
    assert full.hardware - lora.hardware == full.model - lora.model == in_blocks


def test_a_model_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        flops.count(Config(model=DecoderConfig()), 1)
    with pytest.raises(ConfigError, match=r"model\.kind='hf'"):
        flops.count(Config(model=HuggingFaceConfig(path="x")), 1)
