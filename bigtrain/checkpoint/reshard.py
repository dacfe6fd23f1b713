"""Resume at any number of ranks and any ZeRO stage: hand each rank exactly its part of what others saved.

DeepSpeed's own files stay the only copy of masters and optimizer states, so that saving costs nothing more and
resuming the way a run was saved stays the library's own path. What we add is a small map beside them (shards.Layout:
which range of which parameter lies where), and when the engine is cut in another way, each rank copies from the files
of the old ranks, mapped and not read whole, the ranges that are its own. DeepSpeed's universal checkpoint would write
everything a second time, and goes neither from stage 2 to 3 nor to stage 0.

Masters and moments are copied bit for bit, in their own type, and working weights are made from the masters as a step
makes them. What each rank draws at random (dropout) begins a new stream, for there is no meaningful split of the old
ones: the continued run is an equally good one, not the same one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigtrain.checkpoint.find import Checkpoint
from bigtrain.engine import shards
from bigtrain.engine.base import Engine
from bigtrain.engine.shards import CLOSED_FORMS, CUT_FORMS, Flat, Layout, Piece, SavedFlat, SavedShard
from bigtrain.errors import BigtrainError

ENGINE = "engine"  # the checkpoint's subdirectory of the engine's own files


def needed(checkpoint: Checkpoint, engine: Engine) -> bool:
    """Whether the engine is cut in another way than the one that saved `checkpoint`: the same answer on every rank.

    Raises BigtrainError where a checkpoint without a layout was saved by another number of ranks.
    """
    first = shards.read_layout(checkpoint.path / ENGINE, 0)
    ranks = checkpoint.manifest["world_size"]
    if first is None and ranks != engine.world_size:
        raise BigtrainError(
            f"{checkpoint.path}: saved by {ranks} ranks without a layout, this run has {engine.world_size};"
            f" continue with launch.ranks={ranks}"
        )
    if first is None or ranks != engine.world_size:
        return first is not None
    whole = first.form not in CUT_FORMS
    saved = first if whole else shards.read_layout(checkpoint.path / ENGINE, engine.rank)
    return saved is None or not saved.same_cut(shards.layout(engine))


@torch.no_grad()
def load(checkpoint: Checkpoint, engine: Engine) -> None:
    """Masters, optimizer states, working weights, counters, loss scale; random state anew. All ranks together.

    Raises BigtrainError on every rank alike where model or optimizer are others, or hold what cannot be cut anew.
    """
    saved = _Saved(checkpoint)
    _check(saved, shards.layout(engine), checkpoint.path)
    for flat in shards.flats(engine):
        _load_flat(saved, engine, flat)
    for view in shards.frozen(engine):
        saved.copy_frozen(view.name, view.start, view.weights)
    shards.refresh(engine)
    shards.set_counters(engine, {"global_steps": checkpoint.step} | saved.first.counters)
    if saved.first.precision == "fp16":
        shards.set_loss_scale(engine, saved.first.loss_scale)
    seed_anew(checkpoint.step, engine.rank, engine.world_size)


def seed_anew(step: int, rank: int, world_size: int) -> None:
    """Begin a stream of random numbers that is a function of the run's seed (the last one set), step, rank and number
    of ranks."""
    text = f"{torch.initial_seed()} {step} {rank} {world_size}"
    torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1)


def _check(saved: _Saved, now: Layout, path: Path) -> None:
    """Raises BigtrainError where nothing fits. All ranks see the same and agree."""
    then = saved.first
    same = f"continue as it was saved ({then.world_size} ranks, {then.form})"
    for layout, where in ((then, "saved under"), (now, "to be loaded under")):
        if layout.form in CLOSED_FORMS:
            raise BigtrainError(f"{path}: {where} {layout.form}, whose states cannot be cut anew; {same}")
    if then.shapes != now.shapes:
        name = next(name for name in {**then.shapes, **now.shapes} if then.shapes.get(name) != now.shapes.get(name))
        raise BigtrainError(
            f"{path}: parameter {name} is {_shape(then, name)} there, {_shape(now, name)} in this model;"
            " is model=... the same?"
        )
    missing = {name for flat in now.flats for name in flat.names} - set(saved.pieces)
    if missing:
        raise BigtrainError(f"{path}: {min(missing)} was not trained there; are train.freeze and train.lora the same?")
    if _kind(then.optimizer) != _kind(now.optimizer):
        raise BigtrainError(
            f"{path}: its optimizer states are of {then.optimizer}, this run steps with {now.optimizer};"
            " is optimizer=... the same?"
        )


def _shape(layout: Layout, name: str) -> str:
    return str(tuple(layout.shapes[name])) if name in layout.shapes else "missing"


def _kind(optimizer: str) -> str:
    """DeepSpeed's versions of an optimizer for host and device have the same states as torch's."""
    return {"DeepSpeedCPUAdam": "AdamW", "FusedAdam": "AdamW", "DeepSpeedCPULion": "Lion", "FusedLion": "Lion"}.get(
        optimizer, optimizer
    )


# ------------------------------------------------------------------------------------------------------- saved


@dataclass(frozen=True)
class _Source:
    """Where a range of a parameter lies among the old ranks' files."""

    shard: SavedShard
    flat: SavedFlat
    piece: Piece

    @property
    def stop(self) -> int:
        return self.piece.start + self.piece.numel


