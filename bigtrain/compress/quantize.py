"""Quantization of linear layers: while training (QAT), and of a trained model (PTQ). The arithmetic is torchao's.

Integers are symmetric around 0, with a scale for each row or for each group of a row's weights: a weight that is zero,
pruned for instance, stays exactly zero. Scales have bfloat16's bits: whatever type a model is stored or run in, its
quantized weights are the same numbers.

Training sees the quantized weights and, with `activations`, inputs quantized token by token; gradients pass as if
nothing was rounded (the straight-through estimator: Jacob et al., arXiv 1712.05877). What is kept for the backward pass
is the layer's own weight, which ZeRO-3 may take away meanwhile, and not a rounded copy of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from bigtrain import encryption
from bigtrain.checkpoint.integrity import read_manifest
from bigtrain.compress.layers import choose
from bigtrain.compress_config import QuantizeConfig
from bigtrain.config import Config
from bigtrain.engine.base import Engine
from bigtrain.engine.host import HostGroup
from bigtrain.errors import NO_VALUE, BigtrainError, ConfigError
from bigtrain.models.stored import Quantized, StoredTensors
from bigtrain.transform import Transform, path_in

FIELD = "compress.quantize"
EPS = torch.finfo(torch.float32).eps  # the smallest scale, as torchao's Int8Tensor has it


class Scheme(NamedTuple):
    """How a layer is quantized."""

    bits: int  # 8, 4 or 2, of a weight
    group_size: int | None  # weights of a row that share a scale; None: all of them
    activations: bool  # int8 inputs too, a scale for each token, found anew each time

    @property
    def bounds(self) -> tuple[int, int]:
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1


# What can be done to a trained model without training it; the names that commands take.
PTQ = {
    "int8_dynamic": Scheme(8, None, activations=True),
    "int8": Scheme(8, None, activations=False),
    "int4": Scheme(4, 32, activations=False),
}


def scheme_of(config: QuantizeConfig) -> Scheme:
    return Scheme(config.bits, config.group_size, config.activations)


_torchao: Any = None


def torchao() -> Any:
    """torchao.quantization, without what it says about kernels for other machines. Raises ConfigError."""
    global _torchao
    if _torchao is None:
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            import torchao.quantization
        except ImportError:
            raise ConfigError("compress", NO_VALUE, "needs torchao", "pip install 'bigtrain[quantization]'") from None
        finally:
            logging.disable(before)
        _torchao = torchao.quantization
    return _torchao


# ----------------------------------------------------------------------------------------------- arithmetic


def scales(weight: Tensor, scheme: Scheme) -> Tensor:
    """weight (rows, columns) -> (rows, groups) float32, of bfloat16's precision: largest |w| / (2^bits - 1) * 2."""
    ao = torchao()
    found, _ = ao.choose_qparams_affine(
        weight.float(), ao.MappingType.SYMMETRIC, _block(weight, scheme), torch.int8, *scheme.bounds, eps=EPS,
        scale_dtype=torch.bfloat16, zero_point_dtype=torch.int8, keepdim=True,
    )  # fmt: skip
    result: Tensor = found.float()
    return result


