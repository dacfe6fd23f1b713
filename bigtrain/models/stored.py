"""Tensors in safetensors files, one file or several with an index, found by name and read one at a time."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtrain import encryption
from bigtrain.errors import BigtrainError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of what weights are trained in


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
        return list(self._files)

    def weight(self, name: str, read: bool = True) -> Tensor:
        """As `tensor`. Raises BigtrainError for one in integers or 8-bit floats: numbers without their scales."""
        if (dtype := self.dtype(name)) not in FLOATS:
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
