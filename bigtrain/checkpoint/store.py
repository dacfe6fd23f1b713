"""Saving and loading checkpoints.

A checkpoint is staged in a hidden directory, described by manifest.json last, and renamed into place only when
every rank says that its part is written: what is named step-N is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtrain import __version__
from bigtrain.checkpoint import encryption
from bigtrain.checkpoint.find import FOLDER, MANIFEST, Checkpoint, checkpoints
from bigtrain.checkpoint.weights import write_weights
from bigtrain.config import EncryptionConfig
from bigtrain.engine.base import Engine
from bigtrain.engine.host import HostGroup
from bigtrain.errors import BigtrainError
from bigtrain.files import fsync
from bigtrain.models.lora import merged


def save(
    run_dir: Path,
    step: int,
    engine: Engine,
    host: HostGroup,
    state: dict[str, Any],
    keep: int,
    encrypted: EncryptionConfig | None = None,
) -> Path:
    """Save on all ranks together and keep the newest `keep`. `state` (JSON-able, rank 0's) goes into the manifest.

    Raises BigtrainError on every rank if any could not write its part; what was there before stays.
    """
    folder = run_dir / FOLDER
    final, staging = folder / f"step-{step:08d}", folder / f".staging-{step:08d}"
    problem: str | None = None
    if host.rank == 0:
        problem = _attempt(lambda: _make_empty(staging))
    if host.broadcast(problem) is None:
        problem = _attempt(lambda: engine.save(staging))
        problem = _attempt(lambda: _save_rng(staging, host.rank)) or problem
        problem = _write_weights(staging, engine, host.rank) or problem
    problems = [(rank, text) for rank, text in enumerate(host.gather(problem)) if text]
    if not problems and host.rank == 0:
        manifest = {"format": 1, "step": step, "world_size": host.world_size, "bigtrain": __version__} | state
        problem = _attempt(lambda: _encrypt(staging, encrypted))  # after the last file, before they are described
        problem = problem or _attempt(lambda: _publish(staging, final, manifest))
    problems = problems or [(0, text) for text in [host.broadcast(problem)] if text]
    if problems:
        if host.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        rank, text = problems[0]
        raise BigtrainError(f"checkpoint of step {step} was not written: rank {rank}: {text}")
    if host.rank == 0:
        for old in checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old.path, ignore_errors=True)
    return final


def load(checkpoint: Checkpoint, engine: Engine) -> None:
    """Put engine state and this rank's random state back. Raises BigtrainError at another number of ranks."""
    saved = checkpoint.manifest["world_size"]
    if saved != engine.world_size:
        raise BigtrainError(
            f"{checkpoint.path}: saved by {saved} ranks, this run has {engine.world_size};"
            f" continue with launch.ranks={saved}"
        )
    with encryption.readable(checkpoint.path) as path:
        engine.load(path)
        state = torch.load(path / f"random-{engine.rank:05d}.pt", weights_only=True)
    torch.set_rng_state(state["cpu"])
    if engine.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], engine.device)


def _attempt(action: Any) -> str | None:
    """Run it; the problem as one line if it raises. Peers wait at the next agreement, so nothing may escape."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _make_empty(staging: Path) -> None:
    if staging.parent.is_dir():
        for stale in staging.parent.glob(".staging-*"):  # of a run that was killed while saving
            shutil.rmtree(stale)
    staging.mkdir(parents=True)


def _save_rng(staging: Path, rank: int) -> None:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    torch.save(state, staging / f"random-{rank:05d}.pt")


def _write_weights(staging: Path, engine: Engine, rank: int) -> str | None:
    """Every rank must run through `engine.weights()` to its end, even if rank 0 can no longer write."""
    stream: Iterator[tuple[str, Tensor]] = merged(engine.weights(), engine.model)
    problem = _attempt(lambda: write_weights(staging, stream)) if rank == 0 else None
    for _ in stream:
        pass
    return problem


def _encrypt(staging: Path, encrypted: EncryptionConfig | None) -> None:
    if encrypted is not None and encryption.enabled(encrypted):
        encryption.encrypt_directory(staging, encrypted)


def _publish(staging: Path, final: Path, manifest: dict[str, Any]) -> None:
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    for path in files:
        fsync(path)
    sizes = {str(path.relative_to(staging)): path.stat().st_size for path in files}
    (staging / MANIFEST).write_text(json.dumps(manifest | {"files": sizes}, indent=1), encoding="utf-8")
    fsync(staging / MANIFEST)
    fsync(staging)
    if final.exists():  # of an interrupted run that reached this step before
        shutil.rmtree(final)
    staging.rename(final)
    fsync(final.parent)
