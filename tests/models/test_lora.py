"""LoRA: nothing changes at first, only A and B learn, and what is saved is the plain model with the change added."""

from __future__ import annotations

import pytest
import torch

from bigtrain.config import DecoderConfig, LoRAConfig
from bigtrain.errors import ConfigError
from bigtrain.models import Decoder
from bigtrain.models.lora import add_lora, merged

CONFIG = DecoderConfig(dim=32, n_layers=2, n_heads=2, vocab_size=64, max_seq_len=16)
TOKENS = torch.arange(16).view(2, 8)


def test_the_saved_weights_are_a_plain_model_that_computes_the_same() -> None:
    torch.manual_seed(0)
    model, plain = Decoder(CONFIG), Decoder(CONFIG)
    plain.load_state_dict(model.state_dict())
    before = model(TOKENS)
    add_lora(model, LoRAConfig(rank=3, alpha=6.0))
    assert torch.equal(model(TOKENS), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 4  # A and B of qkv, out, up and down in both blocks
    assert all(name.endswith(("lora_a", "lora_b")) for name in trained)

    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    for _ in range(3):
        model(TOKENS).logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = dict(merged(model.named_parameters(), model))
    assert weights.keys() == dict(plain.named_parameters()).keys()
    change = weights["blocks.0.attention.qkv.weight"] - plain.blocks[0].attention.qkv.weight
    assert torch.linalg.matrix_rank(change.detach(), rtol=1e-4) == 3
    plain.load_state_dict(weights, strict=False)
    assert not torch.allclose(model(TOKENS), before)
    torch.testing.assert_close(plain(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_not_here_is_handed_on() -> None:
    model = Decoder(CONFIG)
    add_lora(model, LoRAConfig(rank=2))
    weights = dict(merged(((name, torch.empty(0)) for name, _ in model.named_parameters()), model))
    assert weights["blocks.0.attention.qkv.weight"].numel() == 0
    assert not any("lora" in name for name in weights)


def test_a_pattern_that_matches_nothing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"train\.lora\.targets.*match no linear layer.*like blocks\.0\."):
        add_lora(Decoder(CONFIG), LoRAConfig(rank=2, targets=["layers.*"]))
