"""The small parameters that ZeRO-3 keeps whole are put together again after each step. DeepSpeed sends a collective for
each of them, hundreds in a small model, each of which waits for its answer; here many go in one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 16 * 2**20  # of whole parameters in a collective


def gather_together(optimizer: Any) -> None:
    """Of DeepSpeed's ZeRO-3 optimizer, which asks the first of its persistent parameters for all of them.

    Parameters whose parts are anything but plain tensors (quantized, offloaded, held twice for hpZ) go DeepSpeed's way.
    """
    if not optimizer.persistent_parameters or dist.get_world_size() == 1:
        return
    first = optimizer.persistent_parameters[0]
    theirs = first.all_gather

    def all_gather(param_list: list[Any] | None = None, async_op: bool = False, hierarchy: int = 0) -> Any:
        if param_list is not None and not async_op:
            for bucket in _buckets([parameter for parameter in param_list if _plain(parameter)]):
                _gather(bucket)
        return theirs(param_list, async_op, hierarchy)  # what is whole already, it leaves alone

    first.all_gather = all_gather


def _plain(parameter: Any) -> bool:
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus

    part = parameter.ds_tensor
    return bool(
        parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE
        and part.status == PartitionedParamStatus.AVAILABLE
        and part.final_location is None
        and part.device.type == get_accelerator().device_name()
        and getattr(parameter, "ds_secondary_tensor", None) is None
        and not hasattr(part, "ds_quant_scale")
    )


def _buckets(parameters: list[Any]) -> Iterator[list[Any]]:
    """Neighbours of one type and one group of ranks, in order: every rank makes the same ones."""

    def kind(parameter: Any) -> tuple[torch.dtype, int]:
        return parameter.ds_tensor.dtype, id(parameter.ds_process_group)

    for _, alike in groupby(parameters, kind):
        bucket: list[Any] = []
        size = 0
        for parameter in alike:
            if bucket and size + parameter.ds_numel * parameter.element_size() > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(parameter)
            size += parameter.ds_numel * parameter.element_size()
        yield bucket


@torch.no_grad()
def _gather(parameters: list[Any]) -> None:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    group = parameters[0].ds_process_group
    parts: list[Tensor] = [parameter.ds_tensor.view(-1) for parameter in parameters]
    mine = torch.cat(parts)
    all_ranks = mine.new_empty(dist.get_world_size(group), len(mine))
    dist.all_gather_into_tensor(all_ranks.view(-1), mine, group=group)
    for parameter, columns in zip(parameters, all_ranks.split([len(part) for part in parts], dim=1), strict=True):
        parameter.data = columns.reshape(-1)[: parameter.ds_numel].view(parameter.ds_shape)
        parameter.ds_status = ZeroParamStatus.AVAILABLE
