"""What a plan says: one object that is filled part by part, shown as a table or as JSON.

Every number is also a `Line`, with the formula that made it and where the formula is from.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Line:
    """One number of a plan and how it came about."""

    name: str  # as in the JSON: memory.optimizer, mfu; of an interval's ends intervals.step_seconds.low and .high
    value: float
    unit: str  # GiB, s, tokens/s, USD, kWh, "" for a fraction
    formula: str  # with the symbols written out: 12 P / N
    source: str  # file of this package, paper and section, or data sheet


@dataclass
class Plan:
    """Of one run on one cluster. Memory is of the rank that needs most, in GiB; None: not estimated."""

    cluster: str
    ranks: int
    parameters: int  # the task's head included, shared weights once
    parameters_by_part: dict[str, int]
    trained_parameters: int
    micro_batch: int = 0  # sequences of one rank at a time
    accumulation: int = 0  # micro-batches of a step
    # of a text, padding counted: mean, longest; known: whether the prepared data says so, else the model's longest
    sequence_length: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)  # part -> GiB on the device, and `peak`, their largest sum
    # ... and whether activation checkpointing is on or not, GiB of activations with and without it
    activations: dict[str, float] = field(default_factory=dict)  # per_layer, with_checkpointing, without_checkpointing
    device_memory_gib: float = 0.0  # what one rank has
    host_memory_gib: float = 0.0  # of a node, that its ranks take in RAM (offload, libraries)
    disk_gib: float = 0.0  # of a node, that offload to NVMe takes
    checkpoint_gib: float = 0.0  # of the whole run
    fits: bool = False
    binding: str = ""  # what is short, if it does not fit: device memory, host memory, disk
    # time, money and energy: plan/step_time.py
    step_seconds: float | None = None
    tokens_per_step: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    hfu: float | None = None
    time: dict[str, float] = field(default_factory=dict)  # part of a step -> seconds
    communication: dict[str, float] = field(default_factory=dict)  # collective and link -> GB that a rank sends a step
    tokens: float | None = None  # of the whole run
    steps: int | None = None
    hours: float | None = None
    cost: float | None = None  # US dollars
    energy_kwh: float | None = None
    co2_kg: float | None = None
    checkpoint_stall_seconds: float | None = None  # for each checkpoint
    inference: dict[str, float] = field(default_factory=dict)  # of the result: weights_gib, kv_cache_gib, decode_ms ...
    # step_seconds, tokens_per_second, hours, cost, energy_kwh, co2_kg, memory.peak -> least and most
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)  # among them: outside of what was validated
    lines: list[Line] = field(default_factory=list)

    def add(self, name: str, value: float, unit: str, formula: str, source: str) -> float:
        """Note how a number came about; returns it."""
        self.lines.append(Line(name, value, unit, formula, source))
        return value

    def add_interval(self, name: str, middle: float, low: float, high: float, source: str) -> None:
        """Of the number `name`, noted before."""
        self.intervals[name] = (low, high)
        unit = next(line.unit for line in self.lines if line.name == name)
        below, above = (f"{middle / low:.3g}" if low else "0"), (f"{high / middle:.3g}" if middle else "0")
        self.add(f"intervals.{name}.low", low, unit, f"{name} / {below}", source)
        self.add(f"intervals.{name}.high", high, unit, f"{name} x {above}", source)

    def to_dict(self, explain: bool = False) -> dict[str, Any]:
        """Plain data, without infinities: JSON has none. explain: with the formulas."""
        finite: dict[str, Any] = _finite(asdict(self))
        if not explain:
            del finite["lines"]
        return finite

    def to_json(self, explain: bool = False) -> str:
        return json.dumps(self.to_dict(explain), indent=1)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
