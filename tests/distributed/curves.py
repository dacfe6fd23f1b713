"""Loss curves of every engine on the same data, run inside real ranks by test_engines.py."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from bigtrain import models
from bigtrain.batch import IGNORED, Batch, LossSums
from bigtrain.checkpoint import checkpoints, store
from bigtrain.config import Config, DecoderConfig, from_dict
from bigtrain.engine import start
from bigtrain.engine.base import Engine
from bigtrain.engine.host import HostGroup
from bigtrain.errors import BigtrainError
from bigtrain.schedule import lr_multiplier

LENGTH, GLOBAL_BATCH, MICRO_BATCH, STEPS = 32, 8, 2, 20
MODEL = DecoderConfig(dim=64, n_layers=2, n_heads=4, vocab_size=128, max_seq_len=LENGTH)
ZERO = {f"zero{stage}": {"kind": "deepspeed", "stage": stage} for stage in range(4)}
ENGINES: dict[str, dict[str, Any]] = ZERO | {
    "zero2_offload": {"kind": "deepspeed", "stage": 2, "offload_optimizer": "cpu"},
    "zero3_offload": {"kind": "deepspeed", "stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    "ddp": {"kind": "accelerate", "parallel": "ddp"},
    "fsdp2": {"kind": "accelerate", "parallel": "fsdp2"},
}
NVME = {"kind": "deepspeed", "stage": 3, "offload_optimizer": "nvme", "offload_parameters": "nvme"}


def loss(model: torch.nn.Module, batch: Batch) -> LossSums:
    return LossSums(*model(batch["tokens"], batch["targets"]))


def sequences(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch of a step, the same on every rank: a noisy repeating pattern, with some targets ignored."""
    draw = torch.Generator().manual_seed(step)
    period = torch.randint(2, 9, (GLOBAL_BATCH, 1), generator=draw)
    tokens = (torch.arange(LENGTH + 1) % period) * 7 + torch.randint(0, 2, (GLOBAL_BATCH, LENGTH + 1), generator=draw)
    targets = tokens[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=draw) < 0.3] = IGNORED  # unequal counts: normalisation must be global
    return tokens[:, :-1], targets


def make(choice: dict[str, Any], precision: str, optimizer: dict[str, Any] | None = None) -> Config:
    return from_dict(
        {
            "engine": choice,
            "optimizer": optimizer or {"kind": "adamw", "lr": 4e-3},
            "schedule": {"warmup_steps": 3},
            "train": {
                "steps": STEPS, "global_batch": GLOBAL_BATCH, "micro_batch": MICRO_BATCH, "precision": precision,
                "grad_clip": 0.0 if optimizer and optimizer["kind"] == "muon" else 1.0,
            },
        }
    )  # fmt: skip


def build(config: Config, dropout: float = 0.0) -> Engine:
    AcceleratorState._reset_state(True)  # Accelerate keeps its first settings for a process's life

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return models.build(replace(MODEL, dropout=dropout))

    return start.build(config, model, torch.device("cpu"))


def train(built: Engine, config: Config, host: HostGroup, first: int, end: int) -> list[float]:
    """Steps first to end-1; the loss per target token of each, over all ranks."""
    curve = []
    share = GLOBAL_BATCH // host.world_size
    for step in range(first, end):
        tokens, targets = (whole[host.rank * share : (host.rank + 1) * share] for whole in sequences(step))
        (count,) = host.sum(int((targets != IGNORED).sum()))
        nll = 0.0
        for row in range(0, share, MICRO_BATCH):
            rows = slice(row, row + MICRO_BATCH)
            batch = {"tokens": tokens[rows], "targets": targets[rows]}
            nll += float(built.forward_backward(loss, batch, 1 / count, row + MICRO_BATCH == share).nll)
        built.step(lr_multiplier(config.schedule, step, STEPS))
        curve.append(host.sum(nll)[0] / count)
    return curve


def join() -> HostGroup:
    start.init_distributed("cpu", 120)
    return HostGroup(120)


def curves(
    choices: dict[str, dict[str, Any]], precision: str, optimizer: dict[str, Any] | None = None
) -> dict[str, list[float]]:
    """{engine: its loss at each step}."""
    host = join()
    result = {}
    for name, choice in choices.items():
        folder = host.broadcast(tempfile.mkdtemp())
        try:
            if "nvme" in choice.values():
                choice = choice | {"nvme_path": folder}
            config = make(choice, precision, optimizer)
            result[name] = train(build(config), config, host, 0, STEPS)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return result


def resumed(choices: dict[str, dict[str, Any]], precision: str, folder: str) -> dict[str, Any]:
    """{engine: the curve of an uninterrupted run, that of one saved and loaded half-way, and whether weights agree}."""
    host = join()
    result = {}
    for name, choice in choices.items():
        config = make(choice, precision)
        built = build(config, dropout=0.1)
        torch.manual_seed(host.rank)
        whole = train(built, config, host, 0, STEPS)
        weights = dict(built.weights())

        built = build(config, dropout=0.1)
        torch.manual_seed(host.rank)
        half = train(built, config, host, 0, STEPS // 2)
        store.save(Path(folder) / name, STEPS // 2, built, host, {}, keep=1)
        built = build(config, dropout=0.1)
        torch.manual_seed(999)  # loading must put this right
        (checkpoint,) = checkpoints(Path(folder) / name)
        store.load(checkpoint, built)
        half += train(built, config, host, STEPS // 2, STEPS)
        same = all(torch.equal(weights[key], tensor) for key, tensor in built.weights())
        result[name] = {"whole": whole, "resumed": half, "same_weights": same}
    return result


def session(choice: dict[str, Any], precision: str, folder: str, first: int, save_at: int, end: int) -> dict[str, Any]:
    """Steps first to end-1 in a process of their own, from the checkpoint in `folder` where first is not 0, and with
    one saved on the way unless save_at is 0: their curve, and a digest of the weights."""
    host = join()
    config = make(choice, precision)
    built = build(config, dropout=0.1)
    torch.manual_seed(host.rank if first == 0 else 999)  # loading must put this right
    if first:
        (checkpoint,) = checkpoints(Path(folder))
        store.load(checkpoint, built)
    curve = train(built, config, host, first, save_at or end)
    if save_at:
        store.save(Path(folder), save_at, built, host, {}, keep=1)
        curve += train(built, config, host, save_at, end)
    digest = hashlib.sha256()
    for _, tensor in built.weights():
        digest.update(tensor.float().numpy().tobytes())
    return {"curve": curve, "weights": digest.hexdigest()}


def refused(choices: dict[str, dict[str, Any]], precision: str, folder: str) -> dict[str, str]:
    """{engine: why what `resumed` has saved cannot be loaded with this number of ranks}."""
    join()
    result = {}
    for name, choice in choices.items():
        (checkpoint,) = checkpoints(Path(folder) / name)
        try:
            store.load(checkpoint, build(make(choice, precision)))
        except BigtrainError as error:
            result[name] = str(error)
    return result
