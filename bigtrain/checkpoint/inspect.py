"""`bigtrain checkpoint list|verify|prune`: what a run has on the disk, for people. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bigtrain import config as configuration
from bigtrain.checkpoint import find
from bigtrain.checkpoint.find import Keep
from bigtrain.checkpoint.integrity import damaged, listed
from bigtrain.errors import ConfigError

_TITLES = ("step", "saved", "MiB", "ranks", "engine", "metric", "kept as")


def table(run: Path) -> str:
    """One line for each checkpoint, oldest first; of a damaged one as much as shows without reading its files."""
    kept = _keep(run).reasons(find.checkpoints(run))
    rows: list[tuple[str, ...]] = [_TITLES]
    broken = []
    for path in _directories(run):
        found = find.read(path)
        if isinstance(found, str):
            broken.append(f"{path.name} is damaged: {found}")
            continue
        manifest = found.manifest
        stage = f"ZeRO-{manifest['stage']}" if manifest.get("stage") is not None else manifest.get("engine", "")
        metric = f"{manifest['metric']['name']} {found.metric:.4g}" if found.metric is not None else ""
        saved = str(manifest.get("time", ""))[:19].replace("T", " ")
        size, ranks = f"{found.bytes / 2**20:.1f}", str(manifest["world_size"])
        rows.append((str(found.step), saved, size, ranks, stage, metric, kept.get(path, "")))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_TITLES))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines + broken)


def verify(run: Path, set_aside: bool, say: Callable[[str], None]) -> bool:
    """Read every byte; whether all checkpoints are as they were saved. `set_aside`: rename those that are not."""
    good = True
    for path in _directories(run):
        problems = damaged(path)
        if not problems:
            say(f"{path.name}: good")
            continue
        good = False
        aside = f"; kept as {find.set_aside(path).name}" if set_aside else ""
        say(f"{path.name}: damaged ({listed(problems, shown=len(problems))}){aside}")
    return good


def prune(run: Path, newest: int | None, dry_run: bool, say: Callable[[str], None]) -> None:
    """Remove what the run's config does not keep, or with `newest` what that many of the newest do not include.

    Damaged ones stay. Raises OSError where the disk refuses.
    """
    keep = _keep(run)
    found = find.checkpoints(run)
    kept = (keep if newest is None else replace(keep, newest=newest)).reasons(found)
    going = [one for one in found if one.path not in kept]
    for one in going:
        if not dry_run:
            find.hide_and_remove(one.path)
        say(f"{'would remove' if dry_run else 'removed'} {one.path.name} ({one.bytes / 2**20:.1f} MiB)")
    if not going:
        say(f"nothing to remove: {len(found)} checkpoints are kept")


def _directories(run: Path) -> list[Path]:
    found = find.directories(run)
    if not found:
        raise ConfigError("RUN", str(run), "holds no checkpoint", "train until the first one is saved")
    return found


def _keep(run: Path) -> Keep:
    train = configuration.load(run / "config.yaml").train
    return Keep(train.keep_checkpoints, train.keep_every, train.keep_best)
