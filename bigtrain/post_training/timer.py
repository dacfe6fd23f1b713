"""How long a model takes for a batch on this machine, and how much energy: measured where the machine tells, else said
to be assumed."""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigtrain.data.example_loader import Share
from bigtrain.hardware import cores

RAPL = Path("/sys/class/powercap")  # counters of the processor packages, in microjoules; often for root alone
ASSUMED_WATTS_PER_CORE = 10.0  # of a server at work, when nothing tells
LEAST_RUNS, LEAST_SECONDS, WARM_UP = 5, 1.0, 2
BATCHES = 4  # of held-out data, in turns


class Timer:
    def __init__(self, task: Any, watts: float | None = None, compile: bool = False) -> None:
        """watts: of the machine at work, told by the user; compile: time what torch.compile makes of the model."""
        self.task, self.told, self.compile = task, watts, compile

    def machine(self) -> dict[str, Any]:
        return {"processor": _processor(), "threads": torch.get_num_threads(), "compiled": self.compile}

    @torch.inference_mode()
    def measure(self, model: nn.Module, size: int, device: torch.device) -> dict[str, Any]:
        """Of batches of `size` held-out examples: median seconds, joules (watts times that) and where those are from.

        The time is that of the task's evaluation of a batch: the forward pass, and finding the answer.
        """
        share = Share(0, 1, size, size, 0)
        batches = [
            {name: tensor.to(device) for name, tensor in batch.items()}
            for batch in itertools.islice(self.task.held_out(share), BATCHES)
        ]
        run: Any = compiled(model, device) if self.compile else model
        if self.compile:
            run.module = model  # where an engine's wrapper has it
        turn = itertools.cycle(batches)

        def once() -> None:
            self.task.evaluate(run, next(turn))
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        for _ in range(max(WARM_UP, len(batches))):
            once()
        before = _rapl()
        began = time.perf_counter()
        seconds: list[float] = []
        watts: list[float] = []
        while len(seconds) < LEAST_RUNS or time.perf_counter() - began < LEAST_SECONDS:
            started = time.perf_counter()
            once()
            seconds.append(time.perf_counter() - started)
            if device.type == "cuda" and len(watts) < LEAST_RUNS:
                watts += _gpu_watts()
        elapsed, after = time.perf_counter() - began, _rapl()
        median = statistics.median(seconds)
        power, source = self._power(watts, before, after, elapsed)
        return {"seconds": median, "joules": power * median, "watts": power, "watts_source": source}

    def _power(
        self, gpu: list[float], before: dict[str, int], after: dict[str, int], seconds: float
    ) -> tuple[float, str]:
        if self.told is not None:
            return self.told, "--watts"
        if gpu:
            return statistics.mean(gpu), "nvidia-smi power.draw"
        used = [after[name] - before[name] for name in before if after.get(name, -1) >= before[name]]
        if used and sum(used):
            return sum(used) / 1e6 / seconds, "RAPL counters of the processor packages"
        busy = min(cores(), torch.get_num_threads())
        return busy * ASSUMED_WATTS_PER_CORE, f"assumed: {ASSUMED_WATTS_PER_CORE:g} W for each of {busy} cores"


def compiled(model: nn.Module, device: torch.device) -> Any:
    """For inference, at any size of batch. On a CPU with the weights as constants ("freezing"), in all that this
    process compiles: oneDNN's int8 kernels want them packed beforehand; without those int8 is slower than bfloat16."""
    if device.type == "cpu":
        from torch._inductor import config

        config.freezing = True  # as an option of one compilation the tracer would not see it
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
