"""Sparse training inside real ranks, on the engines and data of tests/distributed/curves.py, for test_prune.py."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from bigtrain import models
from bigtrain.checkpoint import checkpoints
from bigtrain.checkpoint.find import Keep
from bigtrain.checkpoint.store import Saver, load
from bigtrain.compress.prune import Prune
from bigtrain.compress.schedule import fraction
from bigtrain.compress_config import PruneConfig, RampConfig
from bigtrain.config import section
from bigtrain.engine import start
from bigtrain.engine.host import HostGroup
from bigtrain.errors import BigtrainError
from tests.distributed.curves import GLOBAL_BATCH, MICRO_BATCH, MODEL, join, loss, make, sequences, train

RAMP = RampConfig("linear", begin=1, end=4, every=1)


class Sparse:
    """An engine and its pruning, driven as the trainer does it."""

    def __init__(
        self, host: HostGroup, engine: dict[str, Any], training: dict[str, Any], prune: dict[str, Any]
    ) -> None:
        AcceleratorState._reset_state(True)
        self.left_out = training.get("left_out", [])  # steps whose gradient is not finite
        backend = training.get("backend") or "inductor"
        training = {key: value for key, value in training.items() if key not in ("left_out", "backend")}
        torch._dynamo.reset()
        config = make(engine, training.get("precision", "fp32"))
        self.host, self.config = host, replace(config, train=replace(config.train, **training))
        self.prune = Prune(section(PruneConfig, {"schedule": vars(RAMP)} | prune, "compress.prune"))

        def model() -> nn.Module:
            torch.manual_seed(0)
            built = models.build(MODEL)
            self.prune.apply(built)
            if self.config.train.compile:
                built.compile(backend=backend)
            return built

        self.engine = start.build(self.config, model, torch.device("cpu"))
        self.prune.attach(self.engine, host)
        self.step = 0

    def begin(self) -> Sparse:
        self.engine.model.train()
        self.prune.begin(self.step)
        return self

    def steps(self, end: int) -> list[str]:
        """Train to `end`. What is not as it should be after each step: the schedule's sparsity, and the zeros."""
        wrong = []
        while self.step < end:
            if self.step in self.left_out:
                self.leave_out()
            else:
                train(self.engine, self.config, self.host, self.step, self.step + 1)
            self.step += 1
            self.prune.update(self.step)
            told, emptiest = self.prune.metrics().values()
            masks = self.keeps()
            weights = dict(self.engine.weights())
            if self.host.rank == 0:
                zeros = sum(int((weights[name] == 0).sum()) for name in masks)
                kept = sum(int(keep.sum()) for keep in masks.values())
                wanted = self.wanted([keep.numel() for keep in masks.values()])
                size = sum(keep.numel() for keep in masks.values())
                if not zeros == size - kept == wanted == round(told * size):
                    wrong.append(f"step {self.step}: {zeros} zeros, {size - kept} pruned, told {told}, {wanted} wanted")
                if emptiest != max(int((keep == 0).sum()) / keep.numel() for keep in masks.values()):
                    wrong.append(f"step {self.step}: {emptiest} of no layer is pruned")
        return wrong

    def leave_out(self) -> None:
        share = GLOBAL_BATCH // self.host.world_size
        tokens, targets = (part[self.host.rank * share : (self.host.rank + 1) * share] for part in sequences(self.step))
        self.engine.forward_backward(loss, {"tokens": tokens, "targets": targets}, float("inf"), True)
        assert not self.engine.step(1.0).applied

    def wanted(self, sizes: list[int]) -> int:
        """How many weights the schedule wants pruned now, of layers of these sizes and rows of 64 or 256."""
        share, prune = fraction(self.prune.config.schedule, self.step), self.prune
        if prune.pattern:
            n, m = prune.pattern
            return sum(size // m * int(share * (m - n) + 1e-9) for size in sizes)
        if prune.config.method == "wanda":
            columns = [layer.shape[1] for layer in prune.layers]
            sparsity = prune.config.sparsity * share
            return sum(size // row * round(sparsity * row) for size, row in zip(sizes, columns, strict=True))
        sizes = [sum(sizes)] if prune.config.scope == "global" else sizes
        return sum(round(prune.config.sparsity * share * size) for size in sizes)

    def keeps(self) -> dict[str, Tensor]:
        """{weight's name: its whole mask}."""
        masks = self.prune.masks
        parts = {index: part.keep for index, part in enumerate(masks.parts)}
        return {layer.weight: masks.whole(layer, parts) for layer in masks.layers}

    def digest(self) -> str:
        packed = self.prune.masks.packed()
        return hashlib.sha256(b"".join(packed[name].numpy().tobytes() for name in sorted(packed))).hexdigest()


def walk(
    cases: dict[str, list[dict[str, Any]]], judged: dict[str, list[dict[str, Any]]] | None = None
) -> dict[str, list[str]]:
    """{case: what is wrong}, of (engine, training, pruning) each, trained through the whole ramp and beyond; of
    `judged`, after one step in which weights do not move, which went that should not have."""
    host = join()
    found = {name: Sparse(host, *case).begin().steps(6) for name, case in cases.items()}
    return found | {name: judge(Sparse(host, *case).begin()) for name, case in (judged or {}).items()}


def judge(sparse: Sparse) -> list[str]:
    """Wanda and movement by their definitions, on a plain model and the whole batch, beside what the engine has chosen:
    half of each row by |w| times its input's norm; half of each layer by -w times its gradient."""
    host, prune = sparse.host, sparse.prune
    tokens, targets = sequences(0)
    share = GLOBAL_BATCH // host.world_size
    torch.manual_seed(0)
    plain = models.build(MODEL)
    squares: dict[str, Tensor] = {}

    def hear(name: str) -> Any:
        return lambda _, inputs: squares.update({name: inputs[0].detach().flatten(0, 1).square().sum(0)})

    for layer in prune.layers:
        plain.get_submodule(layer.module).register_forward_pre_hook(hear(layer.module))
    loss(plain, {"tokens": tokens, "targets": targets}).loss.backward()
    for row in range(host.rank * share, (host.rank + 1) * share, MICRO_BATCH):
        rows = slice(row, row + MICRO_BATCH)
        last = row + MICRO_BATCH == (host.rank + 1) * share
        sparse.engine.forward_backward(loss, {"tokens": tokens[rows], "targets": targets[rows]}, 1e-3, last)
    sparse.engine.step(0.0)
    prune.update(1)
    wrong = []
    for name, keep in sparse.keeps().items():
        weight = plain.get_parameter(name)
        assert weight.grad is not None
        if prune.config.method == "wanda":
            scores = weight.abs() * squares[name.removesuffix(".weight")].sqrt()
        else:
            scores = (-weight * weight.grad).view(1, -1)
        half = scores.shape[1] // 2
        wanted = torch.ones_like(scores).scatter_(1, scores.argsort(dim=1)[:, :half], 0).view_as(keep)
        if int((wanted != keep).sum()) > 1e-3 * keep.numel() or int(keep.sum()) != keep.numel() // 2:
            wrong.append(f"{name}: {int((wanted != keep).sum())} of {keep.numel()} are others")
    return wrong


def same_weights(
    choices: dict[str, dict[str, Any]], precision: str, prunes: dict[str, Any]
) -> dict[str, dict[str, str]]:
    """{pruning: {engine: hash of the masks}}, chosen before the first step, of the same weights everywhere."""
    host = join()
    found: dict[str, dict[str, str]] = {}
    for title, prune in prunes.items():
        for name, choice in choices.items():
            ramp = {"schedule": {"kind": "constant"}}
            sparse = Sparse(host, choice, {"precision": precision}, ramp | prune)
            found.setdefault(title, {})[name] = sparse.begin().digest()
    return found


def saved(choice: dict[str, Any], prunes: dict[str, Any], folder: str) -> dict[str, dict[str, Any]]:
    """{pruning: its masks, ...}: train to step 3, save in the background, and train on."""
    host = join()
    found = {}
    for name, prune in prunes.items():
        sparse = Sparse(host, choice, {}, prune).begin()
        wrong = sparse.steps(3)
        saver = Saver(Path(folder) / name, sparse.engine, host, Keep(1), later=True, transforms=[sparse.prune])
        saver.begin(3, {})
        digest = sparse.digest()
        wrong += sparse.steps(4)  # what is saved is a copy
        problem = saver.finish().problem
        saver.close()
        found[name] = {"wrong": wrong, "problem": problem, "masks": digest, "masks_after": sparse.digest()}
    return found


def resumed(choices: dict[str, Any], prunes: dict[str, Any], folder: str) -> dict[str, dict[str, dict[str, Any]]]:
    """{pruning: {engine: its masks as loaded, and what is wrong in the steps after}}"""
    host = join()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for title, prune in prunes.items():
        (checkpoint,) = checkpoints(Path(folder) / title)
        for name, choice in choices.items():
            sparse = Sparse(host, choice, {}, prune)
            load(checkpoint, sparse.engine, [sparse.prune])
            sparse.step = 3
            digest = sparse.begin().digest()
            found.setdefault(title, {})[name] = {"masks": digest, "wrong": sparse.steps(7)}
    found["slower"] = {name: slower(host, choice, prunes["magnitude"]) for name, choice in choices.items()}
    found["of other layers"] = {"": {"problem": _others_masks(sparse)}}
    return found


def slower(host: HostGroup, choice: dict[str, Any], prune: dict[str, Any]) -> dict[str, bool]:
    """What is pruned stays so, where the schedule is changed to want less for the time being."""
    sparse = Sparse(host, choice, {}, prune | {"schedule": {"kind": "linear", "begin": 0, "end": 40, "every": 1}})
    sparse.prune.choose(0.5)
    before = sparse.keeps()
    sparse.prune.choose(0.25)
    after = sparse.keeps()
    return {"same": all(torch.equal(before[name], after[name]) for name in before)}


def _others_masks(sparse: Sparse) -> str:
    try:
        sparse.prune.load_state({"blocks.0.other.weight": torch.zeros(8, dtype=torch.uint8)})
    except BigtrainError as error:
        return str(error)
    return "nothing was raised"
