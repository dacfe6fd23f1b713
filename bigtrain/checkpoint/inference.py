"""A checkpoint's model, ready to be asked: on one device, or where that is too small over all GPUs, memory and disk."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from bigtrain.checkpoint.weights import check_names, iterate_weights, load_into, write_weights
from bigtrain.errors import ConfigError
from bigtrain.models.stored import StoredTensors

HEADROOM = 1.2  # what a device must have free, in sizes of the model: activations and caches come on top
BLOCKS = ["Block", "DecoderBlock"]  # of our models: kept in one piece, for their residual sums stay on one device


def load(
    build: Callable[[], nn.Module], checkpoint: Path, device: str, max_memory: dict[str, str] | None = None
) -> tuple[nn.Module, torch.device]:
    """(the trained model, the device for its inputs): bfloat16 where there is a GPU, float32 on a CPU.

    device: cpu, cuda, or auto, which takes a GPU if there is one and, where the model does not fit, spreads it by
    accelerate (big-model inference). max_memory {"0": "10GiB", "cpu": "50MiB"} says what may be taken at most, by GPU
    number and for the CPU, and always goes that way; what is left lies on disk in a temporary folder.
    Raises ConfigError for a device that is not there or a size that cannot be read, BigtrainError as `load_into` does.
    """
    from accelerate import init_empty_weights

    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", device, "no CUDA device here", "take cpu or auto")
    with init_empty_weights(include_buffers=False):  # draws no weights that the checkpoint's would overwrite
        model: Any = build()
    model.to(torch.bfloat16 if where.type == "cuda" else torch.float32)
    if max_memory or (device == "auto" and not _fits(model, where)):
        _dispatch(model, checkpoint, where, max_memory)
    else:
        model.to_empty(device=where)
        model.tie_weights()
        load_into(model, checkpoint)
    return model.eval(), where


def parse_memory(pairs: tuple[str, ...]) -> dict[str, str] | None:
    """DEVICE=SIZE as typed -> {device: size}; None for none. Raises ConfigError."""
    found: dict[str, str] = {}
    for pair in pairs:
        device, equals, size = pair.partition("=")
        if not equals or not (device == "cpu" or device.isdigit()):
            raise ConfigError("--max-memory", pair, "DEVICE=SIZE is wanted", "cpu=8GiB, or 0=20GiB for the first GPU")
        found[device] = size
    return found or None


def _fits(model: nn.Module, where: torch.device) -> bool:
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return size * HEADROOM < free_memory(where)


def free_memory(where: torch.device) -> int:
    """Bytes."""
    return int(torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else psutil.virtual_memory().available)


def _alias_tied(tied: list[list[str]], folder: Path) -> None:
    """A tied weight on the disk is to be found under each of its names: the checkpoint has the first alone."""
    index = folder / "index.json"
    if not index.is_file():
        return
    stored = json.loads(index.read_text(encoding="utf-8"))
    for names in tied:
        kept = next((name for name in names if name in stored), None)
        for name in names:
            if kept is not None and name not in stored:
                stored[name] = stored[kept]
                os.link(folder / f"{kept}.dat", folder / f"{name}.dat")
    index.write_text(json.dumps(stored), encoding="utf-8")


def find_tied(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [same for same in names.values() if len(same) > 1]


@contextlib.contextmanager
def _plain(checkpoint: Path) -> Iterator[Path]:
    """Where accelerate can read its weights: integers are no weights to it."""
    if not StoredTensors(checkpoint).quantized:
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(prefix="bigtrain-") as folder:
        write_weights(Path(folder), iterate_weights(checkpoint))
        yield Path(folder)


def _dispatch(model: Any, checkpoint: Path, where: torch.device, max_memory: dict[str, str] | None) -> None:
    from accelerate import dispatch_model, infer_auto_device_map, load_checkpoint_in_model
    from accelerate.utils import convert_file_size_to_int, get_max_memory

    model.tie_weights()
    check_names(model, checkpoint)
    tied = find_tied(model)  # while they are
    limits: dict[int | str, int] = {}
    for device, size in (max_memory or {}).items():
        try:
            limits[int(device) if device.isdigit() else device] = convert_file_size_to_int(size)
        except ValueError:
            raise ConfigError("--max-memory", f"{device}={size}", "no size", "write it as 50MiB or 8GiB") from None
    missing = [device for device in limits if device != "cpu" and int(device) >= torch.cuda.device_count()]
    if missing:
        raise ConfigError("--max-memory", missing[0], f"there are {torch.cuda.device_count()} GPUs here")
    memory = get_max_memory(limits or None)
    if where.type == "cpu":
        memory = {"cpu": memory["cpu"]}
    dtype = next(model.parameters()).dtype
    blocks = getattr(model, "block_names", None) or BLOCKS
    device_map = infer_auto_device_map(model, memory, no_split_module_classes=blocks, dtype=dtype)
    folder = tempfile.TemporaryDirectory(prefix="bigtrain-")
    # The entry for no module: were the disk alone in it, accelerate would ask safetensors to read to a device "disk".
    places = device_map | {"-": "cpu"}
    with _plain(checkpoint) as readable:
        load_checkpoint_in_model(model, readable, places, offload_folder=folder.name, dtype=dtype)
    _alias_tied(tied, Path(folder.name))
    main = "cpu" if where.type == "cpu" else where  # the word: with the device accelerate would offload to it
    dispatch_model(model, device_map, main_device=main, offload_dir=folder.name, force_hooks=True)
    model.device_map, model.offload_folder = device_map, folder  # which goes when the model does
