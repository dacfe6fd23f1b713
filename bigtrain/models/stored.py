"""Tensors in safetensors files, one file or several with an index, found by name and read one at a time.

A quantized weight NAME lies there as integers, beside NAME.scale (rows, groups), and is read as what it stands for. int8
lies as it is, (rows, columns); of int4 two are in a uint8, (rows, columns / 2), the first in its lower half.
"""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigtrain import encryption
from bigtrain.errors import BigtrainError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of what weights are trained in
SCALE = ".scale"


class Quantized(NamedTuple):
    """A weight that is to be stored as integers."""

    integers: Tensor  # (rows, columns) int8
    scale: Tensor  # (rows, groups), of the type that the weight is read in again
    bits: int  # 8 or 4, which the integers fit into


def stored(named: Iterable[tuple[str, Tensor | Quantized]]) -> Iterator[tuple[str, Tensor]]:
    """What is written of them. Rows of int4 have an even length."""
    for name, tensor in named:
        if not isinstance(tensor, Quantized):
            yield name, tensor
            continue
        yield name, tensor.integers if tensor.bits == 8 else _packed(tensor.integers)
        yield name + SCALE, tensor.scale


def _packed(integers: Tensor) -> Tensor:
    halves = integers.view(torch.uint8) & 15
    return halves[:, ::2] | halves[:, 1::2] << 4


def _unpacked(packed: Tensor) -> Tensor:
    """As int8: a number of four bits is negative from 8 on."""
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).to(torch.int8)
    return torch.where(halves > 7, halves - 16, halves)


class StoredTensors:
    """The tensors of a directory by name; none is read before it is asked for.

    One file is open at a time: a mapped file's pages that were read count as the process's memory, and with every file
    of a model mapped they would be as much again as the model.

    Raises BigtrainError where there are none or a file is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if encryption.is_encrypted(directory):  # read from a private copy, which goes when this object does
            directory = encryption.private_directory(sum(file.stat().st_size for file in directory.glob("*.enc")))
            self._remove_copy = weakref.finalize(self, shutil.rmtree, directory, True)
            names = [path.name.removesuffix(".enc") for path in self.directory.glob("*.safetensors*")]
            encryption.decrypt_into(self.directory, directory, names)
        self._opened: tuple[Path, Any] | None = None
        self._files: dict[str, Path] = {}
        if (directory / SINGLE).is_file():
            self._files = dict.fromkeys(self._open(directory / SINGLE).keys(), directory / SINGLE)
        elif (directory / INDEX).is_file():
            try:
                index = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
                self._files = {name: directory / file for name, file in index.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise BigtrainError(f"{directory / INDEX}: cannot be read: {error!r}") from None
        else:
            raise BigtrainError(f"{directory}: holds no weights ({SINGLE} or {INDEX})")

    @property
    def names(self) -> list[str]:
        """In the order of the files."""
        scales = {name + SCALE for name in self.quantized}
        return [name for name in self._files if name not in scales]

    @cached_property
    def quantized(self) -> set[str]:
        """The names of those that lie there as integers."""
        return {name for name in self._files if name + SCALE in self._files}

    def scale(self, name: str) -> Tensor:
        """(rows, groups) of a quantized weight."""
        return self._tensor(name + SCALE, read=True)

    def weight(self, name: str, read: bool = True) -> Tensor:
        """As `tensor`. Raises BigtrainError for integers or 8-bit floats whose scales are not ours: mere numbers."""
        if name not in self.quantized and (dtype := self.dtype(name)) not in FLOATS:
            problem = f"{name} is in {dtype}: quantized weights cannot be trained"
            raise BigtrainError(f"{self._files[name]}: {problem}; take the original ones ({', '.join(FLOATS)})")
        return self.tensor(name, read)

    def dtype(self, name: str) -> str:
        """As safetensors calls it: F32, BF16, I8, ..."""
        return str(self._slice(name).get_dtype())

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers in the same shape."""
        first, second = self.tensor(one), self.tensor(other)
        return first.shape == second.shape and bool((first == second).all())

    def tensor(self, name: str, read: bool = True) -> Tensor:
        """The tensor on the CPU; without `read` one of its shape on the meta device, for which no bytes are read."""
        tensor = self._tensor(name, read)
        if name not in self.quantized:
            return tensor
        packed = self.dtype(name) == "U8"
        if not read:
            return torch.empty(tensor.shape[0], tensor.shape[1] * (2 if packed else 1), device="meta")
        scale, integers = self.scale(name), _unpacked(tensor) if packed else tensor
        groups = integers.unflatten(1, (scale.shape[1], -1)) * scale.float().unsqueeze(-1)
        return groups.flatten(1).to(scale.dtype)

    def _tensor(self, name: str, read: bool) -> Tensor:
        from safetensors import SafetensorError

        if not read:
            return torch.empty(self._slice(name).get_shape(), device="meta")
        file = self._files[name]
        try:
            tensor: Tensor = self._open(file).get_tensor(name)
            return tensor
        except (SafetensorError, OSError) as error:
            raise BigtrainError(f"{file}: cannot be read: {error}") from None

    def _slice(self, name: str) -> Any:
        from safetensors import SafetensorError

        file = self._files[name]
        try:
            return self._open(file).get_slice(name)
        except (SafetensorError, OSError) as error:
            raise BigtrainError(f"{file}: cannot be read: {error}") from None

    def _open(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if self._opened is None or self._opened[0] != file:
            self._opened = None  # unmapped before the next is mapped
            if not file.is_file():
                raise BigtrainError(f"{file}: is not there, though {INDEX} names it; fetch it again")
            try:
                self._opened = file, safe_open(file, framework="pt")  # maps the file, reads its header
            except (SafetensorError, OSError) as error:
                raise BigtrainError(f"{file}: cannot be read: {error}") from None
        return self._opened[1]
