"""Small agreements between ranks over the host network: they never wait for a GPU."""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist


class HostGroup:
    """A gloo group over all ranks, beside the engine's own."""

    def __init__(self, timeout_seconds: int) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        timeout = datetime.timedelta(seconds=timeout_seconds)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if self.world_size > 1 else None

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks, in float64 (whole numbers stay exact up to 2^53)."""
        if self._group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._group)
        return [float(value) for value in tensor]

    def gather(self, value: Any) -> list[Any]:
        """What each rank gave, in rank order, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]
