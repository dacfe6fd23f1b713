"""Which part of which parameter lies where: the one module that knows DeepSpeed's private shard layout.

An optimizer steps a few fp32 tensors on each rank, the masters. At ZeRO stage 0, and under Accelerate, each is a whole
parameter; at stages 1 and 2 each is this rank's cut through a whole parameter group laid end to end; at stage 3 it is
this rank's piece (the n-th of ceil(size / ranks) elements) of every parameter of a group, end to end, padded.
`flats` describes them, `shards` gives views of one parameter at a time, `refresh` copies masters to working weights.

`Layout` is the same as plain data: saved beside each rank's own file, it tells any later run, however it is
distributed, where to find what (`checkpoint/reshard.py` does the rest), and nothing is stored twice.
The names used here are those of DeepSpeed 0.19; tests/engine/test_shards.py holds them to what they should mean.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bigtrain.engine import unpickling
from bigtrain.engine.base import Engine
from bigtrain.errors import BigtrainError
from bigtrain.models.stored import StoredTensors

# Where masters and states lie. The first two are cut into shards, the next three whole on every rank.
CUT_GROUPS, CUT_PARAMETERS = "cut_groups", "cut_parameters"  # ZeRO stages 1 and 2; stage 3
WHOLE_MASTERS, WHOLE_PARAMETERS, ACCELERATE = "whole_masters", "whole_parameters", "accelerate"  # stage 0: 16 bit, fp32
CUT_FORMS = (CUT_GROUPS, CUT_PARAMETERS)
CLOSED_FORMS = NVME, FSDP2, OTHER = (
    "nvme offload",
    "fsdp2",
    "an optimizer wrapper that is not known here",
)  # out of reach


class Piece(NamedTuple):
    """A range of a parameter, flattened, and where it begins in the flat tensor that holds it."""

    name: str
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class Flat:
    """One tensor that the optimizer steps on this rank."""

    master: Tensor  # fp32, one-dimensional view
    key: Tensor  # what the optimizer keeps its state under; of the master's storage, perhaps of another shape
    pieces: list[Piece]
    names: list[str]  # all parameters of its group, on whichever rank they lie
    index: int  # among the saved masters
    state_index: int  # in the optimizer's saved state
    gathered: list[Piece] = dataclasses.field(
        default_factory=list
    )  # where a state holds parameters whole: see GATHERED


# Muon's momentum at stages 1 and 2: of every parameter that this rank has a piece of, whole, end to end.
GATHERED = ("momentum_buffer",)


@dataclass(frozen=True)
class ShardView:
    """What this rank holds of one parameter: views, so that writing to them writes to the optimizer's own tensors.

    State tensors that are not laid out like the master (scalars; 8-bit moments; Muon's momentum at stages 1 and 2)
    are left out. Before the first step there are no states.
    """

    name: str
    shape: torch.Size  # of the whole parameter
    start: int  # of this range in the flattened whole parameter
    master: Tensor  # (numel,) fp32
    states: dict[str, Tensor]  # (numel,) each: exp_avg, ...

    @property
    def stop(self) -> int:
        return self.start + self.master.numel()


def shards(engine: Engine) -> Iterator[ShardView]:
    """This rank's part of every trained parameter. Writing a master takes effect with `refresh` or the next step.

    Raises BigtrainError where the masters are not in this process's memory (NVMe offload, FSDP2).
    """
    shapes = {name: shape_of(parameter) for name, parameter in engine.model.named_parameters()}
    for flat in flats(engine):
        aligned = {key: value.view(-1) for key, value in state_of(engine, flat).items() if is_aligned(value, flat)}
        for name, start, numel, offset in flat.pieces:
            part = slice(offset, offset + numel)
            yield ShardView(
                name, shapes[name], start, flat.master[part], {key: value[part] for key, value in aligned.items()}
            )


def is_aligned(value: Any, flat: Flat) -> bool:
    """Whether an optimizer state has one plain element for each of the master."""
    return type(value) is Tensor and value.dim() > 0 and value.shape == flat.key.shape


def flats(engine: Engine) -> list[Flat]:
    """The tensors that the optimizer steps on this rank, in the optimizer's order.

    Raises BigtrainError where they are not in this process's memory (NVMe offload, FSDP2).
    """
    kind = form(engine)
    if kind in CLOSED_FORMS:
        raise BigtrainError(f"masters and optimizer states are out of reach: {kind}")
    with torch.no_grad():
        if kind == CUT_GROUPS:
            return _cut_groups(engine)
        return _cut_parameters(engine) if kind == CUT_PARAMETERS else _whole(engine)


def form(engine: Engine) -> str:
    """How the engine keeps masters: one of the constants above."""
    if not hasattr(engine, "stage"):
        return FSDP2 if engine.sharded else ACCELERATE  # type: ignore[attr-defined]
    optimizer = _zero(engine)
    known = {
        "DeepSpeedZeroOptimizer": CUT_GROUPS,
        "DeepSpeedZeroOptimizer_Stage3": CUT_PARAMETERS,
        "FP16_UnfusedOptimizer": WHOLE_MASTERS,
    }
    found = known.get(type(optimizer).__name__)
    if found == CUT_PARAMETERS and (optimizer.swap_optimizer or optimizer.params_in_nvme_and_cpu):
        return NVME
    if found is None:
        return WHOLE_PARAMETERS if isinstance(optimizer, torch.optim.Optimizer) else OTHER
    return found


def _zero(engine: Engine) -> Any:
    """DeepSpeed's optimizer, around ours."""
    return engine.engine.optimizer  # type: ignore[attr-defined]


def base_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """The optimizer that is stepped, without what wraps it."""
    if hasattr(engine, "stage"):
        optimizer: torch.optim.Optimizer = getattr(_zero(engine), "optimizer", _zero(engine))
        return optimizer
    inner: torch.optim.Optimizer = engine.optimizer.optimizer  # type: ignore[attr-defined]
    return inner


def state_of(engine: Engine, flat: Flat) -> dict[str, Any]:
    """The optimizer's state for `flat`; empty before the first step."""
    state: dict[str, Any] = base_optimizer(engine).state.get(flat.key, {})
    return state


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter: ZeRO-3 leaves an empty tensor in its place."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _names(engine: Engine) -> dict[int, str]:
    return {id(parameter): name for name, parameter in engine.model.named_parameters()}


# ------------------------------------------------------------------------------------------------ live layouts


def _whole(engine: Engine) -> list[Flat]:
    names, kind = _names(engine), form(engine)
    if kind == WHOLE_MASTERS:
        groups = zip(_zero(engine).fp16_groups, _zero(engine).fp32_groups, strict=True)
        pairs = [pair for working, masters in groups for pair in zip(working, masters, strict=True)]
    else:
        pairs = [(tensor, tensor) for group in base_optimizer(engine).param_groups for tensor in group["params"]]
    found = []
    for index, (parameter, master) in enumerate(pairs):
        name = names[id(parameter)]
        pieces = [Piece(name, 0, master.numel(), 0)]
        found.append(Flat(master.detach().view(-1), master, pieces, [name], index, index))
    return found


def _cut_groups(engine: Engine) -> list[Flat]:
    optimizer, names = _zero(engine), _names(engine)
    found = []
    for index, master in enumerate(optimizer.single_partition_of_fp32_groups):
        pieces, gathered, end = [], [], 0
        for parameter in optimizer.round_robin_bit16_groups[index]:  # in the order in which they lie
            mapping = parameter._hp_mapping
            if mapping is None:  # no part of it is here
                continue
            here, there = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
            pieces.append(Piece(names[id(parameter)], there.start, here.numel, here.start))
            if getattr(parameter, "use_muon", False):
                gathered.append(Piece(names[id(parameter)], 0, parameter.numel(), end))
                end += parameter.numel()
        group = [names[id(parameter)] for parameter in optimizer.bit16_groups[index]]
        found.append(Flat(master.detach(), master, pieces, group, index, index, gathered))
    return found


def _cut_parameters(engine: Engine) -> list[Flat]:
    optimizer, names = _zero(engine), _names(engine)
    group_of = optimizer.sub_group_to_group_id
    in_state = sorted(range(len(optimizer.fp16_groups)), key=lambda sub_group: (group_of[sub_group], sub_group))
    found = []
    for index, (parameters, master) in enumerate(
        zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    ):
        pieces, offset = [], 0
        for parameter in parameters:
            start, numel = _own_range(parameter, optimizer)
            if numel:
                pieces.append(Piece(names[id(parameter)], start, numel, offset))
            offset += parameter.partition_numel()
        group = [names[id(parameter)] for parameter in parameters]
        found.append(Flat(master.detach(), master, pieces, group, index, in_state.index(index)))
    return found


def _own_range(parameter: Any, optimizer: Any) -> tuple[int, int]:
    """(start, numel) of this rank's part of a ZeRO-3 parameter, without padding."""
    size = parameter.partition_numel()
    start = optimizer._get_param_partition_rank(parameter) * size
    return start, max(0, min(size, parameter.ds_numel - start))


class FrozenView(NamedTuple):
    """What this rank holds of a parameter that is not trained: working weights, for which there is no master."""

    name: str
    start: int
    weights: Tensor  # (numel,) in compute dtype, a view


def frozen(engine: Engine) -> Iterator[FrozenView]:
    trained = {name for flat in flats(engine) for name in flat.names}
    for name, parameter in engine.model.named_parameters():
        if name in trained:
            continue
        if form(engine) == CUT_PARAMETERS:
            start, numel = _own_range(parameter, _zero(engine))
            if numel:
                yield FrozenView(name, start, parameter.ds_tensor.detach().view(-1)[:numel])  # type: ignore[attr-defined]
        else:
            yield FrozenView(name, 0, parameter.detach().view(-1))


def around_step(engine: Engine, before: Callable[[Flat], None] | None, after: Callable[[Flat], None] | None) -> None:
    """Have `before` and `after` called with each flat whenever the optimizer steps it, from now on.

    `before`: its gradient, `key.grad`, is there, unscaled and clipped. `after`: the master is new, and not yet copied
    to working weights. Neither is called for a step that is left out. DeepSpeed steps its groups (at stage 3 parts of
    them) one after another. Raises BigtrainError where the masters are out of reach.
    """
    of_key = {id(flat.key): flat for flat in flats(engine)}

    def each(function: Callable[[Flat], None]) -> Callable[..., None]:
        def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            with torch.no_grad():
                for group in optimizer.param_groups:
                    for key in group["params"]:
                        function(of_key[id(key)])

        return hook

    # Partial offload: what stays on the device has an optimizer of its own.
    backup = getattr(_zero(engine), "backup_optimizer", None) if hasattr(engine, "stage") else None
    for optimizer in (base_optimizer(engine), backup):
        if optimizer is not None and before is not None:
            optimizer.register_step_pre_hook(each(before))
        if optimizer is not None and after is not None:
            optimizer.register_step_post_hook(each(after))


def total(engine: Engine, part: Tensor) -> Tensor:
    """What each rank has of something that is cut as the masters are, added up: (shape of `part`) on its device.

    Where every rank has the whole, `part` itself.
    """
    if form(engine) not in CUT_FORMS or engine.world_size == 1:
        return part
    summed = part.to(engine.device)
    summed = summed.clone() if summed is part else summed
    torch.distributed.all_reduce(summed)
    return summed.to(part.device)


@torch.no_grad()
def refresh(engine: Engine) -> None:
    """Copy the masters to the working weights, on all ranks together, as a step of the optimizer would."""
    kind = form(engine)
    if kind == WHOLE_MASTERS:
        for working, masters in zip(_zero(engine).fp16_groups, _zero(engine).fp32_groups, strict=True):
            for parameter, master in zip(working, masters, strict=True):
                parameter.data.copy_(master.data)
    elif kind == CUT_GROUPS:
        _zero(engine).update_lp_params()
    elif kind == CUT_PARAMETERS:
        _refresh_cut_parameters(_zero(engine))


def _refresh_cut_parameters(optimizer: Any) -> None:
    for index, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        working = optimizer.fp16_partitioned_groups_flat[index]
        if master.numel():
            working.data.copy_(master.data)
        parts = optimizer.unflatten(working, optimizer.fp16_partitioned_groups[index])
        for part, values in zip(optimizer.fp16_partitioned_groups[index], parts, strict=True):
            part.data = values.data
    if optimizer.persistent_parameters:  # small ones that stay gathered between steps
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
    optimizer.checkpoint_event_epilogue()
    optimizer.empty_partition_cache()  # or copies gathered before would be used


# --------------------------------------------------------------------------------------- counters, loss scale


COUNTERS = ("global_steps", "global_samples", "skipped_steps")
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "last_rescale_iter", "cur_hysteresis")


