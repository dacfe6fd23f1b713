"""LoRA: nothing changes at first, only A and B learn, and what is saved is the plain model with the change added."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from bigtrain.config import DecoderConfig, LoRAConfig
from bigtrain.errors import ConfigError
from bigtrain.models import Decoder
from bigtrain.models.lora import add_lora, merged

CONFIG = DecoderConfig(dim=32, n_layers=2, n_heads=2, vocab_size=64, max_seq_len=16)
TOKENS = torch.arange(16).view(2, 8)


class TheirGPT2(nn.Module):
    """Transformers' own code: linear layers of another class, whose weights are (inputs, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 16}
        self.model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens).logits
        return logits


@pytest.mark.parametrize(
    ("make", "layer"),
    [(lambda: Decoder(CONFIG), "blocks.0.attention.qkv"), (TheirGPT2, "model.transformer.h.0.attn.c_attn")],
    ids=["ours", "theirs"],
)
def test_the_saved_weights_are_a_plain_model_that_computes_the_same(make: Callable[[], nn.Module], layer: str) -> None:
    torch.manual_seed(0)
    model, plain = make(), make()
    plain.load_state_dict(model.state_dict())
    before = model(TOKENS)
    add_lora(model, LoRAConfig(rank=3, alpha=6.0))
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-6, atol=1e-6)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 4  # A and B of four linear layers in both blocks
    assert all(name.endswith(("lora_a", "lora_b")) for name in trained)

    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    for _ in range(3):
        model(TOKENS).logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = dict(merged(model.named_parameters(), model))
    assert weights.keys() == dict(plain.named_parameters()).keys()
    change = weights[f"{layer}.weight"] - plain.get_parameter(f"{layer}.weight")
    assert torch.linalg.matrix_rank(change.detach(), rtol=1e-4) == 3
    plain.load_state_dict(weights, strict=False)
    assert not torch.allclose(model(TOKENS), before)
    torch.testing.assert_close(plain(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-5)


def test_what_has_not_been_learned_yet_is_trained_too() -> None:
    model = Decoder(CONFIG)
    add_lora(model, LoRAConfig(rank=2, train=["norm.*"]), new=["embedding.weight"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora" not in name}
    assert trained == {"embedding.weight", "norm.weight", "norm.bias"}


def test_a_weight_that_is_not_here_is_handed_on() -> None:
    model = Decoder(CONFIG)
    add_lora(model, LoRAConfig(rank=2))
    weights = dict(merged(((name, torch.empty(0)) for name, _ in model.named_parameters()), model))
    assert weights["blocks.0.attention.qkv.weight"].numel() == 0
    assert not any("lora" in name for name in weights)


def test_a_pattern_that_matches_nothing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"train\.lora\.targets.*match no linear layer.*like blocks\.0\."):
        add_lora(Decoder(CONFIG), LoRAConfig(rank=2, targets=["layers.*"]))
