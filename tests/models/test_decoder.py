"""The decoder against transformers' GPT-2 and Llama, and against itself: masks, cache, loss, checkpointing."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigtrain.config import DecoderConfig
from bigtrain.models import Decoder, build, count_parameters, flops_per_token

GPT = DecoderConfig(dim=64, n_layers=2, n_heads=4, vocab_size=97, max_seq_len=32, init_std=0.1)
LLAMA = DecoderConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=96, vocab_size=97, max_seq_len=32, positions="rotary",
    norm="rmsnorm", activation="swiglu", bias=False, tie_embeddings=False, init_std=0.1,
)  # fmt: skip
BOTH = pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])


def make(config: DecoderConfig, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return build(config)


def some_tokens(config: DecoderConfig, batch: int = 2, length: int = 16) -> Tensor:
    assert config.vocab_size is not None
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def test_gpt2_is_the_one_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=97, n_positions=32, attn_pdrop=0.0)
    ).eval()
    ours, body = make(GPT).eval(), theirs.transformer
    with torch.no_grad():
        ours.embedding.weight.copy_(body.wte.weight)
        ours.positions.weight.copy_(body.wpe.weight)
        ours.norm.load_state_dict(body.ln_f.state_dict())
        for mine, other in zip(ours.blocks, body.h, strict=True):
            mine.attention_norm.load_state_dict(other.ln_1.state_dict())
            mine.feed_forward_norm.load_state_dict(other.ln_2.state_dict())
            for linear, conv1d in (
                (mine.attention.qkv, other.attn.c_attn),
                (mine.attention.out, other.attn.c_proj),
                (mine.feed_forward.up, other.mlp.c_fc),
                (mine.feed_forward.down, other.mlp.c_proj),
            ):
                linear.weight.copy_(conv1d.weight.t())
                linear.bias.copy_(conv1d.bias.normal_(0, 0.1))
        tokens = some_tokens(GPT)
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)


def test_llama_is_the_one_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            vocab_size=97,
            max_position_embeddings=32,
            rms_norm_eps=LLAMA.norm_eps,
            tie_word_embeddings=False,
        )
    ).eval()
    ours, body = make(LLAMA).eval(), theirs.model
    with torch.no_grad():
        ours.embedding.weight.copy_(body.embed_tokens.weight)
        ours.head.weight.copy_(theirs.lm_head.weight)
        for mine, other in zip(ours.blocks, body.layers, strict=True):
            attention, mlp = other.self_attn, other.mlp
            mine.attention.qkv.weight.copy_(
                torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
            )
            mine.attention.out.weight.copy_(attention.o_proj.weight)
            mine.feed_forward.up.weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
            mine.feed_forward.down.weight.copy_(mlp.down_proj.weight)
        tokens = some_tokens(LLAMA)
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)


@BOTH
def test_loss_is_the_sum_over_scored_tokens(config: DecoderConfig) -> None:
    model = make(config)
    tokens, targets = some_tokens(config), some_tokens(config).roll(-1, 1)
    targets[:, -3:] = -100
    loss, nll = model(tokens, targets)
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    assert loss.dtype == nll.dtype == torch.float32
    assert not nll.requires_grad
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(nll, expected.detach())


@BOTH
def test_smoothing_and_z_loss_raise_the_loss_but_not_the_nll(config: DecoderConfig) -> None:
    model = make(config)
    tokens, targets = some_tokens(config), some_tokens(config).roll(-1, 1)
    targets[0, :5] = -100
    scored, logits = targets != -100, model(tokens)
    smooth = F.cross_entropy(logits[scored], targets[scored], reduction="sum", label_smoothing=0.1)
    loss, nll = model(tokens, targets, label_smoothing=0.1, z_loss=0.01)
    torch.testing.assert_close(loss, smooth + 0.01 * logits[scored].logsumexp(-1).square().sum())
    torch.testing.assert_close(nll, model(tokens, targets)[1])


@BOTH
def test_the_future_is_not_seen(config: DecoderConfig) -> None:
    model, tokens = make(config).eval(), some_tokens(config)
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 97
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


@BOTH
def test_documents_do_not_see_each_other(config: DecoderConfig) -> None:
    model, tokens = make(config).eval(), some_tokens(config)
    document_ids = (torch.arange(16) >= 6).long().expand(2, 16)
    changed = tokens.clone()
    changed[:, 2] = (changed[:, 2] + 1) % 97
    torch.testing.assert_close(
        model(tokens, document_ids=document_ids)[:, 6:], model(changed, document_ids=document_ids)[:, 6:]
    )
    assert not torch.allclose(model(tokens)[:, 6:], model(changed)[:, 6:])


@BOTH
def test_cached_generation_gives_the_same_logits(config: DecoderConfig) -> None:
    cache = pytest.importorskip("transformers").DynamicCache()
    model, tokens = make(config).eval(), some_tokens(config)
    pieces = [model(piece, cache=cache) for piece in tokens.split([5, 1, 1, 6, 3], dim=1)]
    assert cache.get_seq_length() == 16
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), rtol=1e-4, atol=1e-5)


@BOTH
def test_left_padding_changes_nothing(config: DecoderConfig) -> None:
    model, tokens, padding = make(config).eval(), some_tokens(config), 4
    padded = F.pad(tokens, (padding, 0))
    attention_mask = (torch.arange(16 + padding) >= padding).long().expand(2, -1)
    positions = (attention_mask.cumsum(1) - 1).clamp_min(0)
    logits = model(padded, positions=positions, attention_mask=attention_mask)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:, padding:], model(tokens), rtol=1e-4, atol=1e-5)


@BOTH
def test_activation_checkpointing_gives_the_same_gradients(config: DecoderConfig) -> None:
    config = dataclasses.replace(config, dropout=0.1)
    model, tokens = make(config), some_tokens(config)
    gradients = []
    for enabled in (False, True):
        model.set_activation_checkpointing(enabled)
        model.zero_grad()
        torch.manual_seed(3)  # the recomputation must drop the same activations
        model(tokens, tokens)[0].backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@BOTH
def test_dropout_only_while_training(config: DecoderConfig) -> None:
    config = dataclasses.replace(config, dropout=0.2)
    model, tokens = make(config), some_tokens(config)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@BOTH
def test_initialisation(config: DecoderConfig) -> None:
    config = dataclasses.replace(config, dim=256, ffn_dim=512, vocab_size=1024, init_std=0.02)
    model = make(config)
    residual = 0.02 / math.sqrt(2 * config.n_layers)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.count_nonzero() == 0, name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            expected = residual if name.endswith(("out.weight", "down.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
    assert (model.head.weight is model.embedding.weight) == config.tie_embeddings


@BOTH
def test_meta_device_then_init_gives_the_same_weights(config: DecoderConfig) -> None:
    with torch.device("meta"):
        late = build(config)
    late.to_empty(device="cpu")
    torch.manual_seed(0)
    late.init_weights()
    torch.testing.assert_close(late.state_dict(), make(config).state_dict(), rtol=0, atol=0)
    assert (late.head.weight is late.embedding.weight) == config.tie_embeddings


@BOTH
def test_one_seed_gives_the_same_weights_at_every_precision(config: DecoderConfig) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        half = make(config)
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, full in zip(half.parameters(), make(config).parameters(), strict=True):
        assert torch.equal(mine, full.bfloat16())


def test_vocab_size_must_be_resolved() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        build(DecoderConfig())


def test_flops_follow_the_palm_formula() -> None:
    weights = count_parameters(GPT) - 32 * 64  # all but the positions; the tied table is multiplied by the head
    assert flops_per_token(GPT) == 6 * weights + 12 * 2 * 64 * 32
    assert flops_per_token(LLAMA) == 6 * (count_parameters(LLAMA) - 97 * 64) + 12 * 2 * 64 * 32
