"""How long a model takes for a batch on this machine, and how much energy: measured where the machine tells, else said
to be assumed."""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigtrain.data.example_loader import Share
from bigtrain.hardware import cores

RAPL = Path("/sys/class/powercap")  # counters of the processor packages, in microjoules; often for root alone
ASSUMED_WATTS_PER_CORE = 10.0  # of a server at work, when nothing tells
ROUNDS, ROUND_SECONDS = 5, 0.2  # of timing each model
BATCHES = 4  # of held-out data, in turns
SIZES = (1, 32)  # of a batch


@dataclass
class _Repeats:
    """What was measured of a model at one size of batch, in all rounds."""

    seconds: list[float] = field(default_factory=list)  # of each batch
    elapsed: float = 0.0
    joules: float = 0.0  # of the processor packages in that time
    gpu_watts: list[float] = field(default_factory=list)


class Timer:
    def __init__(self, task: Any, watts: float | None = None, compile: bool = False) -> None:
        """watts: of the machine at work, told by the user; compile: time what torch.compile makes of the model."""
        self.task, self.told, self.compile = task, watts, compile

    def machine(self) -> dict[str, Any]:
        return {"processor": _processor(), "threads": torch.get_num_threads(), "compiled": self.compile}

    def compare(
        self, loads: Sequence[Callable[[], nn.Module]], device: torch.device, hold: bool = True
    ) -> list[dict[str, Any]]:
        """Of each model, for batches of SIZES held-out examples under `batch_N_`: seconds (the median of single
        batches), joules (watts times that), the quartiles of both (`_q1`, `_q3`), repeats, watts and their source.

        The time is that of the task's evaluation of a batch: the forward pass, and finding the answer. All models take
        turns, so that whatever else the machine does falls on them alike. hold: keep them all in memory; else each is
        loaded again for its turn.
        """
        models = [
            cache(partial(self._ready, load, device)) if hold else partial(self._ready, load, device) for load in loads
        ]
        batches = {size: self._batches(size, device) for size in SIZES}
        found = [{size: _Repeats() for size in SIZES} for _ in loads]
        for _ in range(ROUNDS):
            for model, sizes in zip(models, found, strict=True):
                run = model()
                for size, repeats in sizes.items():
                    self._turn(run, batches[size], device, repeats, hold)
        return [
            {f"batch_{size}_{key}": value for size, one in sizes.items() for key, value in self._summary(one).items()}
            for sizes in found
        ]

    def _ready(self, load: Callable[[], nn.Module], device: torch.device) -> Any:
        model = load()
        if not self.compile:
            return model
        run = compiled(model, device)
        run.module = model  # where an engine's wrapper has it
        return run

    def _batches(self, size: int, device: torch.device) -> list[Any]:
        held_out = itertools.islice(self.task.held_out(Share(0, 1, size, size, 0)), BATCHES)
        return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in held_out]

    @torch.inference_mode()
    def _turn(self, run: Any, batches: list[Any], device: torch.device, repeats: _Repeats, held: bool) -> None:
        """Batch after batch for a while. held: whether `run` has had its turn before, if there was one."""
        turn = itertools.cycle(batches)

        def once() -> float:
            began = time.perf_counter()
            self.task.evaluate(run, next(turn))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - began

        for _ in range(1 if held and repeats.seconds else len(batches)):  # warm, and compiled for each of their lengths
            once()
        before, began, first = _rapl(), time.perf_counter(), len(repeats.seconds)
        while len(repeats.seconds) == first or time.perf_counter() - began < ROUND_SECONDS:
            repeats.seconds.append(once())
        repeats.elapsed += time.perf_counter() - began
        after = _rapl()
        repeats.joules += (
            sum(after[name] - before[name] for name in before if after.get(name, -1) >= before[name]) / 1e6
        )
        if device.type == "cuda":
            repeats.gpu_watts += _gpu_watts()

    def _summary(self, repeats: _Repeats) -> dict[str, Any]:
        watts, source = self._power(repeats)
        low, median, high = statistics.quantiles(repeats.seconds, n=4, method="inclusive")
        return {
            "seconds": median, "seconds_q1": low, "seconds_q3": high,
            "joules": watts * median, "joules_q1": watts * low, "joules_q3": watts * high,
            "repeats": len(repeats.seconds), "watts": watts, "watts_source": source,
        }  # fmt: skip

    def _power(self, repeats: _Repeats) -> tuple[float, str]:
        if self.told is not None:
            return self.told, "--watts"
        if repeats.gpu_watts:
            return statistics.mean(repeats.gpu_watts), "nvidia-smi power.draw"
        if repeats.joules:
            return repeats.joules / repeats.elapsed, "RAPL counters of the processor packages"
        busy = min(cores(), torch.get_num_threads())
        return busy * ASSUMED_WATTS_PER_CORE, f"assumed: {ASSUMED_WATTS_PER_CORE:g} W for each of {busy} cores"


def compiled(model: nn.Module, device: torch.device) -> Any:
    """For inference, at any size of batch. On a CPU with the weights as constants ("freezing"), in all that this
    process compiles: oneDNN's int8 kernels want them packed beforehand; without those int8 is slower than bfloat16."""
    if device.type == "cpu":
        from torch._inductor import config

        config.freezing = True  # as an option of one compilation the tracer would not see it
    # Of one forward function, which all models of a class share: the ninth would run as it is, and nobody would know.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(model, dynamic=True)


def _rapl() -> dict[str, int]:
    """{package: microjoules so far}; empty where the machine does not say, or not to us."""
    found = {}
    for package in RAPL.glob("intel-rapl:?"):
        try:
            found[package.name] = int((package / "energy_uj").read_text())
        except (OSError, ValueError):
            continue
    return found


def _gpu_watts() -> list[float]:
    command = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        return [float(subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip())]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return os.uname().machine
