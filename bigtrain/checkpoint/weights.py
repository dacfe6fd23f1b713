"""Consolidated weights as safetensors: what generation, export and `init_from` read, whatever the engine was."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bigtrain import encryption
from bigtrain.checkpoint.find import is_checkpoint, refused
from bigtrain.checkpoint.integrity import damaged, listed, read_manifest
from bigtrain.errors import BigtrainError
from bigtrain.heap import Trimmer
from bigtrain.models.stored import INDEX, SINGLE, StoredTensors

SHARD_BYTES = 4 * 2**30


def write_weights(directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write tensors in shards of at most `shard_bytes` (a larger single tensor stands alone), in Hugging Face's layout.

    Holds one shard in memory. Returns what it wrote. Raises OSError where the disk refuses.
    """
    from safetensors.torch import save_file

    shards: list[tuple[Path, list[str]]] = []
    pending: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        path = directory / f"model-{len(shards) + 1:05d}.safetensors"
        save_file(pending, path, metadata={"format": "pt"})
        shards.append((path, list(pending)))
        pending.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and sum(t.numel() * t.element_size() for t in pending.values()) + size > shard_bytes:
            flush()
        pending[name] = tensor.contiguous()
        total += size
    flush()
    if len(shards) == 1:
        return [shards[0][0].rename(directory / SINGLE)]
    written: list[Path] = []
    index: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, 1):
        final = directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        written.append(path.rename(final))
        index |= dict.fromkeys(names, final.name)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    (directory / INDEX).write_text(text, encoding="utf-8")
    return [*written, directory / INDEX]


def iterate_weights(directory: Path, read: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one at a time from a directory that holds consolidated weights.

    Without `read` the tensors are on the meta device: their names and shapes, and no bytes.
    Raises BigtrainError where there are none or a file is damaged. A checkpoint's files are checked against their
    hashes before the first tensor is read.
    """
    if read and is_checkpoint(directory):
        check_weights(directory)
    stored = StoredTensors(directory)
    for name in stored.names:
        yield name, stored.tensor(name, read)


def check_weights(checkpoint: Path) -> None:
    """Raises BigtrainError unless the files that hold a checkpoint's consolidated weights are as they were saved."""
    try:
        files = read_manifest(checkpoint)["files"]
    except ValueError as error:
        raise refused(checkpoint, str(error)) from None
    plain = {name: name.removesuffix(encryption.SUFFIX) for name in files}
    names = [
        name for name, clear in plain.items()
        if clear == INDEX or (clear.startswith("model") and clear.endswith(".safetensors"))
    ]  # fmt: skip
    if problems := damaged(checkpoint, names):
        raise refused(checkpoint, listed(problems))


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All consolidated weights of a checkpoint: {parameter name: tensor on the CPU}."""
    return dict(iterate_weights(directory))


def load_into(model: nn.Module, directory: Path) -> None:
    """Copy a checkpoint's weights into a model with the same parameters, sharded by zero.Init or not.

    Raises BigtrainError naming the first parameter that is missing, unknown or of another shape.
    """
    parameters, trimmer = dict(model.named_parameters()), Trimmer()
    for name, tensor in iterate_weights(directory, reads(model)):
        parameter = parameters.pop(name, None)
        if parameter is None:
            raise BigtrainError(f"{directory}: parameter {name} is not in this model; is model=... the same?")
        if _shape(parameter) != tensor.shape:
            shapes = f"{tuple(tensor.shape)} there, {tuple(_shape(parameter))} in this model"
            raise BigtrainError(f"{directory}: parameter {name} is {shapes}")
        _write(parameter, tensor, trimmer)
    if parameters:
        raise BigtrainError(f"{directory}: has no parameter {next(iter(parameters))}, which this model needs")


def check_names(model: nn.Module, directory: Path) -> None:
    """Raises BigtrainError as `load_into` would, and reads no bytes."""
    shapes = {name: tensor.shape for name, tensor in iterate_weights(directory, read=False)}
    for name, parameter in model.named_parameters():
        shape = shapes.pop(name, None)
        if shape != parameter.shape:
            found = "nothing" if shape is None else str(tuple(shape))
            raise BigtrainError(f"{directory}: has {found} for parameter {name} {tuple(parameter.shape)} of this model")
    if shapes:
        raise BigtrainError(f"{directory}: parameter {next(iter(shapes))} is not in this model; is model=... the same?")


@dataclass(frozen=True)
class Report:
    """What `load_matching` did, by parameter name."""

    loaded: list[str]
    skipped: dict[str, str]  # given, but not loaded -> why
    new: list[str]  # of the model, and as they were


def load_matching(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Report:
    """Copy those of `tensors` that the model has by name and shape: for transfer, where a head is new.

    Every rank calls this with the same names and shapes in the same order; where `reads(model)` is False they may be
    on the meta device, as `iterate_weights` gives them without `read`.
    """
    parameters, trimmer = dict(model.named_parameters()), Trimmer()
    loaded: list[str] = []
    skipped: dict[str, str] = {}
    for name, tensor in tensors:
        parameter = parameters.get(name)
        if parameter is None:
            skipped[name] = "not in this model"
        elif _shape(parameter) != tensor.shape:
            skipped[name] = f"{tuple(tensor.shape)} there, {tuple(_shape(parameter))} in this model"
        else:
            _write(parameter, tensor, trimmer)
            loaded.append(name)
    done = set(loaded)
    return Report(loaded, skipped, new=[name for name in parameters if name not in done])


def reads(model: nn.Module) -> bool:
    """Whether this rank needs the tensors' bytes: rank 0 hands them out to a model that zero.Init has sharded, and
    every rank reads for itself where it holds the model whole. A model on the meta device needs none."""
    import torch.distributed as dist

    if all(parameter.is_meta for parameter in model.parameters()):
        return False  # nothing to write into: names and shapes are compared
    return not any(map(_sharded, model.parameters())) or not dist.is_initialized() or dist.get_rank() == 0


def _sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter: zero.Init leaves an empty tensor in its place."""
    shape: torch.Size = parameter.ds_shape if _sharded(parameter) else parameter.shape  # type: ignore[attr-defined]
    return shape


@torch.no_grad()
def _write(parameter: nn.Parameter, tensor: Tensor, trimmer: Trimmer) -> None:
    """Copy a tensor into a parameter. Of a sharded one, each rank keeps its part of what rank 0 writes."""
    if not _sharded(parameter):
        parameter.copy_(tensor)
        trimmer.freed(tensor)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if not tensor.is_meta:
            parameter.copy_(tensor)
        trimmer.freed(parameter)
