"""Sparse training inside real ranks, on the engines and data of tests/distributed/curves.py, for test_prune.py."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
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
from bigtrain.compress_config import PruneConfig, RampConfig
from bigtrain.config import Config, section
from bigtrain.engine import start
from bigtrain.engine.base import Engine
from bigtrain.engine.host import HostGroup
from tests.distributed.curves import MODEL, join, make, train

RAMP = RampConfig("linear", begin=1, end=4, every=1)


class Sparse:
    """An engine and its pruning, driven as the trainer does it."""

    def __init__(
        self, host: HostGroup, choice: dict[str, Any], precision: str, prune: dict[str, Any],
        change: Callable[[nn.Module], None] | None = None,
    ) -> None:  # fmt: skip
        AcceleratorState._reset_state(True)
        self.host, self.config = host, make(choice, precision)
        self.prune = Prune(section(PruneConfig, {"schedule": vars(RAMP)} | prune, "compress.prune"))

        def model() -> nn.Module:
            torch.manual_seed(0)
            built = models.build(MODEL)
            self.prune.apply(built)
            return built

        self.engine = start.build(self.config, model, torch.device("cpu"))
        self.prune.attach(self.engine, host)
        self.step = 0

    def begin(self) -> Sparse:
        self.engine.model.train()
        self.prune.begin(self.step)
        return self

    def steps(self, end: int) -> list[str]:
        """Train to `end`. What is not as it should be after each step: the sparsity, and the zeros themselves."""
        wrong = []
        while self.step < end:
            train(self.engine, self.config, self.host, self.step, self.step + 1)
            self.step += 1
            self.prune.update(self.step)
            told = self.prune.metrics()["compress/sparsity"]
            masks = self.keeps()
            weights = dict(self.engine.weights())
            if self.host.rank == 0:
                zeros = sum(int((weights[name] == 0).sum()) for name in masks)
                kept = sum(int(keep.sum()) for keep in masks.values())
                size = sum(keep.numel() for keep in masks.values())
                if (size - zeros, (size - kept) / size) != (kept, told):
                    wrong.append(f"step {self.step}: {zeros} zeros of {size}, {size - kept} pruned, told {told}")
        return wrong

    def keeps(self) -> dict[str, Tensor]:
        """{weight's name: its whole mask}."""
        masks = self.prune.masks
        parts = {index: part.keep for index, part in enumerate(masks.parts)}
        return {layer.weight: masks.whole(layer, parts) for layer in masks.layers}

    def digest(self) -> str:
        packed = self.prune.masks.packed()
        return hashlib.sha256(b"".join(packed[name].numpy().tobytes() for name in sorted(packed))).hexdigest()


def exact(choices: dict[str, dict[str, Any]], precision: str, prune: dict[str, Any]) -> dict[str, Any]:
    """{engine: [what is wrong, sparsity at the end]}: trained through the whole ramp and beyond."""
    host = join()
    found = {}
    for name, choice in choices.items():
        sparse = Sparse(host, choice, precision, prune).begin()
        found[name] = [sparse.steps(6), sparse.prune.metrics()["compress/sparsity"]]
    return found


def same_weights(
    choices: dict[str, dict[str, Any]], precision: str, prunes: dict[str, Any]
) -> dict[str, dict[str, str]]:
    """{pruning: {engine: hash of the masks}}, chosen before the first step, of the same weights everywhere."""
    host = join()
    found: dict[str, dict[str, str]] = {}
    for title, prune in prunes.items():
        for name, choice in choices.items():
            ramp = {"schedule": {"kind": "constant"}}
            found.setdefault(title, {})[name] = Sparse(host, choice, precision, ramp | prune).begin().digest()
    return found


def saved(choice: dict[str, Any], precision: str, prune: dict[str, Any], folder: str, later: bool) -> dict[str, Any]:
    """Train to step 3 and save."""
    host = join()
    sparse = Sparse(host, choice, precision, prune).begin()
    wrong = sparse.steps(3)
    saver = Saver(Path(folder), sparse.engine, host, Keep(1), later, transforms=[sparse.prune])
    saver.begin(3, {})
    digest = sparse.digest()
    wrong += sparse.steps(4)  # what is saved is a copy
    problem = saver.finish().problem
    saver.close()
    return {"wrong": wrong, "problem": problem, "masks": digest, "masks_after": sparse.digest()}


def resumed(choices: dict[str, dict[str, Any]], precision: str, prune: dict[str, Any], folder: str) -> dict[str, Any]:
    """{engine: its masks as loaded, those a step later, what is wrong in the steps after}."""
    host = join()
    found = {}
    (checkpoint,) = checkpoints(Path(folder))
    for name, choice in choices.items():
        sparse = Sparse(host, choice, precision, prune)
        load(checkpoint, sparse.engine, [sparse.prune])
        sparse.step = 3
        sparse.begin()
        digest = sparse.digest()
        wrong = sparse.steps(4)
        after = sparse.digest()
        found[name] = {"masks": digest, "masks_after": after, "wrong": wrong + sparse.steps(7)}
    return found
