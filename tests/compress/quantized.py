"""Quantization-aware training inside real ranks, on the engines and data of tests/distributed/curves.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn

from bigtrain import models
from bigtrain.checkpoint import checkpoints, store
from bigtrain.checkpoint.find import Keep
from bigtrain.compress import quantize
from bigtrain.compress.quantize import Quantize
from bigtrain.compress_config import QuantizeConfig
from bigtrain.engine import start
from bigtrain.engine.host import HostGroup
from tests.distributed.curves import MODEL, join, make, train

START, FREEZE, SAVED, END = 2, 4, 5, 8


class Run:
    """An engine and its quantization, driven as the trainer does it."""

    def __init__(self, host: HostGroup, choice: dict[str, Any], precision: str, settings: dict[str, Any]) -> None:
        AcceleratorState._reset_state(True)
        self.host, self.config = host, make(choice, precision)
        self.transform = Quantize(QuantizeConfig(**settings, start=START, freeze=FREEZE))

        def model() -> nn.Module:
            torch.manual_seed(0)
            built = models.build(MODEL)
            self.transform.apply(built)
            return built

        self.engine = start.build(self.config, model, torch.device("cpu"))
        self.transform.attach(self.engine, host)
        self.curve: list[float] = []

    def steps(self, first: int, end: int) -> None:
        self.engine.model.train()
        self.transform.begin(first)
        for step in range(first, end):
            self.curve += train(self.engine, self.config, self.host, step, step + 1)
            self.transform.update(step + 1)
            if step + 1 == FREEZE:
                weights = dict(self.engine.weights())
                scheme, held = self.transform.scheme, self.transform.state()
                self.exact = self.host.rank > 0 or all(
                    torch.equal(scale, quantize.scales(weights[name], scheme)) for name, scale in held.items()
                )


def trained(
    choices: dict[str, dict[str, Any]], precision: str, settings: dict[str, Any], folder: str
) -> dict[str, Any]:
    """{engine: its curve; whether scales were frozen as the weights had them; what a run of the next engine that
    resumes it has for the steps after, and whether its scales are the same}."""
    host = join()
    found: dict[str, Any] = {}
    names = list(choices)
    for name, following in zip(names, names[1:] + names[:1], strict=True):
        run = Run(host, choices[name], precision, settings)
        run.steps(0, SAVED)
        state = run.transform.state()
        saver = store.Saver(Path(folder) / name, run.engine, host, Keep(1), False, transforms=[run.transform])
        saver.begin(SAVED, {})
        assert saver.finish().problem is None
        saver.close()
        run.steps(SAVED, END)

        again = Run(host, choices[following], precision, settings)
        (checkpoint,) = checkpoints(Path(folder) / name)
        store.load(checkpoint, again.engine, [again.transform])
        again.steps(SAVED, END)
        held = again.transform.state()
        same = all(torch.equal(scale, state[weight]) for weight, scale in held.items() if scale.numel())
        found[name] = {"curve": run.curve, "exact": run.exact, "held": same, "resumed": again.curve}
    return found
