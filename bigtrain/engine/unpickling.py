"""No file that a rank reads may run code.

torch, DeepSpeed and Accelerate keep their states as pickles, and a pickle can name any function to be called when it is
read. torch's own restricted reader (`weights_only`) builds tensors and plain data, and nothing else but what is
listed here. DeepSpeed and torch.distributed.checkpoint switch it off for their files: here it is switched on for good.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from bigtrain.errors import BigtrainError

# Classes that DeepSpeed's files name. All of them only hold data.
_DEEPSPEED = (
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)

# What the index (.metadata) of a sharded torch checkpoint is made of.
_INDEX = {
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "PurePath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath", "PurePath"},  # Python 3.13
    "torch": {"Size", "device", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
              "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
}  # fmt: skip


def restrict() -> None:
    """From here on nothing in this process unpickles more than tensors, plain data and the classes listed here.

    The index of a sharded torch checkpoint is read otherwise: see `restrict_index`.
    """
    # torch refuses to choose between this and its opposite, which somebody may have set for another program.
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # wins over weights_only=False in a library


def restrict_index() -> None:
    """Nor does torch.distributed.checkpoint, which FSDP2's checkpoints are read with; to import it takes a second."""
    from torch.distributed.checkpoint import filesystem

    readers: Any = filesystem
    readers.pickle = SimpleNamespace(load=_load_index, dump=pickle.dump, dumps=pickle.dumps)


def deepspeed_types() -> list[Any]:
    """The classes that DeepSpeed's own files name: all that may be unpickled from them beside tensors."""
    import importlib

    return [getattr(importlib.import_module(module), name) for module, name in _DEEPSPEED]


def allow_deepspeed() -> None:
    """Let torch's restricted reader take them."""
    import torch

    torch.serialization.add_safe_globals(deepspeed_types())


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _INDEX.get(module, ()):  # a name with a dot would lead on into the module's own imports
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} was not an allowed global")


def _load_index(file: IO[bytes]) -> Any:
    return _IndexUnpickler(file).load()


@contextlib.contextmanager
def refusals(directory: Path) -> Iterator[None]:
    """Turn a refused pickle in `directory` into one line that names what it asked for."""
    try:
        yield
    except Exception as error:
        if (refusal := _refusal(error)) is None:
            raise
        raise BigtrainError(
            f"{directory}: {refusal}; nothing of it was run. Delete this checkpoint and continue from another,"
            " and find out who wrote it"
        ) from error


def _refusal(error: BaseException) -> str | None:
    """What a refused pickle wanted, in a few words. A collective load of shards wraps its ranks' errors."""
    text = str(error)
    if not isinstance(error, pickle.UnpicklingError) and "UnpicklingError" not in text:
        return None
    named = re.search(r"(?:GLOBAL|call of|build|instantiate) (?:type )?([\w.]+)", text)
    return f"a file asks for {named[1]}, which no checkpoint needs" if named else "a file is no checkpoint of tensors"
