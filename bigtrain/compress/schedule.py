"""How much of a transform holds after each optimizer step. Pure functions of the step: resuming needs no counter."""

from __future__ import annotations

from bigtrain.compress_config import RampConfig


def fraction(ramp: RampConfig, step: int) -> float:
    """From 0 (nothing) to 1 (all of it) after `step` optimizer steps; never falls.

    linear and cubic move every `ramp.every` steps from `begin` on, and reach 1 exactly at `end`. cubic is
    1 - (1 - t)^3 with t = (step - begin) / (end - begin): Zhu & Gupta, arXiv 1710.01878, equation 1.
    """
    if ramp.kind == "multi_step":
        reached = [share for at, share in zip(ramp.steps, ramp.fractions, strict=True) if step >= at]
        return reached[-1] if reached else 0.0
    if step < ramp.begin:
        return 0.0
    if ramp.kind == "constant" or step >= ramp.end:
        return 1.0
    held = ramp.begin + (step - ramp.begin) // ramp.every * ramp.every  # the last step at which it moved
    t = (held - ramp.begin) / (ramp.end - ramp.begin)
    return t if ramp.kind == "linear" else 1 - (1 - t) ** 3


def moves(ramp: RampConfig, step: int) -> bool:
    """Whether more of it holds after `step` steps than after one less."""
    return fraction(ramp, step) > (fraction(ramp, step - 1) if step else 0.0)
