"""Which weights are kept: one byte for each weight that this rank steps, one bit on disk.

A weight that is pruned is held at zero in the fp32 masters, right after the optimizer has stepped and before DeepSpeed
copies masters to working weights. No module knows of it, and ZeRO shards nothing more.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bigtrain.compress.layers import Layer
from bigtrain.engine import shards
from bigtrain.engine.base import Engine
from bigtrain.engine.shards import Flat

BLOCK = 2**16  # elements that stay in a core's cache


class Part(NamedTuple):
    """A range of a pruned layer's weight that this rank steps."""

    layer: Layer
    start: int  # of the range in the flattened whole weight
    offset: int  # of it in the tensor that the optimizer steps
    master: Tensor  # (numel,) fp32, a view
    keep: Tensor  # (numel,) uint8: 1 where a weight is kept, 0 where it is pruned

    @property
    def stop(self) -> int:
        return self.start + self.keep.numel()


class Masks:
    """Of the layers `layers`; at first everything is kept."""

    def __init__(self, engine: Engine, layers: list[Layer]) -> None:
        self.engine, self.layers = engine, layers
        by_name = {layer.weight: layer for layer in layers}
        self.of_flat: dict[int, list[Part]] = {}
        for flat in shards.flats(engine):
            self.of_flat[id(flat.key)] = [
                Part(by_name[name], start, offset, flat.master[offset : offset + numel],
                     torch.ones(numel, dtype=torch.uint8, device=flat.master.device))
                for name, start, numel, offset in flat.pieces if name in by_name
            ]  # fmt: skip
        self.parts = [part for parts in self.of_flat.values() for part in parts]
        self.weights = sum(layer.shape.numel() for layer in layers)  # of all ranks
        self.pruned = 0  # of them
        self.emptiest = 0.0  # the part that is pruned of the layer that has lost most
        self.buffer = torch.empty(BLOCK)

    def after_step(self, flat: Flat) -> None:
        """Hold at zero what is pruned."""
        if self.pruned:
            for part in self.of_flat[id(flat.key)]:
                self._multiply(part)

    def enforce(self) -> None:
        """The masks have changed: set to zero what is pruned, in masters and working weights, on all ranks together."""
        self._count()
        for part in self.parts:
            self._multiply(part)
        shards.refresh(self.engine)

    def _count(self) -> None:
        gone = {layer.weight: 0 for layer in self.layers}
        for part in self.parts:
            gone[part.layer.weight] += part.keep.numel() - int(part.keep.count_nonzero())
        of_all = shards.total(self.engine, torch.tensor(list(gone.values()))).tolist()
        self.pruned = sum(of_all)
        self.emptiest = max(lost / layer.shape.numel() for lost, layer in zip(of_all, self.layers, strict=True))

    @torch.no_grad()
    def _multiply(self, part: Part) -> None:
        """master * keep. In blocks on a CPU, where torch multiplies tensors of two types an element at a time."""
        if part.master.device.type != "cpu":
            part.master.mul_(part.keep)
            return
        for begin in range(0, part.keep.numel(), BLOCK):
            keep = part.keep[begin : begin + BLOCK]
            part.master[begin : begin + BLOCK].mul_(self.buffer[: keep.numel()].copy_(keep))

    # ------------------------------------------------------------------------------------------ whole layers

    def whole(self, layer: Layer, values: dict[int, Tensor]) -> Tensor:
        """(rows, columns) of a layer on every rank, outputs first, from `values`: by part's index, (numel,) each."""
        flat: Tensor | None = None
        for index, part in enumerate(self.parts):
            if part.layer is layer:
                flat = torch.zeros(layer.shape.numel(), device=part.master.device) if flat is None else flat
                flat[part.start : part.stop] = values[index].float()
        flat = torch.zeros(layer.shape.numel(), device=self._device()) if flat is None else flat
        matrix = shards.total(self.engine, flat).view(layer.shape)
        return matrix.t().contiguous() if layer.transposed else matrix

    def set_whole(self, layer: Layer, keep: Tensor) -> None:
        """Take this rank's part of a mask (rows, columns), outputs first."""
        flat = (keep.t() if layer.transposed else keep).reshape(-1)
        for part in self.parts:
            if part.layer is layer:
                part.keep.copy_(flat[part.start : part.stop])

    def _device(self) -> torch.device:
        return self.parts[0].master.device if self.parts else self.engine.device

    # ---------------------------------------------------------------------------------------------- on disk

    def packed(self) -> dict[str, Tensor]:
        """{weight's name: (numel / 8,) uint8} on every rank: a bit for each in the weight's order, 1: kept."""
        found = {}
        for layer in self.layers:
            numel = layer.shape.numel()
            whole = np.zeros(-(-numel // 8), dtype=np.uint8)
            for part in self.parts:
                if part.layer is layer:
                    first = part.start // 8
                    aligned = np.concatenate((np.zeros(part.start % 8, np.uint8), part.keep.cpu().numpy()))
                    own = np.packbits(aligned)
                    whole[first : first + len(own)] |= own
            # Two ranks' bits can meet in a byte, but never two in the same bit: a sum puts them together.
            found[layer.weight] = shards.total(self.engine, torch.from_numpy(whole)).clone()
        return found

    def unpack(self, packed: dict[str, Tensor]) -> None:
        """Take this rank's part of what `packed` gave. Raises KeyError or ValueError if that is of other layers."""
        for layer in self.layers:
            if packed[layer.weight].numel() != -(-layer.shape.numel() // 8):
                raise ValueError(layer.weight)
        for part in self.parts:
            first = part.start // 8
            bits = np.unpackbits(packed[part.layer.weight].numpy()[first : -(-part.stop // 8)])
            offset = part.start - 8 * first
            part.keep.copy_(torch.from_numpy(bits[offset : offset + part.keep.numel()]))
        self._count()
