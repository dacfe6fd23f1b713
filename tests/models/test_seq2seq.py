"""The encoder-decoder: what may look where, its cache, its loss, and decoding held to loops by hand."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from bigtrain.config import Seq2SeqConfig
from bigtrain.models import Seq2Seq, build, count_parameters, flops_per_token
from bigtrain.models.generation import translate
from bigtrain.models.seq2seq import sinusoids

CONFIG = Seq2SeqConfig(
    dim=32, n_layers=2, n_decoder_layers=3, n_heads=4, vocab_size=97, max_seq_len=16, dropout=0.1, init_std=0.2
)  # fmt: skip
GATED = dataclasses.replace(CONFIG, norm="rmsnorm", activation="swiglu", bias=False, ffn_dim=48)
BOTH = pytest.mark.parametrize("config", [CONFIG, GATED], ids=["original", "gated"])
SPECIAL = {"pad": 0, "cls": 1, "sep": 2}


def make(config: Seq2SeqConfig, seed: int = 0) -> Seq2Seq:
    torch.manual_seed(seed)
    return build(config)


def some_tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_a_target_token_sees_the_whole_source_and_no_later_target() -> None:
    model = make(CONFIG).eval()
    source, target = some_tokens(1, 9), some_tokens(1, 6, seed=2)
    with torch.no_grad():
        plain = model(source, None, target)
        later = target.clone()
        later[0, 3] = 5
        changed = model(source, None, later)
        torch.testing.assert_close(changed[0, :3], plain[0, :3])
        assert not torch.allclose(changed[0, 3], plain[0, 3])
        assert not torch.allclose(changed[0, 4], plain[0, 4])
        other = source.clone()
        other[0, -1] = 5
        assert not torch.allclose(model(other, None, target)[0, 0], plain[0, 0])


@BOTH
def test_padding_changes_nothing(config: Seq2SeqConfig) -> None:
    model = make(config).eval()
    source, target = some_tokens(3, 9), some_tokens(3, 7, seed=2)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    mask[2] = 0  # a source without any token
    with torch.no_grad():
        whole = model(source, mask, target)
        alone = model(source[1:2, :5], None, target[1:2, :4])
    torch.testing.assert_close(whole[1:2, :4], alone, rtol=1e-4, atol=1e-5)
    assert whole.isfinite().all()


@BOTH
def test_cached_decoding_equals_one_pass(config: Seq2SeqConfig) -> None:
    model = make(config).eval()
    source, target = some_tokens(2, 9), some_tokens(2, 7, seed=2)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    read: list[int] = []
    model.decoder_blocks[0].cross_attention.key_value.register_forward_hook(lambda *_: read.append(1))
    with torch.no_grad():
        expected = model(source, mask, target)
        memory = model(source, mask)
        cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
        read.clear()
        parts = [  # a first token, three at once, and the others one by one
            model(None, mask, target[:, begin:end], memory=memory, cache=cache)
            for begin, end in ((0, 1), (1, 4), (4, 5), (5, 6), (6, 7))
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)
    assert len(read) == 1, "the source's keys and values are computed once"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_one_of_the_logits(smoothing: float) -> None:
    model = make(CONFIG).eval()
    source, target = some_tokens(2, 9), some_tokens(2, 7, seed=2)
    targets = target.roll(-1, 1)
    targets[1, 4:] = -100

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    logits = model(source, None, target).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), reduction="sum", label_smoothing=smoothing)
    nll = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    wanted = gradients(expected)
    loss, found_nll = model(source, None, target, targets, smoothing)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found_nll, nll.detach())
    found = gradients(loss)
    assert found.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)


@BOTH
def test_meta_device_then_init_weights_gives_the_same_weights(config: Seq2SeqConfig) -> None:
    with torch.device("meta"):
        late = build(config)
    late.to_empty(device="cpu")
    torch.manual_seed(0)
    late.init_weights()
    assert late.head.weight is late.embedding.weight
    for (name, expected), found in zip(make(config).named_parameters(), late.parameters(), strict=True):
        if "norm" not in name:
            assert torch.equal(expected, found), name
    assert not list(late.buffers())


def test_activation_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for enabled in (False, True):
        model = make(CONFIG).train()
        model.set_activation_checkpointing(enabled)
        torch.manual_seed(2)
        loss, _ = model(some_tokens(2, 9), None, some_tokens(2, 7), some_tokens(2, 7, seed=3))
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_sinusoids_are_the_paper_s() -> None:
    table = sinusoids(torch.arange(50), 8)
    for position, i in ((0, 0), (7, 1), (49, 3)):
        angle = torch.tensor(position / 10_000 ** (2 * i / 8))
        torch.testing.assert_close(table[position, i], angle.sin())
        torch.testing.assert_close(table[position, 4 + i], angle.cos())


def test_sizes() -> None:
    d, vocabulary, length = 32, 97, 16
    encoder, decoder = 2 * (12 * d * d + 13 * d), 3 * (16 * d * d + 19 * d)
    assert count_parameters(CONFIG) == vocabulary * d + encoder + decoder + 4 * d
    pair = 6 * count_parameters(CONFIG) + 12 * (2 + 2 * 3) * d * length  # FLOPs of one source and one target token
    assert flops_per_token(CONFIG) == pytest.approx(pair / 2)


# ------------------------------------------------------------------------------------------------- decoding


def decoded(
    model: Seq2Seq, source: Tensor, mask: Tensor, steps: int, size: int = 97, **options: Any
) -> list[list[int]]:
    with torch.no_grad():
        memory = model(source, mask)
        return translate(
            model, model.n_decoder_layers, memory, mask, SPECIAL, size, steps, {"do_sample": False} | options
        )


def test_greedy_is_the_likeliest_token_each_time_padded_or_alone() -> None:
    model = make(dataclasses.replace(CONFIG, init_std=0.8)).eval()  # or it would repeat itself
    source, mask = some_tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    by_hand: list[list[int]] = []
    for row, length in zip(source, (9, 5, 9), strict=True):
        tokens = [SPECIAL["cls"]]
        with torch.no_grad():
            while len(tokens) < 13 and tokens[-1] != SPECIAL["sep"]:
                logits = model(row[None, :length], None, torch.tensor([tokens]))[0, -1, :90]  # words that exist
                tokens.append(int(logits.argmax()))
        by_hand.append([token for token in tokens[1:] if token != SPECIAL["sep"]])
    assert len(set(by_hand[0])) > 2
    assert decoded(model, source, mask, 12, size=90, num_beams=1) == by_hand
    assert decoded(model, source, mask, 12, size=90, num_beams=1, use_cache=False) == by_hand


def test_beam_search_wide_enough_finds_the_best_of_all_targets() -> None:
    config = dataclasses.replace(CONFIG, vocab_size=5, init_std=0.8)
    found, greedy, exhaustive = [], [], []
    for seed in range(8):
        model = make(config, seed).eval()
        source, mask = torch.tensor([[3, 4, 3, 3]]), torch.ones(1, 4, dtype=torch.long)
        found += decoded(model, source, mask, 3, num_beams=25, early_stopping=False)
        greedy += decoded(model, source, mask, 3, num_beams=1)
        exhaustive.append(best_of_all(model, source, 3))
    assert found == exhaustive
    assert found != greedy


def best_of_all(model: Seq2Seq, source: Tensor, steps: int) -> list[int]:
    """The target of the highest log-probability per token, the end token counted among them."""
    end, scores = SPECIAL["sep"], {}
    with torch.no_grad():
        for target in itertools.product(range(5), repeat=steps):
            whole = target[: target.index(end) + 1] if end in target else target
            logits = model(source, None, torch.tensor([[SPECIAL["cls"], *whole[:-1]]]))[0].log_softmax(-1)
            scores[whole] = float(logits[torch.arange(len(whole)), list(whole)].sum()) / len(whole)
    best = max(scores, key=lambda target: scores[target])
    return [token for token in best if token != end]