class _Saved:
    """The old ranks' files as one: any range of any parameter."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.path / ENGINE
        first = shards.read_layout(self.path, 0)
        if first is None:
            raise BigtrainError(f"{self.path}: holds no layout")
        self.first = first
        layouts = [first]
        if first.form in CUT_FORMS:  # else what rank 0 has is all there is
            layouts += [self._layout(rank) for rank in range(1, first.world_size)]
        self.pieces: dict[str, list[_Source]] = {}
        self._frozen: dict[str, list[tuple[SavedShard, Piece]]] = {}
        for layout in layouts:
            shard = SavedShard(self.path, layout)
            for flat in layout.flats:
                for piece in flat.pieces:
                    self.pieces.setdefault(piece.name, []).append(_Source(shard, flat, piece))
            for piece in layout.frozen:
                self._frozen.setdefault(piece.name, []).append((shard, piece))

    def _layout(self, rank: int) -> Layout:
        found = shards.read_layout(self.path, rank)
        if found is None:
            raise BigtrainError(f"{self.path}: the layout of rank {rank} is missing")
        return found

    def copy_master(self, name: str, start: int, out: Tensor) -> None:
        """Fill `out` with the master of a parameter from `start` on."""
        for source, here, there in self._overlaps(name, start, out.numel()):
            out[here].copy_(source.shard.master(source.flat)[_shifted(there, source.piece.offset)])

    def copy_state(self, name: str, key: str, start: int, out: Tensor) -> None:
        """The same of an optimizer state; where there is none (nothing has ever had a gradient), `out` stays."""
        for source, here, there in self._overlaps(name, start, out.numel()):
            value = source.shard.state(source.flat).get(key)
            if value is None:
                continue
            offset = source.piece.offset
            if value.numel() != source.shard.master(source.flat).numel():  # whole parameters, end to end
                (whole,) = (piece for piece in source.flat.gathered if piece.name == name)
                offset = whole.offset + source.piece.start
            values = value.detach().reshape(-1)[_shifted(there, offset)]
            out[here].copy_(values)

    def copy_frozen(self, name: str, start: int, out: Tensor) -> None:
        """From where it was frozen, or else from the masters."""
        if name not in self._frozen:
            self.copy_master(name, start, out)
            return
        for shard, piece in self._frozen[name]:
            low, high = max(start, piece.start), min(start + out.numel(), piece.start + piece.numel)
            if low < high:
                out[low - start : high - start].copy_(shard.frozen(name)[low - piece.start : high - piece.start])

    def states(self, flat: Flat) -> list[dict[str, Any]]:
        """Of the optimizer, for all that holds a part of `flat`; if that is but padding, for something in its group."""
        used = [source for piece in flat.pieces for source, *_ in self._overlaps(piece.name, piece.start, piece.numel)]
        used = used or self.pieces[flat.names[0]][:1]
        distinct = {(source.shard.layout.rank, source.flat.index): source for source in used}
        return [source.shard.state(source.flat) for source in distinct.values()]

    def sources(self, name: str) -> list[_Source]:
        return self.pieces[name]

    def _overlaps(self, name: str, start: int, numel: int) -> Iterator[tuple[_Source, slice, slice]]:
        """(source, where in the wanted range, where in the source's piece), which together cover the range."""
        covered = 0
        for source in self.pieces[name]:
            low, high = max(start, source.piece.start), min(start + numel, source.stop)
            if low < high:
                covered += high - low
                begin = source.piece.start
                yield source, slice(low - start, high - start), slice(low - begin, high - begin)
        if covered != numel:
            raise BigtrainError(f"{self.path}: {name} has {covered} of {numel} elements from {start} on")


def _shifted(part: slice, offset: int) -> slice:
    return slice(part.start + offset, part.stop + offset)


# -------------------------------------------------------------------------------------------------------- load


def _load_flat(saved: _Saved, engine: Engine, flat: Flat) -> None:
    """One tensor that this rank steps: its master, and what the optimizer keeps for it."""
    for name, start, numel, offset in flat.pieces:
        saved.copy_master(name, start, flat.master[offset : offset + numel])
    optimizer = shards.base_optimizer(engine)
    states = saved.states(flat)
    before = shards.state_of(engine, flat)
    optimizer.state.pop(flat.key, None)
    after: dict[str, Any] = {}
    for key in dict.fromkeys(key for state in states for key in state):
        values = [state[key] for state in states if key in state]
        if all(_is_scalar(value) for value in values):
            after[key] = _scalar(key, values, optimizer, flat)
        elif any(type(value) is not Tensor for value in values):
            after[key] = _whole(saved, key, flat)
        else:
            after[key] = _state_tensor(saved, key, values[0].dtype, before.get(key), flat)
    if after:
        optimizer.state[flat.key] = after


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, Tensor) or value.dim() == 0