def _scaler(engine: Engine) -> Any:
    optimizer = _zero(engine) if hasattr(engine, "stage") else None
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)


def counters(engine: Engine) -> dict[str, int]:
    return {name: getattr(engine.engine, name) for name in COUNTERS} if hasattr(engine, "stage") else {}  # type: ignore[attr-defined]


def loss_scale(engine: Engine) -> dict[str, float]:
    scaler = _scaler(engine)
    return {name: getattr(scaler, name) for name in LOSS_SCALE if getattr(scaler, name, None) is not None}


def set_counters(engine: Engine, values: dict[str, int]) -> None:
    for name, value in values.items() if hasattr(engine, "stage") else ():
        setattr(engine.engine, name, value)  # type: ignore[attr-defined]


def set_loss_scale(engine: Engine, values: dict[str, float]) -> None:
    scaler = _scaler(engine)
    for name, value in values.items():
        if getattr(scaler, name, None) is not None:
            setattr(scaler, name, value)


# ---------------------------------------------------------------------------------------------------- on disk


@dataclass(frozen=True)
class SavedFlat:
    pieces: list[Piece]
    names: list[str]
    index: int
    state_index: int
    gathered: list[Piece]


@dataclass(frozen=True)
class Layout:
    """What one rank's engine files hold: plain data, saved beside them as layout-RANK.json."""

    form: str
    world_size: int
    rank: int
    precision: str
    optimizer: str  # its class
    shapes: dict[str, list[int]]  # of every parameter, whole
    flats: list[SavedFlat]
    frozen: list[Piece]  # offset: always 0
    counters: dict[str, int]
    loss_scale: dict[str, float]

    def same_cut(self, other: Layout) -> bool:
        """Whether the library's own loader, which checks little, can read the other's files."""
        facts = ("form", "world_size", "precision", "optimizer", "shapes", "flats", "frozen")
        return all(getattr(self, name) == getattr(other, name) for name in facts)


