"""Checkpoints of what NVMe offload keeps on the disk. Masters and moments are read a sub-group at a time, used, and
written back; a checkpoint goes the same way, as an optimizer step does.

DeepSpeed's own (0.19) copies its swap files. It leaves out the sub-groups that are too small to be swapped and all
16-bit weights, so that a run goes on from the weights that it was born with, and does not say so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = "sub_groups"


@contextlib.contextmanager
def left_out(engine: Any) -> Iterator[None]:
    """DeepSpeed saves and loads all but the optimizer's state."""
    without: dict[str, Any] = {
        "zero_nvme_offload_optimizer": lambda: False,
        "_create_zero_checkpoint_files": lambda *_, **__: None,
        "_save_zero_checkpoint": lambda *_, **__: None,
        "_load_zero_checkpoint": lambda *_, **__: True,
    }
    vars(engine).update(without)
    try:
        yield
    finally:
        for name in without:
            del vars(engine)[name]


def save(optimizer: Any, directory: Path, rank: int) -> None:
    """This rank's, a file for each sub-group. Raises OSError."""
    folder = directory / FOLDER / f"rank-{rank}"
    folder.mkdir(parents=True)
    for number, master in _in_memory(optimizer):
        state = {name: _own(value) for name, value in optimizer.optimizer.state[master].items()}
        torch.save({"master": _own(master.data), "state": state}, folder / f"{number}.pt")
    torch.save(dict(vars(optimizer.loss_scaler)), folder / "loss_scaler.pt")


def load(optimizer: Any, directory: Path, rank: int) -> None:
    """Masters, moments and the weights made of them. All ranks call it together."""
    folder = directory / FOLDER / f"rank-{rank}"
    optimizer._partition_all_parameters()
    for number, master in _in_memory(optimizer):
        saved = torch.load(folder / f"{number}.pt", weights_only=True)
        master.data.copy_(saved["master"])
        state = optimizer.optimizer.state[master]
        for name, value in saved["state"].items():
            if isinstance(state.get(name), Tensor):
                state[name].copy_(value)
            else:
                state[name] = value
        optimizer._reassign_or_swap_out_partitioned_parameters(number)
    vars(optimizer.loss_scaler).update(torch.load(folder / "loss_scaler.pt", weights_only=True))
    optimizer.checkpoint_event_epilogue()  # gathers the parameters that stay whole


def _in_memory(optimizer: Any) -> Iterator[tuple[int, Tensor]]:
    """(number, flat masters) of each sub-group in turn, with its optimizer state, while it is there."""
    for number, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        optimizer._prepare_sub_group(number, set())
        yield number, master
        optimizer._release_sub_group(number, set())


def _own(value: Any) -> Any:
    """A tensor without the buffer that it is read into."""
    return value.detach().clone() if isinstance(value, Tensor) else value
