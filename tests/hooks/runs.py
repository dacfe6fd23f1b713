"""A RunInfo for the hooks' tests."""

from __future__ import annotations

from pathlib import Path

from bigtrain.config import Config
from bigtrain.hooks import RunInfo


def run_info(run_dir: Path, *, start_step: int = 0, config: Config | None = None) -> RunInfo:
    return RunInfo(
        run_dir=run_dir,
        config=config or Config(run_dir=str(run_dir)),
        rank=0,
        world_size=2,
        device_name="cpu",
        parameters=3_300_000,
        flops_per_token=2e7,
        peak_flops=None,
        tokens_per_step=8192,
        start_step=start_step,
        resumed=start_step > 0,
    )