def layout(engine: Engine) -> Layout:
    """Of the live engine, on this rank."""
    kind = form(engine)
    closed = kind in CLOSED_FORMS
    return Layout(
        form=kind,
        world_size=engine.world_size,
        rank=engine.rank,
        precision=engine.precision,  # type: ignore[attr-defined]
        optimizer=type(base_optimizer(engine)).__name__,
        shapes={name: list(shape_of(parameter)) for name, parameter in engine.model.named_parameters()},
        flats=[] if closed else [SavedFlat(*_plain(flat)) for flat in flats(engine)],
        frozen=[] if closed else [Piece(view.name, view.start, view.weights.numel(), 0) for view in frozen(engine)],
        counters=counters(engine),
        loss_scale=loss_scale(engine),
    )


def _plain(flat: Flat) -> tuple[list[Piece], list[str], int, int, list[Piece]]:
    return flat.pieces, flat.names, flat.index, flat.state_index, flat.gathered


def _file(directory: Path, rank: int) -> Path:
    return directory / f"layout-{rank:05d}.json"


def write_layout(engine: Engine, directory: Path) -> None:
    """Into the directory of the engine's own files; where every rank has the whole, rank 0's says it all."""
    if engine.rank and form(engine) not in CUT_FORMS:
        return
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(layout(engine)), separators=(",", ":"))
    _file(directory, engine.rank).write_text(text, encoding="utf-8")


