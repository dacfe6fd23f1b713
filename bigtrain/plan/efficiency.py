"""How much of a device's peak kernels reach, as a handful of constants for each generation of devices.

They were fitted on llm-foundry's public throughput tables (benchmarks/ground_truth/llm_foundry.csv: 125M to 70B
parameters, 512 to 65,536 tokens, 8 to 128 GPUs, FSDP); `benchmarks/plan_ground_truth.py --fit` prints them. Their
published error is that of models left out of the fit. Attention is apart: those tables were made with a
Triton kernel that has been replaced since.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from bigtrain.plan.clusters import Device


@dataclass(frozen=True)
class Efficiency:
    """Fractions of what the device can do, 1 being its data sheet (or of a CPU what was measured)."""

    matmul: float  # of the peak of the precision
    attention: float  # of the bf16 peak, for the operations that a causal mask leaves
    memory: float  # of the memory bandwidth, in kernels that do little else
    optimizer: float  # of the memory bandwidth, in the optimizer step with clipping and casts
    layer_seconds: float  # a layer's hooks and launches that nothing hides, for each micro-batch
    exposed: float  # of a collective that runs beside computation, the fraction that it slows it down by
    # What fitted fractions have in them, and measured ones beside them:
    layer_step_seconds: float = 0.0  # a layer's in an optimizer step
    step_seconds: float = 0.0  # the rest of what a step takes with next to nothing to compute
    tile: int = 128  # dimensions of a matmul are rounded up to it
    validated: bool = True  # against public rows of such devices


AMPERE = Efficiency(matmul=0.72, attention=0.60, memory=0.59, optimizer=0.31, layer_seconds=2.1e-3, exposed=0.6)
HOPPER = Efficiency(matmul=0.61, attention=0.34, memory=0.59, optimizer=0.31, layer_seconds=2.0e-3, exposed=0.6)
# A CPU's fixed seconds are what `bigtrain doctor` found on a machine of two busy cores (a layer's with ZeRO-3's hooks).
# Its peak is measured, so that these are about shapes, not clocks: see `bigtrain doctor --cluster-file`.
CPU = Efficiency(
    matmul=0.75, attention=0.12, memory=0.5, optimizer=0.5, layer_seconds=3e-3, exposed=1.0, layer_step_seconds=4e-4,
    step_seconds=6e-3, tile=16, validated=False,
)  # fmt: skip
# Attention: FlashAttention-2 reaches 50-73% of an A100, forward and backward, and 335 TFLOP/s of an H100 (arXiv
# 2307.08691, section 4.1).

HOOKS = 3.0  # how much longer a layer's fixed seconds are with ZeRO-3's hooks
FIXED = ("layer_seconds", "layer_step_seconds", "step_seconds")  # with _gathered where each layer's weights are
MEASURABLE = ("matmul", "attention", "memory", "optimizer", "exposed", *FIXED)


def measured_widths(is_cpu: bool) -> tuple[int, int]:
    """dim of the feed-forward layers whose matmuls are measured: matmul_narrow and matmul."""
    return (256, 768) if is_cpu else (1024, 4096)


def of(device: Device, precision: str = "bf16") -> Efficiency:
    """What was measured of a device in a precision, else what to assume of it.

    An unknown GPU is taken for the nearest generation that was validated.
    """
    if device.is_cpu:
        found = CPU
    elif "A100" in device.name:
        found = AMPERE
    else:
        found = HOPPER if "H100" in device.name else replace(HOPPER, validated=False)
    changes: dict[str, Any] = {}
    for name in MEASURABLE:
        value = device.efficiency.get(f"{name}_{precision}", device.efficiency.get(name))
        if value is not None:
            changes[name] = value
    return replace(found, **changes)
