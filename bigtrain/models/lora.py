"""LoRA (arXiv 2106.09685): a frozen linear layer learns a change of low rank, scale * B A.

Optimizer states and gradients are then those of A and B alone, and of what is trained in full besides. Checkpoints hold
their own weights with the change added, so that whatever reads them (evaluate, generate, export, `init_from`) needs not
know.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.config import LoRAConfig
from bigtrain.errors import ConfigError
from bigtrain.models.layers import Linear

A, B = "lora_a", "lora_b"


class LoRALinear(nn.Module):
    """y = x W^T + b + scale * (x A^T) B^T, of an existing layer's W and b. B begins at 0: at first nothing changes."""

    def __init__(self, layer: nn.Module, config: LoRAConfig) -> None:
        super().__init__()
        self.weight: nn.Parameter = layer.weight  # type: ignore[assignment]
        self.bias: nn.Parameter | None = layer.bias  # type: ignore[assignment]
        self.transposed = _is_conv1d(layer)
        names = ("nx", "nf") if self.transposed else ("in_features", "out_features")
        inputs, outputs = (int(getattr(layer, name)) for name in names)
        self.scale = config.alpha / config.rank
        self.dropout = nn.Dropout(config.dropout)
        self.lora_a = nn.Parameter(self.weight.new_empty(config.rank, inputs))
        self.lora_b = nn.Parameter(self.weight.new_empty(outputs, config.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        change = F.linear(F.linear(self.dropout(x), self.lora_a), self.lora_b)
        if self.transposed:  # not the transpose through F.linear: a view would keep ZeRO-3's gathered weight alive
            assert self.bias is not None
            own = torch.addmm(self.bias, x.flatten(0, -2), self.weight).view_as(change)
        else:
            own = F.linear(x, self.weight, self.bias)
        return torch.add(own, change, alpha=self.scale)


def add_lora(model: nn.Module, config: LoRAConfig, new: Collection[str] = ()) -> None:
    """Give the linear layers that `config.targets` names a change of low rank, and freeze everything else but what
    `config.train` names and the parameters `new`, which have not been learned yet (a task's head). Raises ConfigError
    if there is no such layer."""
    layers = {name: layer for name, layer in model.named_modules() if type(layer) in _PLAIN or _is_conv1d(layer)}
    chosen = [name for name in layers if any(fnmatch.fnmatch(name, pattern) for pattern in config.targets)]
    if not chosen:
        first = next(iter(layers), "none")
        raise ConfigError("train.lora.targets", config.targets, "match no linear layer", f"they are named like {first}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in new or any(fnmatch.fnmatch(name, pattern) for pattern in config.train))
    for name in chosen:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoRALinear(layers[name], config))


_PLAIN = (Linear, nn.Linear)  # a class of its own that derives from these may compute something else


def _is_conv1d(layer: nn.Module) -> bool:
    """GPT-2's linear layers in transformers, whose weights are (inputs, outputs); told without importing that."""
    return type(layer).__name__ == "Conv1D"


def merged(weights: Iterable[tuple[str, Tensor]], model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model with every change added to its layer's weight, one layer at a time.

    A weight that is empty (of a rank that does not write) is handed on as it is.
    """
    changed = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    held: dict[str, Tensor] = {}  # of the layer that is going by: its weight, and A
    for name, tensor in weights:
        layer, _, last = name.rpartition(".")
        if layer not in changed or last == "bias":
            yield name, tensor
        elif last != B:
            held[last] = tensor
        else:
            weight, a = held.pop("weight"), held.pop(A)
            if weight.numel():
                left, right = (a.t(), tensor.t()) if changed[layer].transposed else (tensor, a)
                whole = torch.addmm(weight.float(), left.float(), right.float(), alpha=changed[layer].scale)
                weight = whole.to(weight.dtype)
            yield f"{layer}.weight", weight
