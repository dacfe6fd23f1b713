"""Finding checkpoints. Nothing here needs torch: the command line asks too.

A checkpoint is whole or it is not there: `store.save` renames it into place last, and there is no `latest` pointer
to go stale.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.errors import ConfigError

MANIFEST = "manifest.json"
FOLDER = "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int  # optimizer steps done
    manifest: dict[str, Any]


def checkpoints(run_dir: Path) -> list[Checkpoint]:
    """The run's complete checkpoints, oldest first. One whose files are missing or of the wrong size is left out."""
    found = []
    for path in sorted((run_dir / FOLDER).glob("step-*")):
        checkpoint = _read(path)
        if checkpoint is not None:
            found.append(checkpoint)
    return found


def newest(run_dir: Path) -> Path | None:
    """The directory of the newest complete checkpoint, or None."""
    found = checkpoints(run_dir)
    return found[-1].path if found else None


def _read(path: Path) -> Checkpoint | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        whole = all((path / name).stat().st_size == size for name, size in manifest["files"].items())
        return Checkpoint(path, int(manifest["step"]), manifest) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def resolve_resume(run_dir: Path, resume: str) -> Checkpoint | None:
    """The checkpoint that `resume` (auto | required | never | a directory) asks to continue from, or None.

    Raises ConfigError where one is asked for and there is none that is whole.
    """
    if resume == "never":
        return None
    if resume in ("auto", "required"):
        found = checkpoints(run_dir)
        if not found and resume == "required":
            raise ConfigError("resume", resume, f"no complete checkpoint in {run_dir / FOLDER}", "take resume=auto")
        return found[-1] if found else None
    path = Path(resume)
    checkpoint = _read(path)
    if checkpoint is None:
        found = checkpoints(path)
        checkpoint = found[-1] if found else None
    if checkpoint is None:
        raise ConfigError("resume", resume, "no complete checkpoint there", "name a run or one of its checkpoints")
    return checkpoint
