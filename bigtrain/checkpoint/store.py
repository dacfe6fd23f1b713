"""Saving and loading checkpoints.

A checkpoint is staged in a hidden directory and renamed to step-N when every rank says that its files are written,
hashed and on the disk, and the manifest that names them all is too: what is called step-N is whole.

A save has two halves. `Saver.begin` copies the state to host memory and leaves writing it to a thread of each rank.
`Saver.finish`, at a later step boundary, agrees and publishes. All communication is in these two, on the main thread,
at boundaries that all ranks agree on: the thread only writes files. A crash in between leaves the older checkpoint.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bigtrain import __version__, encryption
from bigtrain.checkpoint import find, integrity, reshard
from bigtrain.checkpoint.find import FOLDER, HIDDEN, Checkpoint, Keep, checkpoints, hide_and_remove
from bigtrain.checkpoint.weights import write_weights
from bigtrain.config import EncryptionConfig
from bigtrain.engine.base import Engine, Write
from bigtrain.engine.host import HostGroup
from bigtrain.engine.snapshot import fits
from bigtrain.errors import BigtrainError
from bigtrain.files import fsync
from bigtrain.models.lora import merged
from bigtrain.transform import Transform, path_in
from bigtrain.transform import load as load_transforms

Files = dict[str, integrity.File]
BYTES_PER_PARAMETER = 20  # at most: master weights and two moments in fp32, working weights twice in 32 bits


@dataclass(frozen=True)
class Saved:
    """What became of one save, the same on every rank."""

    step: int
    path: Path
    problem: str | None  # why there is no checkpoint, if so
    stall_seconds: float  # that this rank did not train for its sake
    write_seconds: float  # that writing and hashing took this rank, in whichever thread


@dataclass
class _Pending:
    step: int
    staging: Path
    final: Path
    facts: dict[str, Any]
    stall_seconds: float
    problem: str | None  # of this rank, before anything was left to the thread
    written: Future[tuple[Files, float]] | None


class Saver:
    """Saves on all ranks together. Each calls the same methods in the same order.

    `later`: files are written while training goes on; without, `begin` returns when they are. `encrypted`: with whose
    key, if it names one.
    """

    def __init__(
        self, run_dir: Path, engine: Engine, host: HostGroup, keep: Keep, later: bool = False,
        encrypted: EncryptionConfig | None = None, transforms: Sequence[Transform] = (),
    ) -> None:  # fmt: skip
        self.transforms = transforms
        self.encrypted = encrypted if encrypted is not None and encryption.enabled(encrypted) else None
        self.run_dir, self.engine, self.host, self.keep, self.later = run_dir, engine, host, keep, later
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: _Pending | None = None
        self._removal: Future[None] | None = None

    @property
    def pending(self) -> bool:
        """Whether a save has begun that is not finished."""
        return self._pending is not None

    def written(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._pending is None or self._pending.written is None or self._pending.written.done()

    def begin(self, step: int, facts: dict[str, Any]) -> None:
        """Take the state as it is now. `facts` (JSON-able, rank 0's) go into the manifest. Wants no save pending."""
        assert self._pending is None, "the save before this one is not finished"
        started = time.perf_counter()
        folder = self.run_dir / FOLDER
        final, staging = folder / f"step-{step:08d}", folder / f"{HIDDEN}{step:08d}"
        problem: str | None = None
        if self._removal is not None:
            self._removal.result()
        if self.host.rank == 0:
            problem = _attempt(lambda: self._make_room(staging))
        problem = self.host.broadcast(problem)
        writes: list[Write] = []
        if problem is None:
            problem = _attempt(lambda: writes.extend(self.engine.save(staging, self.later)))
            problem = _attempt(lambda: writes.append(_random_state(staging, self.host.rank))) or problem
            for transform in self.transforms:
                problem = _attempt(lambda: writes.extend(_state(staging, transform, self.host))) or problem  # noqa: B023
            problem = self._save_weights(staging, writes) or problem
        # What is on the disk by now is shared out for hashing. No thread starts before rank 0 has listed it.
        self.host.gather(None)
        there = self.host.broadcast(integrity.below(staging) if self.host.rank == 0 and staging.is_dir() else [])
        mine = there[self.host.rank :: self.host.world_size]
        written = None
        if problem is None:
            written = self._thread.submit(_write, staging, writes, mine, self.encrypted, self.host.rank == 0)
            if not self.later:
                _settle(written)
        stall = time.perf_counter() - started
        self._pending = _Pending(step, staging, final, facts, stall, problem, written)

    def finish(self) -> Saved:
        """Wait until every rank has written, then publish the checkpoint, or if one could not, leave what was there."""
        started, pending = time.perf_counter(), self._pending
        assert pending is not None
        files: Files = {}
        seconds, problem = 0.0, pending.problem
        if pending.written is not None:
            problem = _settle(pending.written)
            if problem is None:
                files, seconds = pending.written.result()
        parts = self.host.gather((problem, files))
        failed = next(((rank, text) for rank, (text, _) in enumerate(parts) if text), None)
        if failed is None:
            facts = {"step": pending.step, "world_size": self.host.world_size, "bigtrain": __version__} | pending.facts
            everything = {name: file for _, found in parts for name, file in found.items()}
            if self.host.rank == 0:
                problem = _attempt(lambda: _publish(pending.staging, pending.final, facts, everything))
            text = self.host.broadcast(problem)
            failed = (0, text) if text else None
        if self.host.rank == 0:
            if failed is not None:
                shutil.rmtree(pending.staging, ignore_errors=True)
            else:
                self._removal = self._thread.submit(_remove, self.run_dir, self.keep)
        self._pending = None
        why = f"checkpoint of step {pending.step} was not written: rank {failed[0]}: {failed[1]}" if failed else None
        stall = pending.stall_seconds + time.perf_counter() - started
        return Saved(pending.step, pending.final, why, stall, seconds)

    def close(self) -> None:
        """Wait for what the thread still does: removing old checkpoints."""
        self._thread.shutdown()

    def _make_room(self, staging: Path) -> None:
        staging.parent.mkdir(parents=True, exist_ok=True)
        for stale in staging.parent.glob(f"{HIDDEN}*"):  # of a run that was killed while saving
            shutil.rmtree(stale)
        found = checkpoints(self.run_dir)
        needed = found[-1].bytes if found else BYTES_PER_PARAMETER * _parameters(self.engine)
        free = shutil.disk_usage(staging.parent).free
        if free < needed:
            raise BigtrainError(
                f"no space: {free / 2**20:,.0f} MiB free in {staging.parent}, about {needed / 2**20:,.0f} needed"
            )
        staging.mkdir()

    def _save_weights(self, staging: Path, writes: list[Write]) -> str | None:
        """Consolidated weights, from rank 0. Every rank must run through `engine.weights()` to its end, even if rank 0
        can no longer write."""
        stream: Iterator[tuple[str, Tensor]] = merged(self.engine.weights(), self.engine.model)
        problem = None
        if self.host.rank == 0:
            if self.later and fits(4 * _parameters(self.engine)):
                held: list[tuple[str, Tensor]] = []
                problem = _attempt(lambda: held.extend(stream))
                writes.append(lambda: write_weights(staging, held))
            else:
                problem = _attempt(lambda: write_weights(staging, stream))
        for _ in stream:
            pass
        return problem


def save(run_dir: Path, step: int, engine: Engine, host: HostGroup, state: dict[str, Any], keep: int | Keep) -> Path:
    """Save on all ranks together and wait for it. `state` (JSON-able, rank 0's) goes into the manifest.

    Raises BigtrainError on every rank if any could not write its part; what was there before stays.
    """
    saver = Saver(run_dir, engine, host, keep if isinstance(keep, Keep) else Keep(keep))
    saver.begin(step, state)
    saved = saver.finish()
    saver.close()
    if saved.problem:
        raise BigtrainError(saved.problem)
    return saved.path


def choose(run_dir: Path, resume: str, host: HostGroup) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that `resume` may continue from whose every byte is as it was saved, and what to say of
    those that are not. All ranks together: each reads its share of the files, before anything is loaded.

    A damaged one in `run_dir` is renamed to step-N.bad. Raises BigtrainError, on every rank, if none is left of some.
    """
    paths: list[Path] = []
    error: str | None = None
    if host.rank == 0:
        error = _attempt(lambda: paths.extend(find.candidates(run_dir, resume)))
    paths, error = host.broadcast((paths, error))
    if error:
        raise BigtrainError(error)
    said: list[str] = []
    for path in paths:
        checkpoint = host.broadcast(find.read(path) if host.rank == 0 else None)
        if isinstance(checkpoint, Checkpoint):
            share = sorted(checkpoint.manifest["files"])[host.rank :: host.world_size]
            problems = [found for found in host.gather(integrity.damaged(path, share)) if found]
            if not problems:
                return checkpoint, said
            problem = integrity.listed(problems[0])
        else:
            problem = checkpoint
        where = path
        if path.parent == run_dir / FOLDER:
            where = host.broadcast(_set_aside(path) if host.rank == 0 else None)
        said.append(f"{path.name} is damaged ({problem}) and not used; it is kept as {where}")
    if paths:
        refusal = find.all_damaged(run_dir, resume, said) if resume in ("auto", "required") else None
        raise BigtrainError(str(refusal or f"resume={resume}: {'; '.join(said)}"))
    return None, said


def load(checkpoint: Checkpoint, engine: Engine, transforms: Sequence[Transform] = ()) -> None:
    """Put the state of engine and transforms and this rank's random state back, whatever the number of ranks and the
    ZeRO stage were.

    Raises BigtrainError where the engine's state cannot be cut anew, or that of a transform is missing.
    """
    with encryption.readable(checkpoint.path) as path:
        load_transforms(transforms, path, checkpoint.path)
        opened = replace(checkpoint, path=path)
        if reshard.needed(opened, engine):
            reshard.load(opened, engine)
            return
        engine.load(path)
        state = torch.load(path / _random_name(engine.rank), weights_only=True)
    torch.set_rng_state(state["cpu"])
    if engine.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], engine.device)


def _attempt(action: Callable[[], Any]) -> str | None:
    """Run it; the problem as one line if it raises. Peers wait at the next agreement, so nothing may escape."""
    try:
        action()
    except BigtrainError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _settle(future: Future[Any]) -> str | None:
    return _attempt(future.result)


def _write(
    staging: Path, writes: list[Write], mine: list[str], encrypted: EncryptionConfig | None, notes: bool
) -> tuple[Files, float]:
    """In the thread: write, encrypt if so, then hash and flush this rank's files. `notes`: say how to open them."""
    started = time.perf_counter()
    names = list(mine)
    while writes:
        write = writes.pop(0)
        names += [str(path.relative_to(staging)) for path in write()]
        del write  # and with it the copy of the state
    if encrypted is not None:
        key = encryption.read_key(encrypted)
        names = [str(encryption.encrypt_file(staging / name, key, name).relative_to(staging)) for name in names]
        if notes:
            names.append(encryption.write_note(staging, encrypted, key).name)
    return integrity.describe(staging, names), time.perf_counter() - started


def _random_name(rank: int) -> str:
    return f"random-{rank:05d}.pt"


def _random_state(staging: Path, rank: int) -> Write:
    """This rank's random state as it is now."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    path = staging / _random_name(rank)

    def write() -> list[Path]:
        torch.save(state, path)
        return [path]

    return write


def _state(staging: Path, transform: Transform, host: HostGroup) -> list[Write]:
    """A transform's state as it is now; all ranks take part in it, rank 0 writes."""
    state = transform.state()
    path = path_in(staging, transform)

    def write() -> list[Path]:
        path.parent.mkdir(exist_ok=True)
        save_file(state, path)
        return [path]

    return [write] if state and host.rank == 0 else []


def _parameters(engine: Engine) -> int:
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.model.parameters())


def _publish(staging: Path, final: Path, facts: dict[str, Any], files: Files) -> None:
    found = set(integrity.below(staging))
    if found != files.keys():  # of a disk that does not show every rank the same directory
        raise BigtrainError(f"{len(found)} files in {staging}, the ranks wrote {len(files)}: is run_dir shared by all?")
    integrity.seal(staging, facts, files)
    if final.exists():  # of an interrupted run that reached this step before
        hide_and_remove(final)
    staging.rename(final)
    fsync(final.parent)


def _remove(run_dir: Path, keep: Keep) -> None:
    """In the thread: what nothing wants kept. Old ones that stay for longer are a nuisance, not an error."""
    found = checkpoints(run_dir)
    kept = keep.reasons(found)
    for old in found:
        if old.path not in kept:
            with contextlib.suppress(OSError):
                hide_and_remove(old.path)


def _set_aside(path: Path) -> Path:
    try:
        return find.set_aside(path)
    except OSError:
        return path  # of a read-only disk: it stays, and is passed over
