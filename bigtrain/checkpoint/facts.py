"""What a manifest says of the run that a checkpoint is from, so that a resume can tell what has changed since."""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path
from typing import Any

from bigtrain import config as configuration
from bigtrain.checkpoint.integrity import sha256
from bigtrain.config import Config, DeepSpeedConfig, objective_names
from bigtrain.held_out import SHARE, sample_name
from bigtrain.provenance import code_sha256, versions


def of_run(config: Config, tokenizer_file: Path) -> dict[str, Any]:
    """Engine, precision, batch, fingerprints (SHA-256) and versions; the same for every checkpoint of a session."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "engine": config.engine.kind,
        "stage": config.engine.stage if isinstance(config.engine, DeepSpeedConfig) else None,
        "precision": config.train.precision,
        "global_batch": config.train.global_batch,
        "fingerprints": _fingerprints(configuration.fingerprint(config), config.data.prepared_dir, tokenizer_file),
        "versions": versions(),
    }


def metric(objective: str | list[str], seen: dict[str, float]) -> dict[str, Any] | None:
    """The (first) objective as a manifest holds it, lower being better; None unless an evaluation at this very step
    gave a finite number, of the whole held-out set or of a sample: `share` says of how much of it."""
    wanted = objective_names(objective)[0]
    for name in (wanted, sample_name(wanted)):
        value = -seen.get(name[1:], math.nan) if name.startswith("-") else seen.get(name, math.nan)
        if math.isfinite(value):
            return {"name": name, "value": value, "share": seen.get(SHARE, 1.0)}
    return None


@functools.cache
def _fingerprints(config: str, prepared_dir: str | None, tokenizer_file: Path) -> dict[str, str]:
    return {
        "config": config,
        "tokenizer": sha256(tokenizer_file),
        "corpus": Path(prepared_dir or "").name,  # a prepared directory is named by the fingerprint of its content
        "code": code_sha256(),
    }
