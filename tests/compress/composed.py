"""Runs with transforms inside real ranks, put together as `bigtrain.worker` does it, without launching each anew."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from bigtrain import compress, tasks
from bigtrain.checkpoint import checkpoints
from bigtrain.checkpoint.find import Keep
from bigtrain.checkpoint.store import Saver, load
from bigtrain.compress.prune import Prune
from bigtrain.compress.quantize import Quantize
from bigtrain.compress.quantize import trained as trained_quantized
from bigtrain.config import Config, from_dict, micro_batch
from bigtrain.data.example_loader import Share
from bigtrain.engine import start
from bigtrain.engine.host import HostGroup
from bigtrain.errors import BigtrainError
from bigtrain.schedule import lr_multiplier
from bigtrain.transform import apply
from tests.distributed.curves import join


class Run:
    """A run's parts on this rank, and its steps as the trainer takes them."""

    def __init__(self, host: HostGroup, config: Config) -> None:
        AcceleratorState._reset_state(True)  # Accelerate keeps its first settings for a process's life
        torch._dynamo.reset()
        self.host, self.config, self.step = host, config, 0
        self.task: Any = tasks.build(config)
        self.transforms = compress.build(config)

        def model() -> nn.Module:
            torch.manual_seed(config.train.seed)
            built: Any = self.task.build_model(config.model)
            built = apply(self.transforms, built)
            if config.train.compile:
                built.compile()
            return built

        self.engine = start.build(config, model, torch.device("cpu"))
        for transform in self.transforms:
            transform.attach(self.engine, host)
        self.loss = self.task.loss
        for transform in self.transforms:
            self.loss = transform.loss(self.loss)
        batch = config.train.global_batch
        share = Share(host.rank, host.world_size, batch, micro_batch(config, host.world_size), config.train.seed)
        self.data = self.task.train_loader(share)

    def steps(self, end: int) -> list[dict[str, float]]:
        """Of each step up to `end`: the task's loss per target, and what the transforms say."""
        self.engine.model.train()
        for transform in self.transforms:
            transform.begin(self.step)
        told = []
        while self.step < end:
            batches = self.data.batches(self.step)
            (targets,) = self.host.sum(sum(map(self.task.count_targets, batches)))
            nll = sum(
                float(self.engine.forward_backward(self.loss, batch, 1 / targets, batch is batches[-1]).nll)
                for batch in batches
            )
            self.engine.step(lr_multiplier(self.config.schedule, self.step, self.config.train.steps))
            self.step += 1
            told.append({"loss": self.host.sum(nll)[0] / targets})
            for transform in self.transforms:
                transform.update(self.step)
                told[-1] |= transform.metrics()
        return told

    def save(self, folder: Path) -> None:
        saver = Saver(
            folder, self.engine, self.host, Keep(1), encrypted=self.config.train.encryption, transforms=self.transforms
        )
        saver.begin(self.step, {})
        problem = saver.finish().problem
        saver.close()
        assert problem is None, problem

    def resume(self, folder: Path) -> Run:
        (checkpoint,) = checkpoints(folder)
        load(checkpoint, self.engine, self.transforms)
        self.step = checkpoint.step
        return self

    def states(self) -> dict[str, list[float]]:
        """{transform's tensor: its numbers}"""
        found: dict[str, Tensor] = {}
        for transform in self.transforms:
            found |= {f"{transform.name} {name}": tensor for name, tensor in transform.state().items()}
        return {name: tensor.flatten().tolist() for name, tensor in found.items()}


def walk(cases: dict[str, dict[str, Any]], steps: int) -> dict[str, dict[str, Any]]:
    """{case: what its steps told, or why it does not run}, of configs."""
    host = join()
    found: dict[str, dict[str, Any]] = {}
    for name, case in cases.items():
        try:
            run = Run(host, from_dict(case))
            before = {name: weight.clone() for name, weight in run.engine.weights()}
            told = run.steps(steps)
            after = dict(run.engine.weights())
            moved = sum(not torch.equal(before[name], after[name]) for name in after)
            finite = all(math.isfinite(value) for line in told for value in line.values())
            found[name] = {"told": told, "finite": finite, "moved": moved == len(before) or host.rank > 0}
            del run, before, after
        except Exception as error:  # the next one may do; a rank that hangs in another's collective ends all of them
            found[name] = {"problem": f"{type(error).__name__}: {error}"}
    return found


def continued(
    config: dict[str, Any], changes: dict[str, dict[str, Any]], folder: str, saved: int, end: int
) -> dict[str, Any]:
    """A run to `end`, once as it is (`told`), once saved at `saved` and continued by another with the same settings
    (`resumed`), and from the beginning with each of `changes`, {name: {section: {key: value}}}."""
    host = join()
    run = Run(host, from_dict(config))
    told = run.steps(saved)
    run.save(Path(folder))
    told += run.steps(end)
    found = {"told": told, "resumed": Run(host, from_dict(config)).resume(Path(folder)).steps(end)}
    for name, change in changes.items():
        changed = {section: config[section] | settings for section, settings in change.items()}
        found[name] = Run(host, from_dict(config | changed)).steps(end)
    return found


def sealed(first: dict[str, Any], following: dict[str, Any], folder: str, saved: int, end: int) -> dict[str, Any]:
    """A run saved at `saved`, and one of other settings that goes on from there: the states of both, what is told."""
    host = join()
    run = Run(host, from_dict(first))
    told = run.steps(saved)
    run.save(Path(folder))
    states = run.states()
    again = Run(host, from_dict(following)).resume(Path(folder))
    loaded = again.states()
    told += again.steps(end)
    try:
        late = str(apply(again.transforms, again.engine.model))
    except BigtrainError as error:
        late = str(error)
    zeros = total = 0
    weights = dict(again.engine.weights())
    prune = next(transform for transform in again.transforms if isinstance(transform, Prune))
    for layer in prune.layers if host.rank == 0 else ():
        zeros += int((weights[layer.weight] == 0).sum())
        total += layer.shape.numel()
    (checkpoint,) = checkpoints(Path(folder))
    scales = trained_quantized(again.config, checkpoint.path)
    assert scales is not None
    return {
        "told": told, "states": states, "loaded": loaded, "zeros": zeros, "total": total, "late": late,
        "quantized": sorted(name for name, scale in scales.scales.items() if scale is not None and scale.numel()),
        "layers": sorted(next(t for t in again.transforms if isinstance(t, Quantize)).layers),
    }  # fmt: skip
