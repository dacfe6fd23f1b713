"""Structured pruning: attention heads, feed-forward neurons, layers and hidden width are taken out, and what is left is
a smaller model of the same kind, faster wherever the larger one ran.

A cut is found on the whole model (`importances`, `choose`) and made on its weights by name (`shrink`), so that the
result is a config and tensors: a model directory like any other. Cutting is masking: the smaller model gives the
logits that the larger one gives with those parts at zero (`silence`). Two exceptions, both to be healed by training: a
layer of a post-norm encoder is more than what it adds, and LayerNorm's mean counts the columns that hidden width takes
out.

Importance, summed over what goes together: magnitude, the squares of the weights; taylor, |w * dL/dw| summed before the
absolute value (Michel et al., arXiv 1905.10650; Molchanov et al., 1906.10771); activation, the mean square of what goes
into a matrix times its columns' squares, and of a layer how far it turns the residual stream (ShortGPT, 2403.03853).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.batch import Batch, LossSums
from bigtrain.compress.distil import bare, layers
from bigtrain.config import (
    DecoderConfig,
    EncoderConfig,
    HuggingFaceConfig,
    ModelConfig,
    Seq2SeqConfig,
    head_dim,
    starts_normed,
)
from bigtrain.errors import ConfigError

Importance = Literal["magnitude", "taylor", "activation"]
IMPORTANCES = get_args(Importance)
PARTS = ("heads", "neurons", "layers", "dim")


@dataclass(frozen=True)
class Cut:
    """How much of each part is removed: below 1 a fraction, else a number (of every layer's heads or neurons)."""

    heads: float = 0
    neurons: float = 0
    layers: float = 0
    dim: float = 0


@dataclass(frozen=True)
class Importances:
    """Larger: more is lost without it."""

    heads: list[Tensor]  # of each layer, (units,): a head, or with grouped queries a key-value head and its queries
    neurons: list[Tensor]  # of each layer, (ffn_dim,)
    layers: Tensor  # (n_layers,)
    dim: Tensor  # (dim,)


@dataclass(frozen=True)
class Kept:
    """What stays, as sorted indexes."""

    layers: list[int]
    heads: list[Tensor]  # units, of each layer that stays
    neurons: list[Tensor]  # of each layer that stays
    dim: Tensor


Architecture = DecoderConfig | EncoderConfig


def supported(config: ModelConfig) -> Architecture:
    """Raises ConfigError for a model whose parts are not ours to take out."""
    if isinstance(config, HuggingFaceConfig):
        problem = "transformers' own code is not ours to cut"
        raise ConfigError("model.kind", config.kind, problem, "heads, neurons and layers of GPT-2, Llama and BERT are")
    if isinstance(config, Seq2SeqConfig):
        raise ConfigError("model.kind", config.kind, "an encoder-decoder cannot be cut yet")
    return config


def units(config: Architecture) -> int:
    """How many groups of heads can be taken out of a layer."""
    return (config.n_kv_heads if isinstance(config, DecoderConfig) else None) or config.n_heads


def ffn_dim(config: Architecture) -> int:
    return config.ffn_dim or 4 * config.dim


def gated(config: Architecture) -> bool:
    return config.activation in ("swiglu", "geglu")


# -------------------------------------------------------------------------------------------------- what matters


def importances(
    model: nn.Module,
    by: Importance,
    batches: Iterable[Batch] = (),
    loss: Callable[[nn.Module, Batch], LossSums] | None = None,
) -> Importances:
    """Of the parts of a bare model. taylor and activation run `loss` over calibration batches, in evaluation mode.

    Raises ConfigError where they are given none.
    """
    inner = backbone(model)
    seen = _Seen(inner)
    if by == "magnitude":
        weigh = {name: parameter.detach().float().square() for name, parameter in inner.named_parameters()}
        return _of_weights(inner, weigh, absolute=False)
    batches = list(batches)
    if not batches or loss is None:
        raise ConfigError("importance", by, "is measured on data, and there are none", "take magnitude")
    model.eval()
    if by == "activation":
        with torch.no_grad(), seen.watched():
            for batch in batches:
                loss(model, batch)
        return seen.importances()
    total: Importances | None = None
    for batch in batches:
        model.zero_grad(set_to_none=True)
        sums = loss(model, batch)
        sums.loss.backward()  # type: ignore[no-untyped-call]
        products = {
            name: parameter.detach().float() * parameter.grad.float()
            if parameter.grad is not None
            else torch.zeros_like(parameter, dtype=torch.float32)
            for name, parameter in inner.named_parameters()
        }
        total = _added(total, _of_weights(inner, products, absolute=True))
    model.zero_grad(set_to_none=True)
    assert total is not None
    return total


def backbone(model: Any) -> Any:
    """The decoder, or of an encoder with a head the encoder."""
    model = bare(model)
    return getattr(model, "backbone", model)


def _of_weights(model: Any, weigh: dict[str, Tensor], absolute: bool) -> Importances:
    """Sums of per-weight numbers over what goes together; `absolute`: of the sums.

    Of a Taylor product the columns of the matrix behind a part are enough, for they are all of what the part says.
    """
    config: Architecture = model.config
    size = head_dim(config)
    per_unit = config.n_heads // units(config)

    def whole(x: Tensor) -> Tensor:
        return x.abs() if absolute else x

    heads, neurons, of_layers = [], [], []
    for index in range(config.n_layers):
        block = f"blocks.{index}."
        out, down = weigh[f"{block}attention.out.weight"], weigh[f"{block}feed_forward.down.weight"]
        of_heads = out.sum(0).view(units(config), per_unit * size).sum(1)
        of_neurons = down.sum(0)
        if not absolute:
            q, k, v = weigh[f"{block}attention.qkv.weight"].sum(1).split(_qkv_rows(config))
            of_heads = of_heads + sum(part.view(units(config), -1).sum(1) for part in (q, k, v))
            up = weigh[f"{block}feed_forward.up.weight"].sum(1)
            of_neurons = of_neurons + up.view(-1, len(of_neurons)).sum(0)
        heads.append(whole(of_heads))
        neurons.append(whole(of_neurons))
        of_layers.append(whole(out.sum() + down.sum()))
    columns = torch.zeros(config.dim, device=weigh["embedding.weight"].device)
    for name, numbers in weigh.items():
        for axis, part in enumerate(axes(name)):
            if part == "dim":
                columns = columns + (numbers.sum(1 - axis) if numbers.dim() == 2 else numbers)
    return Importances(heads, neurons, torch.stack(of_layers), whole(columns))


def _added(first: Importances | None, second: Importances) -> Importances:
    if first is None:
        return second
    return Importances(
        [a + b for a, b in zip(first.heads, second.heads, strict=True)],
        [a + b for a, b in zip(first.neurons, second.neurons, strict=True)],
        first.layers + second.layers,
        first.dim + second.dim,
    )


class _Seen:
    """What goes through a model's layers."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config
        # Mean squares of the columns that go in, summed over batches.
        self.out: list[Any] = [0.0] * self.config.n_layers
        self.down: list[Any] = [0.0] * self.config.n_layers
        self.turns = torch.zeros(self.config.n_layers)
        self.columns: Any = 0.0

    def watched(self) -> _Hooks:
        handles = []
        for index, block in enumerate(layers(self.model)):
            block_any: Any = block
            handles.append(block_any.attention.out.register_forward_pre_hook(self._into(self.out, index)))
            handles.append(block_any.feed_forward.down.register_forward_pre_hook(self._into(self.down, index)))
            handles.append(block_any.register_forward_hook(self._through(index)))
        return _Hooks(handles)

    def _into(self, sums: list[Any], index: int) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            sums[index] = sums[index] + args[0].float().square().flatten(0, -2).mean(0)

        return hook

    def _through(self, index: int) -> Any:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            turned = 1 - F.cosine_similarity(args[0].float(), output.float(), dim=-1)
            self.turns[index] += float(turned.mean())
            self.columns = self.columns + output.float().square().flatten(0, -2).mean(0)

        return hook

    def importances(self) -> Importances:
        heads, neurons = [], []
        for block_any, out, down in zip(layers(self.model), self.out, self.down, strict=True):
            block: Any = block_any
            into = out * block.attention.out.weight.detach().float().square().sum(0)
            heads.append(into.view(units(self.config), -1).sum(1))
            neurons.append(down * block.feed_forward.down.weight.detach().float().square().sum(0))
        return Importances(heads, neurons, self.turns, self.columns)


class _Hooks:
    def __init__(self, handles: list[Any]) -> None:
        self.handles = handles

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


# ---------------------------------------------------------------------------------------------------- what stays


def choose(config: ModelConfig, cut: Cut, found: Importances) -> Kept:
    """What stays after the least important parts have gone: as much of every layer, whichever parts of it.

    Raises ConfigError for more than there is, or for a fraction of which nothing comes.
    """
    config = supported(config)
    n_units, n_neurons, n_layers, dim = (
        there - amount(part, getattr(cut, part), there) for part, there in parts(config).items()
    )
    of_layers = found.layers.clone()
    if isinstance(config, EncoderConfig) and starts_normed(config):
        of_layers[0] = torch.inf  # it has no norm of its own, which another in its place would have
    kept = best(of_layers, n_layers).tolist()
    return Kept(
        layers=kept,
        heads=[best(found.heads[layer], n_units) for layer in kept],
        neurons=[best(found.neurons[layer], n_neurons) for layer in kept],
        dim=best(found.dim, dim),
    )


def parts(config: ModelConfig) -> dict[str, int]:
    """Count each of PARTS (heads and neurons: in a layer). Raises ConfigError as `supported` does."""
    config = supported(config)
    return {"heads": units(config), "neurons": ffn_dim(config), "layers": config.n_layers, "dim": config.dim}


def smaller(config: ModelConfig, cut: Cut) -> ModelConfig:
    """What a cut makes of a config, whatever is cut: for what its shapes allow. Raises ConfigError as `choose` does."""
    there = parts(config)
    each = [torch.zeros(there["heads"])] * there["layers"], [torch.zeros(there["neurons"])] * there["layers"]
    nothing = Importances(*each, torch.zeros(there["layers"]), torch.zeros(there["dim"]))
    return shrink(config, choose(config, cut, nothing), ())[0]


def amount(part: str, asked: float, there: int) -> int:
    """How many of `there` are asked to be removed."""
    count = int(asked * there + 1e-9) if asked < 1 else int(asked)
    shown = f"{asked:g}"
    if asked < 0 or not math.isfinite(asked) or (asked >= 1 and asked != int(asked)):
        raise ConfigError(part, shown, "a fraction below 1, or a whole number is wanted")
    if asked and not count:
        raise ConfigError(part, shown, f"of {there} that is none", f"take at least {1 / there:.3g}, or a number")
    if count >= there:
        raise ConfigError(part, shown, f"there are {there}, and one must stay", f"take at most {there - 1}")
    return count


def best(scores: Tensor, count: int) -> Tensor:
    """The `count` largest, in their order; of equals the first ones."""
    order = scores.cpu().argsort(descending=True, stable=True)[:count]
    return order.sort().values


# ------------------------------------------------------------------------------------------------------ the cut


def axes(name: str) -> tuple[str, ...]:
    """What the axes of one of our parameters are made of: heads, neurons, dim, or something that stays as it is.

    name: in a decoder or an encoder with heads, with or without "backbone.".
    """
    name = name.removeprefix("backbone.")
    kind = "weight" if name.endswith(".weight") else "bias"
    within = name.split(".", 2)[2] if name.startswith("blocks.") else name
    module = within.rpartition(".")[0]
    if module in _MATRICES:
        return _MATRICES[module] if kind == "weight" else _MATRICES[module][:1]
    if module.endswith("norm"):
        return ("dim",)
    return ("", "dim") if kind == "weight" else ("",)  # embeddings, and heads that end in logits


_MATRICES = {
    "attention.qkv": ("qkv", "dim"),
    "attention.out": ("dim", "heads"),
    "feed_forward.up": ("up", "dim"),
    "feed_forward.down": ("dim", "neurons"),
    "pooler": ("dim", "dim"),
    "head.dense": ("dim", "dim"),
}


def _qkv_rows(config: Architecture) -> tuple[int, int, int]:
    rows = units(config) * head_dim(config)
    return config.n_heads * head_dim(config), rows, rows


def _indexes(config: Architecture, kept: Kept, part: str, place: int | None) -> Tensor | None:
    """Which indexes of an axis stay; None: all. place: which of the kept layers it is in."""
    if part == "dim":
        return kept.dim
    if place is None or part == "":
        return None
    heads, neurons = kept.heads[place], kept.neurons[place]
    size, per_unit = head_dim(config), config.n_heads // units(config)
    if part == "neurons":
        return neurons
    if part == "up":
        return torch.cat((neurons, neurons + ffn_dim(config))) if gated(config) else neurons
    q = _spread(heads, per_unit * size)
    if part == "heads":
        return q
    queries, keys, _ = _qkv_rows(config)
    k = _spread(heads, size)
    return torch.cat((q, k + queries, k + queries + keys))


def _spread(indexes: Tensor, size: int) -> Tensor:
    """Every index of a block of `size`."""
    return (indexes[:, None] * size + torch.arange(size)).flatten()


def shrink(
    config: ModelConfig, kept: Kept, weights: Iterable[tuple[str, Tensor]]
) -> tuple[Architecture, Iterator[tuple[str, Tensor]]]:
    """(config, (name, tensor) one at a time) of the smaller model."""
    config = supported(config)
    per_unit = config.n_heads // units(config)
    n_units, dim = len(kept.heads[0]), len(kept.dim)
    smaller: Architecture = replace(
        config, dim=dim, n_layers=len(kept.layers), n_heads=n_units * per_unit, ffn_dim=len(kept.neurons[0])
    )
    if isinstance(smaller, DecoderConfig) and smaller.n_kv_heads is not None:
        smaller.n_kv_heads = n_units
    size = head_dim(config)
    smaller.head_dim = None if smaller.n_heads * size == dim else size
    narrower = config.norm == "rmsnorm" and dim != config.dim
    if narrower:
        smaller.norm_eps = config.norm_eps * config.dim / dim

    def cut() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            prefix = "backbone." if name.startswith("backbone.") else ""
            place, renamed = None, name
            if name.startswith(f"{prefix}blocks."):
                layer, _, rest = name.removeprefix(f"{prefix}blocks.").partition(".")
                if int(layer) not in kept.layers:
                    continue
                place = kept.layers.index(int(layer))
                renamed = f"{prefix}blocks.{place}.{rest}"
            for axis, part in enumerate(axes(name)):
                indexes = _indexes(config, kept, part, place)
                if indexes is not None:
                    tensor = tensor.index_select(axis, indexes.to(tensor.device))
            if narrower and axes(name) == ("dim",) and name.endswith("norm.weight"):
                tensor = tensor * (config.dim / dim) ** 0.5  # the mean square is one of fewer columns now
            yield renamed, tensor.contiguous()

    return smaller, cut()


@torch.no_grad()
def silence(model: nn.Module, kept: Kept) -> None:
    """Set to zero, in the whole model, what `shrink` takes out: what its parts say no longer counts."""
    inner = backbone(model)
    config: Architecture = inner.config
    for layer in range(config.n_layers):
        block = inner.blocks[layer]
        if layer not in kept.layers:
            matrices: list[tuple[Any, Tensor | None]] = [(block.attention.out, None), (block.feed_forward.down, None)]
        else:
            place = kept.layers.index(layer)
            matrices = [
                (block.attention.out, _indexes(config, kept, "heads", place)),
                (block.feed_forward.down, kept.neurons[place]),
            ]
        for matrix, stays in matrices:
            gone = torch.ones(matrix.weight.size(1), dtype=torch.bool)
            if stays is not None:
                gone[stays] = False
            elif matrix.bias is not None:
                matrix.bias.zero_()
            matrix.weight[:, gone.to(matrix.weight.device)] = 0
    for name, parameter in model.named_parameters():
        for axis, part in enumerate(axes(name)):
            gone = torch.ones(parameter.size(axis), dtype=torch.bool)
            if part == "dim":
                gone[kept.dim] = False
                parameter.index_fill_(axis, gone.nonzero().flatten().to(parameter.device), 0)
