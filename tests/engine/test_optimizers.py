"""Which parameters decay, which learn slower, which not at all."""

from __future__ import annotations

import pytest
import torch

from bigtrain.config import AdamWConfig, EncoderConfig
from bigtrain.engine.optimizers import freeze, parameter_groups
from bigtrain.errors import ConfigError
from bigtrain.models import Encoder


@pytest.fixture
def encoder() -> Encoder:
    with torch.device("meta"):
        return Encoder(EncoderConfig(dim=16, n_layers=3, n_heads=2, vocab_size=50))


def rates(model: torch.nn.Module, decay: float) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, AdamWConfig(lr=1.0), decay)
    return {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}


def test_norms_and_biases_do_not_decay(encoder: Encoder) -> None:
    for group in parameter_groups(encoder, AdamWConfig(weight_decay=0.1)):
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.1 if parameter.dim() >= 2 else 0.0)


def test_lower_layers_learn_slower(encoder: Encoder) -> None:
    found = rates(encoder, 0.5)
    assert len(found) == len(list(encoder.parameters()))
    assert {rate for name, rate in found.items() if name.startswith("pooler.")} == {1.0}
    assert found["blocks.2.attention.qkv.weight"] == 0.5
    assert found["blocks.0.feed_forward.up.bias"] == 0.125
    assert found["embedding.weight"] == found["token_types.weight"] == found["embedding_norm.bias"] == 0.0625
    assert set(rates(encoder, 1.0).values()) == {1.0}


def test_frozen_parameters_are_in_no_group(encoder: Encoder) -> None:
    freeze(encoder, ["embedding*", "blocks.[01].*"])
    found = rates(encoder, 1.0)
    assert not any(name.startswith(("embedding", "blocks.0", "blocks.1")) for name in found)
    assert "blocks.2.attention.qkv.weight" in found


@pytest.mark.parametrize(("patterns", "said"), [(["layers.*"], "matches no parameter"), (["*"], "nothing to train")])
def test_what_cannot_be_frozen(encoder: Encoder, patterns: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        freeze(encoder, patterns)
