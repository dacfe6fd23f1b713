"""`bigtrain reproduce`: run a past run again, from what its directory says, and hold the two curves together."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bigtrain import checks
from bigtrain import config as schema
from bigtrain.config import Config
from bigtrain.diff import Curves, compare_curves, differences, read_launch
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.launch import Stopped
from bigtrain.launch import train as launch
from bigtrain.launch.run_dir import last_step
from bigtrain.provenance import code_sha256, versions

CURVES = ("train/loss", "train/grad_norm")


def reproduce(
    run: Path, out: Path, steps: int | None, tolerance: float, other_code: bool, say: Callable[[str], None]
) -> None:
    """Train RUN's config again in `out`, deterministically, for its first `steps` steps (all that it has, if None).

    Raises BigtrainError where the curve is not the same within `tolerance` (relative; 0: the same bits), where the
    code is not that of RUN (unless `other_code`), and whatever a run can raise.
    """
    config = schema.load(run / "config.yaml")
    if config.train.privacy.enabled and config.train.privacy.seed is None:
        raise BigtrainError(
            f"{run}: its draws and its noise came from a secret (train.privacy), so that nobody can compute them again;"
            " only a run with train.privacy.seed=NUMBER, which is not private, can be reproduced"
        )
    check_code(run, other_code, say)
    done = last_step(run)
    if not done:
        raise BigtrainError(f"{run}: has no step in its metrics.jsonl; there is nothing to compare with")
    if steps is not None and steps > done:
        raise ConfigError("steps", steps, f"{run} has {done}", f"take at most {done}")
    again = _again(config, out, min(steps or done, done))
    checks.check(again)
    again = launch.prepare_data(again)
    then, now = (Path(part.data.prepared_dir or "").name for part in (config, again))
    if then != now:
        raise BigtrainError(f"{run}: its data has changed: the fingerprint was {then}, it is {now} now")
    try:
        launch.train(again, say, lambda directory: f"bigtrain reproduce {run} --out {directory}")
    except Stopped:
        raise BigtrainError("stopped before the end; nothing was compared") from None
    compared = [compare_curves(run, out, metric) for metric in CURVES]
    for found in compared:
        if found.steps:
            say(str(found))
    _judge(compared, tolerance)
    say(f"reproduced: {out}")


def _again(config: Config, out: Path, steps: int) -> Config:
    """The config of a new run that takes the first `steps` steps of the old one, and asks for the same bits."""
    train = replace(
        config.train, deterministic=True, stop_at=steps if steps < config.train.steps else config.train.stop_at
    )
    # cuBLAS keeps an order of its own only with a workspace of fixed size
    environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} | config.launch.env
    unwatched = replace(config.logger, wandb=replace(config.logger.wandb, enabled=False))
    resume = config.resume if os.path.isabs(config.resume) else "never"
    return replace(
        config,
        run_dir=os.path.abspath(out),
        resume=resume,
        train=train,
        logger=unwatched,
        launch=replace(config.launch, env=environment, master_port=None),
    )


def check_code(run: Path, other_code: bool, say: Callable[[str], None]) -> None:
    """Compare what RUN was made with to what is installed here. Raises BigtrainError if bigtrain is another one."""
    recorded = read_launch(run)
    then, now = recorded.get("code_sha256"), code_sha256()
    if then is None:
        say(f"warning: {run} does not say which code made it")
    elif then != now:
        problem = f"{run}: made by other code (SHA-256 of bigtrain's sources {then[:12]}... then, {now[:12]}... now)"
        if not other_code:
            raise BigtrainError(f"{problem}; check that version out, or compare all the same with --other-code")
        say(f"warning: {problem}")
    for name, (old, new) in differences(recorded.get("versions", {}), versions()).items():
        if name != "bigtrain":
            say(f"warning: {name} was {old}, it is {new} here")


def _judge(compared: list[Curves], tolerance: float) -> None:
    if not any(found.steps for found in compared):
        raise BigtrainError("not reproduced: the two runs have no step in common")
    bad = [found for found in compared if found.steps and found.largest > tolerance]
    if bad:
        raise BigtrainError(f"not reproduced (tolerance {tolerance:g}): {bad[0]}")