def _scalar(key: str, values: list[Any], optimizer: torch.optim.Optimizer, flat: Flat) -> Any:
    """Step counts: the same for all that are stepped together, in the form that this optimizer keeps them in."""
    numbers = {float(value) for value in values if isinstance(value, (Tensor, int, float))}
    if len(numbers) > 1:
        raise BigtrainError(
            f"{flat.names[0]} and {len(flat.names) - 1} more are stepped together here, but {key} differs among them"
            f" ({', '.join(f'{number:g}' for number in sorted(numbers))}); continue at the ZeRO stage it was saved at"
        )
    first = values[0]
    if isinstance(first, (int, float)) and isinstance(optimizer, torch.optim.AdamW):
        first = torch.tensor(float(first))
    if isinstance(first, Tensor) and type(optimizer).__name__.startswith("DeepSpeedCPU"):
        return int(first)
    return first.detach().clone().to(flat.key.device) if isinstance(first, Tensor) else first


def _state_tensor(saved: _Saved, key: str, dtype: torch.dtype, before: Tensor | None, flat: Flat) -> Tensor:
    """A state with one element for each of the master, or (Muon's momentum) for each of its parameters whole."""
    if key in shards.GATHERED and flat.gathered:
        pieces, shape = flat.gathered, torch.Size([sum(piece.numel for piece in flat.gathered)])
    else:
        pieces, shape = flat.pieces, flat.key.shape
    out = torch.zeros(shape, dtype=dtype, device=flat.key.device)
    flattened = out.view(-1)
    for name, start, numel, offset in pieces:
        saved.copy_state(name, key, start, flattened[offset : offset + numel])
    if isinstance(before, Tensor) and before.shape == shape and before.dtype == dtype:
        return before.copy_(out)  # the engine may hold on to it
    return out


def _whole(saved: _Saved, key: str, flat: Flat) -> Any:
    """A state that has no elements of its own to copy (8-bit moments, in blocks): it moves as it is or not at all."""
    if len(flat.pieces) == 1:
        (source, *others) = saved.sources(flat.pieces[0].name)
        whole = len(source.flat.pieces) == 1 and source.piece == flat.pieces[0]
        if whole and not others and source.flat.names == flat.names:
            value = source.shard.state(source.flat)[key]
            names, context = value.__tensor_flatten__()  # torch's protocol of tensors made of tensors: cannot be cloned
            parts = {name: getattr(value, name).detach().clone().to(flat.key.device) for name in names}
            return type(value).__tensor_unflatten__(parts, context, value.size(), value.stride())
    raise BigtrainError(
        f"the optimizer's {key} is quantised in blocks, which cannot be cut anew without changing it;"
        " continue with the ranks, engine and precision it was saved with"
    )
