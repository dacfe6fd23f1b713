"""The rules of `compress.prune` and of a ramp. Without torch."""

from __future__ import annotations

import math

from bigtrain.compress_config import PruneConfig, RampConfig, n_of_m
from bigtrain.errors import NO_VALUE, ConfigError

FIELD = "compress.prune"


def check(prune: PruneConfig) -> None:
    """Raises ConfigError."""
    if not 0 <= prune.sparsity < 1:
        raise ConfigError(f"{FIELD}.sparsity", prune.sparsity, "must be at least 0 and below 1")
    try:
        n_of_m(prune.pattern)
    except ValueError:
        raise ConfigError(
            f"{FIELD}.pattern", prune.pattern, "is no N:M with 0 < N < M", "2:4 or 4:8, or null for anywhere"
        ) from None
    rows = "wanda" if prune.method == "wanda" else f"pattern {prune.pattern}" if prune.pattern else ""
    if rows and prune.scope == "global":
        raise ConfigError(
            f"{FIELD}.scope", prune.scope, f"{rows} compares weights of a row", f"set {FIELD}.scope=layer"
        )
    if not prune.include:
        raise ConfigError(f"{FIELD}.include", prune.include, "names no layer", "leave it out for all linear layers")
    check_ramp(prune.schedule, f"{FIELD}.schedule")


def check_ramp(ramp: RampConfig, field: str) -> None:
    """Raises ConfigError."""
    if ramp.begin < 0:
        raise ConfigError(f"{field}.begin", ramp.begin, "must be at least 0")
    if ramp.kind in ("linear", "cubic"):
        if ramp.end < ramp.begin:
            raise ConfigError(f"{field}.end", ramp.end, f"lies before {field}.begin={ramp.begin}")
        if ramp.every < 1:
            raise ConfigError(f"{field}.every", ramp.every, "must be at least 1")
    if ramp.kind != "multi_step":
        if ramp.steps or ramp.fractions:
            raise ConfigError(f"{field}.steps", NO_VALUE, f"is for kind=multi_step, not {ramp.kind}")
        return
    if not ramp.steps or len(ramp.steps) != len(ramp.fractions):
        raise ConfigError(
            f"{field}.fractions", ramp.fractions, f"as many as {field}.steps={ramp.steps} are wanted, and at least one"
        )
    if ramp.steps != sorted(set(ramp.steps)) or ramp.steps[0] < 0:
        raise ConfigError(f"{field}.steps", ramp.steps, "must rise from one to the next")
    rising = ramp.fractions == sorted(ramp.fractions)
    if not (rising and all(0 <= value <= 1 for value in ramp.fractions) and math.isclose(ramp.fractions[-1], 1.0)):
        raise ConfigError(f"{field}.fractions", ramp.fractions, "must rise from at least 0 to 1")
