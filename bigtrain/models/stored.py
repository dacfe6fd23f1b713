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

    def tensor(self, name: str, read: bool = True) -> Tensor:
        """The tensor on the CPU; without `read` one of its shape on the meta device, for which no bytes are read."""
        from safetensors import SafetensorError

        file = self._files[name]
        try:
            if read:
                tensor: Tensor = self._open(file).get_tensor(name)
                return tensor
            return torch.empty(self._open(file).get_slice(name).get_shape(), device="meta")
        except (SafetensorError, OSError) as error:
            raise BigtrainError(f"{file}: cannot be read: {error}") from None

    def _open(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if self._opened is None or self._opened[0] != file:
            self._opened = None  # unmapped before the next is mapped
            try:
                self._opened = file, safe_open(file, framework="pt")  # maps the file, reads its header
            except (SafetensorError, OSError) as error:
                raise BigtrainError(f"{file}: cannot be read: {error}") from None
        return self._opened[1]
