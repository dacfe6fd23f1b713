"""Learning rate as a pure function of the step: nothing to save, nothing to restore, nothing to drift."""

from __future__ import annotations

import math

from bigtrain.config import ScheduleConfig


def lr_multiplier(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The factor on the peak lr for the update that makes step `step` (from 0) of `steps`.

    Warm-up is linear and reaches 1 at its last step. After it: cosine (arXiv 1608.03983) and linear fall to
    `final_ratio` over the rest of the run; wsd (warm-up, stable, decay: arXiv 2404.06395) holds 1 and falls
    linearly over the last `decay_fraction` of the run.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    first = schedule.warmup_steps
    if schedule.kind == "wsd":
        first = max(first, steps - round(steps * schedule.decay_fraction))
    progress = min(max((step - first) / max(steps - 1 - first, 1), 0.0), 1.0)
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1 - progress
    return schedule.final_ratio + (1 - schedule.final_ratio) * falling
