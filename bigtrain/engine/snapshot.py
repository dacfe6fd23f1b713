"""A copy of an engine's state in host memory, so that a thread can write it while training goes on."""

from __future__ import annotations

import copy
import os
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from bigtrain import hardware

ROOM = 2  # a copy is made only if so many times its size is free


def snapshot(state: Any) -> Any | None:
    """`state` (dicts, lists and tuples of tensors and plain values) with every tensor copied to the host.

    Tensors that share a storage share it in the copy too: what torch.save makes of it has the same size. None if host
    memory is short or a tensor is not a plain one (a quantised optimizer's): then it must be written at once.
    """
    tensors: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    _walk(state, collect)
    if any(type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided for tensor in tensors):
        return None
    sizes = {_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
    if not fits(sum(sizes.values())):
        return None
    storages: dict[tuple[str, int], torch.UntypedStorage] = {}

    def copied(tensor: Tensor) -> Tensor:
        key, storage = _key(tensor), tensor.untyped_storage()
        if key not in storages:
            storages[key] = storage.cpu() if storage.device.type != "cpu" else storage.clone()
        plain = torch.empty(0, dtype=tensor.dtype)
        plain.set_(storages[key], tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload]
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(plain, tensor.requires_grad)
        return plain.requires_grad_(tensor.requires_grad)

    return _walk(state, copied)


def fits(size: int) -> bool:
    """Whether every rank of this node can hold `size` bytes more, with room to spare."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    within_limit = hardware.memory_bytes() - ranks * psutil.Process().memory_info().rss
    return ROOM * ranks * size < min(psutil.virtual_memory().available, within_limit)


def _key(tensor: Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.untyped_storage().data_ptr()


def _walk(value: Any, each: Any) -> Any:
    if isinstance(value, Tensor):
        return each(value)
    if isinstance(value, dict):
        result = copy.copy(value)  # keeps its type, and the metadata of a module's state
        for key, item in value.items():
            result[key] = _walk(item, each)
        return result
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_walk(item, each) for item in value))
    if type(value) in (list, tuple):
        return type(value)(_walk(item, each) for item in value)
    return copy.deepcopy(value)
