"""LoRA (arXiv 2106.09685): a frozen linear layer learns a change of low rank, scale * B A.

Optimizer states and gradients are then those of A and B alone. Checkpoints hold their own weights with the change
added, so that whatever reads them (evaluate, generate, export, `init_from`) needs not know.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.config import LoRAConfig
from bigtrain.errors import ConfigError
from bigtrain.models.layers import Linear

A, B = "lora_a", "lora_b"


class LoRALinear(nn.Module):
    """y = x W^T + b + scale * (x A^T) B^T, of an existing layer's W and b. B begins at 0: at first nothing changes."""

    def __init__(self, layer: nn.Linear, config: LoRAConfig) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.scale = config.alpha / config.rank
        self.dropout = nn.Dropout(config.dropout)
        self.lora_a = nn.Parameter(layer.weight.new_empty(config.rank, layer.in_features))
        self.lora_b = nn.Parameter(layer.weight.new_empty(layer.out_features, config.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        change = F.linear(F.linear(self.dropout(x), self.lora_a), self.lora_b)
        return torch.add(F.linear(x, self.weight, self.bias), change, alpha=self.scale)


def add_lora(model: nn.Module, config: LoRAConfig) -> None:
    """Give the linear layers that `config.targets` names a change of low rank, and freeze everything else but what
    `config.train` names. Raises ConfigError if there is no such layer."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
    chosen = [name for name in layers if any(fnmatch.fnmatch(name, pattern) for pattern in config.targets)]
    if not chosen:
        first = next(iter(layers), "none")
        raise ConfigError("train.lora.targets", config.targets, "match no linear layer", f"they are named like {first}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatch.fnmatch(name, pattern) for pattern in config.train))
    for name in chosen:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoRALinear(layers[name], config))


def merged(weights: Iterable[tuple[str, Tensor]], model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model with every change added to its layer's weight, one layer at a time.

    A weight that is empty (of a rank that does not write) is handed on as it is.
    """
    scales = {name: module.scale for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    held: dict[str, Tensor] = {}  # of the layer that is going by: its weight, and A
    for name, tensor in weights:
        layer, _, last = name.rpartition(".")
        if layer not in scales or last == "bias":
            yield name, tensor
        elif last != B:
            held[last] = tensor
        else:
            weight, a = held.pop("weight"), held.pop(A)
            if weight.numel():
                weight = torch.addmm(weight.float(), tensor.float(), a.float(), alpha=scales[layer]).to(weight.dtype)
            yield f"{layer}.weight", weight
