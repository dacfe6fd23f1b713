"""Pruning of a trained model at once, in one process: what `compress/prune.py` does to a run while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.batch import Batch, LossSums
from bigtrain.compress import select
from bigtrain.compress.layers import Layer, choose
from bigtrain.compress_config import PruneConfig, n_of_m
from bigtrain.errors import ConfigError


def check(model: nn.Module, config: PruneConfig) -> list[Layer]:
    """The layers to prune, of a model that may be on the meta device. Raises ConfigError if a pattern does not fit."""
    layers, pattern = choose(model, config.include, config.exclude, "RECIPE"), n_of_m(config.pattern)
    for layer in layers:
        inputs = layer.shape[0] if layer.transposed else layer.shape[1]
        if pattern is not None and inputs % pattern[1]:
            problem = f"{layer.module} has {inputs} inputs, not divisible by {pattern[1]}"
            raise ConfigError("RECIPE", f"nm={config.pattern}", problem)
    return layers


@torch.no_grad()
def prune(
    model: nn.Module,
    config: PruneConfig,
    batches: Iterable[Batch] = (),
    loss: Callable[[nn.Module, Batch], LossSums] | None = None,
) -> None:
    """Set the least important weights of the chosen layers to zero; wanda runs `loss` over calibration batches.

    Raises ConfigError as `check` does, and where wanda is given no data.
    """
    layers, pattern = check(model, config), n_of_m(config.pattern)
    norms = _input_norms(model, layers, list(batches), loss) if config.method == "wanda" else {}
    if pattern is None and config.method == "magnitude":
        for group in [layers] if config.scope == "global" else [[layer] for layer in layers]:
            _smallest([_weight(model, layer) for layer in group], config.sparsity)
        return
    for layer in layers:
        weight = _weight(model, layer)
        if layer.transposed:
            weight = weight.t()
        score = weight.abs() * norms.get(layer.module, 1.0)
        groups = score.reshape(-1, pattern[1]) if pattern else score
        count = pattern[1] - pattern[0] if pattern else round(config.sparsity * score.size(1))
        gone = groups.argsort(dim=1, stable=True)[:, :count]
        weight.mul_(torch.ones_like(groups).scatter_(1, gone, 0).view_as(weight))


def _weight(model: nn.Module, layer: Layer) -> Tensor:
    weight: Tensor = model.get_parameter(layer.weight).data
    return weight


def _smallest(weights: list[Tensor], sparsity: float) -> None:
    """Exactly that many, of all of them together."""
    pieces, end = [], 0
    for weight in weights:
        pieces.append(select.Piece(partial(_bits, weight), end))
        end += weight.numel()
    cut = select.cut(pieces, round(sparsity * end), 31, end, lambda counts: counts)
    for piece, weight in zip(pieces, weights, strict=True):
        weight.masked_fill_(cut.chosen(piece.keys(), piece.first).view_as(weight), 0)


def _bits(weight: Tensor) -> Tensor:
    """Magnitudes as whole numbers in the same order."""
    return weight.float().abs().reshape(-1).view(torch.int32)


def _input_norms(
    model: nn.Module, layers: list[Layer], batches: list[Batch], loss: Callable[[nn.Module, Batch], LossSums] | None
) -> dict[str, Tensor]:
    """{layer's name: (columns,) norm of each of its inputs}."""
    if not batches or loss is None:
        raise ConfigError("RECIPE", "wanda", "is measured on data, and there are none", "take magnitude")
    squares: dict[str, Any] = {}

    def hear(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares[name] = squares.get(name, 0.0) + inputs[0].float().flatten(0, -2).square().sum(0)

    handles = [
        model.get_submodule(layer.module).register_forward_pre_hook(partial(hear, layer.module)) for layer in layers
    ]
    model.eval()
    for batch in batches:
        loss(model, batch)
    for handle in handles:
        handle.remove()
    return {name: found.sqrt() for name, found in squares.items()}
