"""Optimizers, all from libraries, and which parameters decay.

The trainer sets lr = peak * multiplier before each step, so groups keep their peak in `peak_lr`.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bigtrain.config import (
    AdafactorConfig,
    AdamW8bitConfig,
    AdamWConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
)
from bigtrain.errors import ConfigError

ParameterGroups = list[dict[str, Any]]


def parameter_groups(model: nn.Module, config: OptimizerConfig, layer_lr_decay: float = 1.0) -> ParameterGroups:
    """Matrices decay; norms and biases (one-dimensional) do not. Muon gets hidden matrices, which are those of the
    layers, in groups of their own; tables (of tokens, positions, token types), poolers and heads it leaves to AdamW.

    layer_lr_decay: each layer's lr is smaller by this factor than that of the layer above (arXiv 1801.06146, 3.2).
    An encoder's and a decoder's layers go by their own stack each.
    """
    groups: dict[tuple[bool, bool, int], list[nn.Parameter]] = {}
    stacks = list(_stacks(model))
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor in place
        matrix = len(shape) >= 2
        in_layers = any(name.startswith(prefix) for prefix, _ in stacks)
        # T5 has a table of relative positions inside its first layer.
        hidden = isinstance(config, MuonConfig) and matrix and in_layers and id(parameter) not in tables
        parameter.use_muon = hidden  # type: ignore[attr-defined]  # DeepSpeed's ZeRO reads it from the parameter
        below = _below(name, stacks) if layer_lr_decay != 1 else 0
        groups.setdefault((matrix, hidden, below), []).append(parameter)
    result = []
    for (decays, hidden, below), parameters in groups.items():
        peak_lr = config.adam_lr if isinstance(config, MuonConfig) and not hidden else config.lr
        peak_lr *= layer_lr_decay**below
        group = {"params": parameters, "lr": peak_lr, "weight_decay": config.weight_decay if decays else 0.0}
        if isinstance(config, MuonConfig):
            group["use_muon"] = hidden
            group |= {"momentum": config.momentum} if hidden else _adam_arguments(config)
        result.append(group)
    return result


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Take the parameters whose names match out of training. Raises ConfigError for a pattern that matches none."""
    for pattern in patterns:
        matching = [parameter for name, parameter in model.named_parameters() if fnmatch.fnmatch(name, pattern)]
        if not matching:
            first = next(name for name, _ in model.named_parameters())
            raise ConfigError("train.freeze", pattern, "matches no parameter", f"they are named like {first}")
        for parameter in matching:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("train.freeze", ",".join(patterns), "leaves nothing to train")


_EMBEDDING = re.compile(r"(?:^|\.)(wte|wpe|shared|positions|token_types|\w*embed(?!_out)\w*)\.")


def _stacks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(prefix of its parameters' names, number of layers) of each list of layers that is in no other."""
    for name, child in module.named_children():
        if type(child) is nn.ModuleList:  # a parametrization is of a class derived from it
            yield f"{prefix}{name}.", len(child)
        else:
            yield from _stacks(child, f"{prefix}{name}.")


def _below(name: str, stacks: list[tuple[str, int]]) -> int:
    """Layers that a parameter is below the head: 0 outside the layers, one more than the deepest of embeddings."""
    for prefix, n_layers in stacks:
        if name.startswith(prefix):
            return n_layers - int(name.removeprefix(prefix).split(".")[0])
    return 1 + max((n_layers for _, n_layers in stacks), default=0) if _EMBEDDING.search(name) else 0


def _adam_arguments(config: AdamWConfig | AdamW8bitConfig | MuonConfig) -> dict[str, Any]:
    return {"betas": (config.beta1, config.beta2), "eps": config.eps}


def build(
    config: OptimizerConfig, groups: ParameterGroups, device: torch.device, offloaded: bool
) -> torch.optim.Optimizer:
    """The optimizer for `groups`; `offloaded`: its states live on the host while the model computes on a GPU.

    Raises ConfigError where the library that has it is missing.
    """
    on_host = offloaded or device.type == "cpu"
    if isinstance(config, AdamWConfig):
        if offloaded and device.type == "cuda":  # vectorised for the host; torch's would hold up the GPU
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, lr=config.lr, adamw_mode=True, **_adam_arguments(config))
        return torch.optim.AdamW(groups, lr=config.lr, fused=True, **_adam_arguments(config))
    if isinstance(config, AdamW8bitConfig):
        try:
            from torchao.optim import AdamW8bit
        except ImportError:
            raise ConfigError(
                "optimizer.kind", config.kind, "needs torchao", "pip install 'bigtrain[quantization]'"
            ) from None
        return AdamW8bit(groups, lr=config.lr, **_adam_arguments(config))
    if isinstance(config, AdafactorConfig):
        return torch.optim.Adafactor(groups, lr=config.lr, beta2_decay=config.beta2_decay)
    if isinstance(config, LionConfig):
        from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

        lion = DeepSpeedCPULion if on_host else FusedLion
        return lion(groups, lr=config.lr, betas=(config.beta1, config.beta2))
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    return MuonWithAuxAdam(groups)


def remember_peak_lr(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:  # after construction: Muon refuses keys it does not know
        group["peak_lr"] = group["lr"]


def set_lr(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * multiplier


@contextlib.contextmanager
def hyperparameters_kept(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Loading an optimizer's state brings back the hyperparameters it was saved with: the config's are to hold."""
    ours = [
        {key: value for key, value in group.items() if key not in ("params", "step")}
        for group in optimizer.param_groups
    ]
    yield
    for group, values in zip(optimizer.param_groups, ours, strict=True):
        group.update(values)