def read_layout(directory: Path, rank: int) -> Layout | None:
    """None where the checkpoint has none: an older version wrote it. Raises BigtrainError if it cannot be read."""
    file = _file(directory, rank)
    if not file.exists():
        return None
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        data["flats"] = [
            SavedFlat(**flat | {name: [Piece(*piece) for piece in flat[name]] for name in ("pieces", "gathered")})
            for flat in data["flats"]
        ]
        data["frozen"] = [Piece(*piece) for piece in data["frozen"]]
        return Layout(**data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BigtrainError(f"{file}: cannot be read: {error!r}") from None


class SavedShard:
    """One rank's engine files, opened when first asked for and mapped, not read: only what is used comes to memory."""

    def __init__(self, directory: Path, saved: Layout) -> None:
        self.directory, self.layout = directory, saved
        self._loaded: dict[str, Any] = {}

    def master(self, flat: SavedFlat) -> Tensor:
        """One-dimensional."""
        form, index = self.layout.form, flat.index
        if form == ACCELERATE:
            return self._accelerate_weights().tensor(flat.names[0]).view(-1)
        if form == WHOLE_PARAMETERS:
            return self._plain(self._model()["module"][flat.names[0]])
        if form == WHOLE_MASTERS:
            return self._plain(
                [master for group in self._model()["optimizer"]["fp32_groups"] for master in group][index]
            )
        key = "single_partition_of_fp32_groups" if form == CUT_GROUPS else "fp32_flat_groups"
        return self._plain(self._optimizer()["optimizer_state_dict"][key][index])

    def state(self, flat: SavedFlat) -> dict[str, Any]:
        """The optimizer's state: {name: tensor or number}; empty if it was saved before the first step."""
        form = self.layout.form
        if form == ACCELERATE:
            states = self._load("optimizer.bin")["state"]
        elif form == WHOLE_PARAMETERS:
            states = self._model()["optimizer"]["state"]
        elif form == WHOLE_MASTERS:
            states = self._model()["optimizer"]["optimizer_state_dict"]["state"]
        elif form == CUT_GROUPS:
            states = self._optimizer()["optimizer_state_dict"]["base_optimizer_state"]["state"]
        else:
            states = self._optimizer()["optimizer_state_dict"]["optimizer_state_dict"]["state"]
        found: dict[str, Any] = states.get(flat.state_index, {})
        return found

    def frozen(self, name: str) -> Tensor:
        """One-dimensional, from this rank's first element on."""
        if self.layout.form == ACCELERATE:
            return self._accelerate_weights().tensor(name).view(-1)
        if self.layout.form == CUT_PARAMETERS:
            return self._plain(self._model()["frozen_param_fragments"][name])
        return self._plain(self._model()["module"][name])

    @staticmethod
    def _plain(tensor: Tensor) -> Tensor:
        return tensor.detach().view(-1)

    def _model(self) -> Any:
        cut = self.layout.form == CUT_PARAMETERS
        return self._load(f"{f'zero_pp_rank_{self.layout.rank}_' if cut else ''}mp_rank_00_model_states.pt")

    def _optimizer(self) -> Any:
        prefix = "bf16_" if self.layout.precision == "bf16" else ""
        return self._load(f"{prefix}zero_pp_rank_{self.layout.rank}_mp_rank_00_optim_states.pt")

    def _accelerate_weights(self) -> StoredTensors:
        if "weights" not in self._loaded:
            self._loaded["weights"] = StoredTensors(self.directory)
        found: StoredTensors = self._loaded["weights"]
        return found

    def _load(self, name: str) -> Any:
        if name not in self._loaded:
            file = self.directory / name
            types = [] if self.layout.form == ACCELERATE else unpickling.deepspeed_types()
            try:
                with torch.serialization.safe_globals(types):
                    self._loaded[name] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:
                raise BigtrainError(f"{file}: cannot be read: {error!r}") from None
        return self._loaded[name]