def integers(weight: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """weight (rows, columns), scale (rows, groups) -> int8 of the weight's shape, within `scheme.bounds`."""
    zero = torch.zeros_like(scale, dtype=torch.int8)
    block = _block(weight, scheme)
    whole: Tensor = torchao().quantize_affine(weight.float(), block, scale, zero, torch.int8, *scheme.bounds)
    return whole


def rounded(weight: Tensor, scale: Tensor | None, scheme: Scheme) -> Tensor:
    """The weight as its integers say it, in its own type. scale: None for the one that it has now."""
    scale = scales(weight, scheme) if scale is None else scale.to(weight.device)
    zero = torch.zeros_like(scale, dtype=torch.int8)
    result: Tensor = torchao().dequantize_affine(
        integers(weight, scale, scheme), _block(weight, scheme), scale, zero, torch.int8, *scheme.bounds,
        output_dtype=weight.dtype,
    )  # fmt: skip
    return result


def token_integers(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (tokens, columns) -> int8 of its shape, and a scale for each token, (tokens, 1) float32."""
    ao, block = torchao(), (1, x.shape[-1])
    scale, zero = ao.choose_qparams_affine(
        x, ao.MappingType.SYMMETRIC, block, torch.int8, -128, 127, eps=EPS, scale_dtype=torch.float32,
        zero_point_dtype=torch.int8, keepdim=True,
    )  # fmt: skip
    return ao.quantize_affine(x, block, scale, zero, torch.int8, -128, 127), scale


def int8_linear(
    tokens: Tensor, token_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(tokens, columns) and (rows, columns), both int8 -> (tokens, rows) of `dtype`: step by step what torchao's int8
    tensor does, so that training on a CPU computes bit for bit what the converted model will."""
    y: Tensor = (torch._int_mm(tokens, weight.t()).float() * token_scale).to(dtype) * weight_scale.flatten()
    return (y if bias is None else y + bias).to(dtype)


def _block(weight: Tensor, scheme: Scheme) -> tuple[int, int]:
    return 1, scheme.group_size or weight.shape[1]


# ---------------------------------------------------------------------------------------------------- layers


class QuantizedLinear(nn.Linear):
    """A linear layer that computes with quantized weights while `enabled`. Its parameters are those it always had."""

    scheme: Scheme
    enabled: bool = False
    scale: Tensor | None = None  # (rows, groups), once it is frozen

    def forward(self, input: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        if not self.enabled:
            return super().forward(input)
        result: Tensor = _StraightThrough.apply(input, self.weight, self.bias, self.scale, self.scheme)
        return result


class _StraightThrough(torch.autograd.Function):
    """x, W, b -> x W^T + b of the quantized x and W. The backward pass rounds W again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, scheme: Scheme) -> Any:
        ctx.scale, ctx.scheme = scale, scheme
        if not scheme.activations:
            ctx.save_for_backward(x, weight)
            return F.linear(x, rounded(weight, scale, scheme), bias)
        tokens, token_scale = token_integers(x.reshape(-1, x.shape[-1]))
        x_used = (tokens * token_scale).to(x.dtype).view(x.shape)
        ctx.save_for_backward(x_used, weight)
        if x.device.type != "cpu":
            return F.linear(x_used, rounded(weight, scale, scheme), bias)
        scale = scales(weight, scheme) if scale is None else scale
        y = int8_linear(tokens, token_scale, integers(weight, scale, scheme), scale, bias, x.dtype)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = torch.matmul(dy, rounded(weight, ctx.scale, ctx.scheme).to(dy.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = (dy.flatten(0, -2).t() @ x.flatten(0, -2).to(dy.dtype)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            db = dy.flatten(0, -2).sum(0).to(weight.dtype)
        return dx, dw, db, None, None


@cache
def _quantized(cls: type[nn.Linear]) -> type[nn.Linear]:
    """`cls` with QuantizedLinear's forward in place of nn.Linear's: what a subclass does around that it goes on doing.

    The layer stays the object that it was, with its parameters under their names."""
    return QuantizedLinear if cls is nn.Linear else type(f"Quantized{cls.__name__}", (cls, QuantizedLinear), {})


def prepare(model: nn.Module, scheme: Scheme, include: list[str], exclude: list[str], field: str = FIELD) -> list[str]:
    """Make the layers that match QuantizedLinear ones, not enabled yet; the names of their weights.

    Raises ConfigError for a pattern that matches nothing, or rows that groups do not divide.
    """
    torchao()  # before a compiler looks
    chosen = [layer for layer in choose(model, include, exclude, field) if not layer.transposed]
    if not chosen:
        raise ConfigError(
            f"{field}.include", ",".join(include), "matches only transformers' Conv1D, whose weights are transposed",
            "take a model of ours: model=pretrained reads GPT-2 as one",
        )  # fmt: skip
    for layer in chosen:
        check_groups(layer.module, layer.shape[1], scheme, f"{field}.group_size", f"{field}.exclude")
    for layer in chosen:
        module: Any = model.get_submodule(layer.module)
        module.__class__ = _quantized(type(module))  # type: ignore[arg-type]
        module.scheme = scheme
    return [layer.weight for layer in chosen]


def check_groups(name: str, columns: int, scheme: Scheme, field: str, exclude: str = "") -> None:
    """Raises ConfigError unless groups divide the rows of layer `name`."""
    if scheme.group_size and columns % scheme.group_size:
        fits = max(size for size in range(1, scheme.group_size + 1) if columns % size == 0)
        leave_out = f", or leave the layer out: {exclude}=[{name},...]" if exclude else ""
        problem = f"{name} has {columns} inputs, not divisible by it"
        raise ConfigError(field, scheme.group_size, problem, f"{fits} divides them{leave_out}")


def layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers by the names of their weights."""
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@torch.no_grad()
def convert(model: nn.Module) -> nn.Module:
    """The model with its quantized layers turned into what they stand for, which computes the same.

    With int8 activations: torchao's int8 weights, multiplied as integers. Otherwise plain layers of rounded weights:
    what a file in compressed-tensors' format is unpacked to.
    """
    for layer in layers(model).values():
        if layer.scheme.activations:
            layer.weight = nn.Parameter(int8_tensor(layer.weight, layer.scale, layer.scheme), requires_grad=False)
        else:
            layer.weight.copy_(rounded(layer.weight, layer.scale, layer.scheme))
        layer.__class__ = next(  # type: ignore[assignment]
            cls for cls in type(layer).__mro__ if issubclass(cls, nn.Linear) and not issubclass(cls, QuantizedLinear)
        )
    return model


def int8_tensor(weight: Tensor, scale: Tensor | None, scheme: Scheme) -> Any:
    """torchao's tensor of int8 weights, for linear layers that quantize their input if the scheme says so."""
    ao = torchao()
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    activations = QuantizeTensorToInt8Kwargs(ao.PerRow()) if scheme.activations else None
    scale = scales(weight, scheme) if scale is None else scale.to(weight.device)
    return ao.Int8Tensor.from_hp(weight.detach(), ao.PerRow(), scale=scale, act_quant_kwargs=activations)


def quantize(model: nn.Module, scheme: Scheme, include: list[str], exclude: list[str], field: str) -> nn.Module:
    """PTQ of a trained model, in place: as `convert` leaves it. Raises ConfigError as `prepare` does."""
    prepare(model, scheme, include, exclude, field)
    return convert(model)


def quantized_weights(
    model: nn.Module, named: Iterable[tuple[str, Tensor]], config: QuantizeConfig, field: str
) -> Iterator[tuple[str, Tensor | Quantized]]:
    """The weights of `model`, `named`, for a file: those that `config` takes are integers, with the scales of now.

    model: as before `prepare`, which this does. Raises ConfigError as that does, before the first is given.
    """
    scheme = scheme_of(config)
    chosen = set(prepare(model, scheme, config.include, config.exclude, field))

    def found() -> Iterator[tuple[str, Tensor | Quantized]]:
        for name, weight in named:
            if name not in chosen:
                yield name, weight
                continue
            scale = scales(weight, scheme).to(weight.dtype)
            yield name, Quantized(integers(weight, scale.float(), scheme), scale, scheme.bits)

    return found()


# ----------------------------------------------------------------------------------------------- transform


class Quantize(Transform):
    """compress.quantize: quantization-aware training."""

    name = "quantize"  # not `stateful`: a run that was dense so far has frozen no scales, and may begin with it here

    def __init__(self, config: QuantizeConfig) -> None:
        self.config, self.scheme = config, scheme_of(config)
        self.frozen = False

    def apply(self, model: nn.Module) -> None:
        """Raises ConfigError for a pattern that matches no layer, or groups that do not divide a layer's rows."""
        prepare(model, self.scheme, self.config.include, self.config.exclude)
        self.layers = layers(model)

    def attach(self, engine: Engine, host: HostGroup) -> None:
        self.engine, self.host = engine, host

    def begin(self, step: int) -> None:
        self.update(step)

    def update(self, step: int) -> None:
        self.enable(step)
        if self.config.freeze is not None and step >= self.config.freeze and not self.frozen:
            self._freeze()

    def enable(self, step: int) -> None:
        """Compute as after `step` steps of training."""
        for layer in self.layers.values():
            layer.enabled = step >= self.config.start

    def _freeze(self) -> None:
        """Hold the scales as the weights have them now. On whole weights, which rank 0 sees one at a time."""
        mine = {
            name: scales(weight, self.scheme)
            for name, weight in self.engine.weights()
            if name in self.layers and self.host.rank == 0
        }
        self._hold(self.host.broadcast(mine))

    def _hold(self, found: Mapping[str, Tensor]) -> None:
        for name, layer in self.layers.items():
            layer.scale = found[name]
        self.frozen = True

    def metrics(self) -> dict[str, float]:
        enabled = any(layer.enabled for layer in self.layers.values())
        return {"compress/weight_bits": float(self.scheme.bits)} if enabled else {}

    def state(self) -> dict[str, Tensor]:
        """{weight of a quantized layer: its scales}, (0,) while they are not frozen."""
        return {
            name: torch.empty(0) if layer.scale is None else layer.scale.cpu().clone()
            for name, layer in self.layers.items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        if state.keys() != self.layers.keys():
            differing = min(state.keys() ^ self.layers.keys())
            raise BigtrainError(f"the checkpoint's quantized layers are others: {differing} is in one of both")
        for layer in self.layers.values():
            layer.scale = None
        self.frozen = all(scale.numel() for scale in state.values())
        if self.frozen:
            self._hold(state)

    def finalize(self, model: nn.Module) -> nn.Module:
        """With int8 activations the model of `convert`, otherwise a plain one of rounded weights."""
        return convert(model)


# --------------------------------------------------------------------------------------- of a run's checkpoint


class Trained(NamedTuple):
    """What a run's checkpoint says of its quantization."""

    scheme: Scheme
    scales: dict[str, Tensor | None]  # of each quantized layer's weight: as frozen, None where it has its own

    def scale(self, name: str, weight: Tensor) -> Tensor | None:
        """(rows, groups) of the weight of that name; None if it is not quantized."""
        if name not in self.scales:
            return None
        held = self.scales[name]
        return scales(weight, self.scheme) if held is None else held

    def only(self, names: Callable[[str], bool]) -> Trained:
        """The same of those weights alone."""
        return Trained(self.scheme, {name: scale for name, scale in self.scales.items() if names(name)})


def trained(config: Config, checkpoint: Path) -> Trained | None:
    """How the model in a run's checkpoint is quantized; None if it is not, or not yet. Raises BigtrainError."""
    settings = config.compress.quantize
    if settings is None:
        return None
    manifest = read_manifest(checkpoint)
    if manifest["step"] < settings.start:
        return None
    if manifest.get("weights_only"):  # not a run's, but integers: what `bigtrain compress` leaves
        weights = StoredTensors(checkpoint)
        return Trained(scheme_of(settings), {name: weights.scale(name).float() for name in weights.quantized})
    with encryption.readable(checkpoint) as files:
        path = path_in(files, Quantize(settings))
        if not path.is_file():
            raise BigtrainError(f"{checkpoint} holds no state of {FIELD} ({path.relative_to(files)})")
        state = load_file(path)
    return Trained(scheme_of(settings), {name: scale if scale.numel() else None for name, scale in state.items()})


def as_trained(model: nn.Module, config: Config, checkpoint: Path) -> nn.Module:
    """`model`, not loaded yet, computing as the run did that wrote `checkpoint`: with quantized weights, if so."""
    found = trained(config, checkpoint)
    if found is not None and config.compress.quantize is not None:
        transform = Quantize(config.compress.quantize)
        transform.apply(model)
        transform.load_state({name: torch.empty(0) if scale is None else scale for name, scale in found.scales.items()})
        transform.enable(config.compress.quantize.start)
    return model
