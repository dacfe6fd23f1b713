"""Which layers a transform takes: patterns of their names."""

from __future__ import annotations

import fnmatch
from typing import NamedTuple

import torch
from torch import nn

from bigtrain.engine.shards import shape_of
from bigtrain.errors import ConfigError

SHOWN = 6  # names in an error's line


class Layer(NamedTuple):
    module: str  # its name
    weight: str  # its weight's name among the model's parameters
    shape: torch.Size  # (rows, columns); of the whole parameter
    transposed: bool  # (inputs, outputs), as transformers' Conv1D has it, not (outputs, inputs)


def choose(model: nn.Module, include: list[str], exclude: list[str], field: str) -> list[Layer]:
    """The linear layers whose names match `include` and not `exclude`, in the model's order.

    A weight that several modules share counts once, under its first name; one that is an embedding's too, only if a
    pattern is that layer's very name. Norms, biases, embeddings and what is not trained are never taken.
    Raises ConfigError for a pattern of `include` that matches none.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules())
    embeddings = {id(module.weight) for module in modules.values() if isinstance(module, nn.Embedding)}
    found: dict[int, Layer] = {}
    linear: list[str] = []
    matched: set[str] = set()
    for name, module in modules.items():
        transposed = type(module).__name__ == "Conv1D"
        if not (isinstance(module, nn.Linear) or transposed):
            continue
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        tied = id(weight) in embeddings
        if not weight.requires_grad:
            continue
        linear += [] if tied else [name]
        patterns = [pattern for pattern in include if pattern == name or (not tied and fnmatch.fnmatch(name, pattern))]
        matched.update(patterns)
        if patterns and not any(fnmatch.fnmatch(name, pattern) for pattern in exclude):
            found.setdefault(id(weight), Layer(name, names[id(weight)], shape_of(weight), transposed))
    for pattern in include:
        if pattern not in matched:
            raise ConfigError(f"{field}.include", pattern, "matches no linear layer that is trained", _would(linear))
    if not found:
        raise ConfigError(f"{field}.exclude", ",".join(exclude), "leaves no layer", _would(linear))
    return list(found.values())


def _would(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"there are {', '.join(names[:SHOWN])}{more}" if names else "there is none"
