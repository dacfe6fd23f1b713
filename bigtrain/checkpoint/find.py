"""Finding checkpoints. Nothing here needs torch: the command line asks too.

A checkpoint is whole or it is not there: `store` renames it into place last, and there is no `latest` pointer to go
stale. What is found here has a sound manifest and files of the right size; hashes are checked before a file is used.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigtrain.checkpoint.integrity import MANIFEST, listed, misfits, read_manifest
from bigtrain.errors import BigtrainError, ConfigError

__all__ = ["FOLDER", "MANIFEST", "Checkpoint", "Keep", "checkpoints", "newest", "resolve_resume"]

FOLDER = "checkpoints"
HIDDEN = ".staging-"  # what begins so is no checkpoint, and goes when the next save begins
_NAME = re.compile(r"step-\d+")


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int  # optimizer steps done
    manifest: dict[str, Any]

    @property
    def bytes(self) -> int:
        return sum(file["bytes"] for file in self.manifest["files"].values())

    @property
    def metric(self) -> float | None:
        """The held-out objective that was seen at its very step; lower is better."""
        found: float | None = (self.manifest.get("metric") or {}).get("value")
        return found

    @property
    def judged_on(self) -> tuple[Any, ...]:
        """What `metric` is of: metrics of two checkpoints can be compared where it is the same."""
        metric = self.manifest.get("metric") or {}
        data = (self.manifest.get("fingerprints") or {}).get("corpus")
        return metric.get("name"), metric.get("share", 1.0), data


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay."""

    newest: int = 2
    every: int = 0  # steps: those at a multiple of it stay for good; 0: none
    best: bool = False  # and the one with the lowest metric, of those on the data that the newest was judged on

    def reasons(self, found: list[Checkpoint]) -> dict[Path, str]:
        """{path: why it stays} of `found`, oldest first; what is not named may go."""
        judged = [one for one in found if one.metric is not None]
        comparable = [one for one in judged if one.judged_on == judged[-1].judged_on]
        best = min(comparable, key=lambda one: one.metric or 0.0, default=None)
        reasons = {}
        for index, one in enumerate(found):
            why = [f"newest {self.newest}"] if index >= len(found) - self.newest else []
            if self.every and one.step % self.every == 0:
                why.append(f"every {self.every}")
            if self.best and one is best:
                why.append("best")
            if why:
                reasons[one.path] = ", ".join(why)
        return reasons


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is, or by its name should be, one: then nothing in it is read unchecked."""
    return (path / MANIFEST).is_file() or _NAME.fullmatch(path.name) is not None


def directories(run_dir: Path) -> list[Path]:
    """Every step-N of the run, oldest first, whole or damaged; not what was set aside."""
    found = [path for path in (run_dir / FOLDER).glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def hide_and_remove(path: Path) -> None:
    """Remove a checkpoint so that a crash half-way leaves no step-N with files missing. Raises OSError."""
    hidden = path.with_name(f"{HIDDEN}removed-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint to step-N.bad, where nothing takes it for one. Its new path."""
    number, aside = 1, path.with_name(f"{path.name}.bad")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.bad{number}")
    path.rename(aside)
    return aside


def checkpoints(run_dir: Path) -> list[Checkpoint]:
    """The run's complete checkpoints, oldest first. One whose files are missing or of the wrong size is left out."""
    found = (read(path) for path in directories(run_dir))
    return [checkpoint for checkpoint in found if isinstance(checkpoint, Checkpoint)]


def read(path: Path) -> Checkpoint | str:
    """The checkpoint in `path`, or what is wrong with it as far as that shows without reading its files."""
    try:
        manifest = read_manifest(path)
        problems = misfits(path, manifest)
        return listed(problems) if problems else Checkpoint(path, int(manifest["step"]), manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return str(error)


def newest(run_dir: Path) -> Path | None:
    """The directory of the newest checkpoint, or None if there is none.

    Raises BigtrainError if it is damaged: an older model must not silently take its place.
    """
    found = directories(run_dir)
    if not found:
        return None
    checkpoint = read(found[-1])
    if isinstance(checkpoint, str):
        raise refused(found[-1], checkpoint)
    return checkpoint.path


def refused(path: Path, problem: str) -> BigtrainError:
    """The error for a checkpoint that somebody wants to read and that is not as it was saved."""
    return BigtrainError(
        f"{path}: damaged ({problem}); to use the one before it:"
        f" bigtrain checkpoint verify {path.parent.parent} --set-aside"
    )


def candidates(run_dir: Path, resume: str) -> list[Path]:
    """What `resume` (auto | required | never | a run or checkpoint directory) may continue from, newest first.

    Raises ConfigError where one is asked for and there is none, and where all that there were have been set aside.
    """
    if resume == "never":
        return []
    if resume not in ("auto", "required"):
        path = Path(resume)
        found = [path] if path.is_dir() and is_checkpoint(path) else directories(path)[::-1]
        if not found:
            raise ConfigError("resume", resume, "no complete checkpoint there", "name a run or one of its checkpoints")
        return found
    found = directories(run_dir)[::-1]
    aside = sorted(path.name for path in (run_dir / FOLDER).glob("step-*.bad*"))
    if not found and aside:
        raise all_damaged(run_dir, resume, aside)
    if not found and resume == "required":
        raise ConfigError("resume", resume, f"no complete checkpoint in {run_dir / FOLDER}", "take resume=auto")
    return found


def all_damaged(run_dir: Path, resume: str, names: list[str]) -> ConfigError:
    """Never a silent start from scratch."""
    return ConfigError(
        "resume", resume, f"every checkpoint in {run_dir / FOLDER} is damaged ({', '.join(names)})",
        "put one back from a backup, or start anew in another run_dir",
    )  # fmt: skip


def resolve_resume(run_dir: Path, resume: str) -> Checkpoint | None:
    """The checkpoint that `resume` asks to continue from, or None: as far as it shows without reading its files.

    Raises ConfigError where one is asked for and there is none that is whole, or none of several is.
    """
    found = candidates(run_dir, resume)
    for path in found:
        checkpoint = read(path)
        if isinstance(checkpoint, Checkpoint):
            return checkpoint
    if found and resume in ("auto", "required"):
        raise all_damaged(run_dir, resume, [path.name for path in found])
    if found:
        problem = f"no complete checkpoint there ({found[0].name}: {read(found[0])})"
        raise ConfigError("resume", resume, problem, "name a run or one of its checkpoints")
    return None
