"""The bytes that one rank holds, moment by moment of a step, and which moment needs most.

A rank holds its share of weights and optimizer states all the time (`states`), and on top of it what the moment needs:
the loss its logits, the backward pass gradients and buckets, the update a copy of the gradients in fp32. What each
ZeRO stage holds is read off DeepSpeed 0.19 with the options that engine/deepspeed.py gives it.

Symbols: P parameters, N ranks, e bytes of an element in train.precision.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Literal

from bigtrain.config import (
    LABELLED_TASKS,
    AccelerateConfig,
    Config,
    DeepSpeedConfig,
    HuggingFaceConfig,
    MuonConfig,
    accumulation_steps,
    micro_batch,
)
from bigtrain.plan import activations, clusters, lengths
from bigtrain.plan.activations import Activations, Setting
from bigtrain.plan.flops import longest_sequence, our_model
from bigtrain.plan.result import GIB
from bigtrain.plan.sizes import Parameter, Sizes, element_bytes, of_run, teacher

LIVE = 1_000_000_000  # elements that ZeRO-3 keeps gathered and fetches ahead (stage3_max_live_parameters)
SUB_GROUP = 1_000_000_000  # elements of a rank that ZeRO-3 updates at a time (sub_group_size)
NORM_PIECE = 2**20  # elements; as engine/deepspeed.py has it
ALL_REDUCED = 500_000_000  # elements of gradients that stage 0 sends at a time
NVME_BUFFERS, NVME_BUFFER = 5, 100_000_000  # offload_param: buffer_count, buffer_size in elements
BLOCK_8BIT = 256  # elements that share a scale in torchao's 8-bit states
SMALLEST_8BIT = 4096  # elements; smaller ones keep fp32 states
TRACER_GIB = 0.2  # of a CPU's context_gib: TorchDynamo and what comes with it (engine/lean.py)
# On top of a CPU's context_gib: scikit-learn, which counts these tasks' metrics (seqeval by it), or transformers'
# generation, which writes the texts.
EVALUATING_GIB = {"classification": 0.14, "tagging": 0.14, "translation": 0.16}
# oneDNN's code for a length's products in 16 bits: the resident memory of real ranks grew by 10 to 16 with each length
# that they had not seen yet.
KERNELS_MIB = 12
EVAL_TOKENS = 4096  # of a batch of the last evaluation; as trainer.py has it
OPTIONAL = ("save", "evaluation")  # moments; a save takes no copy where memory is short (engine/snapshot.py)
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Moment:
    """What is held at one moment of a step, part by part, in bytes."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that needs most."""

    states: dict[str, int]  # parameters, master, optimizer ...: between two steps
    moments: tuple[Moment, ...]
    activations: Activations
    host: int = 0  # of one rank: offloaded states in RAM
    host_building: int = 0  # of one rank, while its model is built on the host
    disk: int = 0  # of one rank: offloaded states on NVMe
    tracer: bool = True  # whether a rank imports TorchDynamo
    evaluating: float = 0.0  # GiB of the libraries that an evaluation loads
    kernels: int = 0  # lengths that matmul kernels are made for, one after another
    assumptions: list[str] = field(default_factory=list)  # where the closed form is not held to a measurement

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def certain(self) -> Moment:
        """The fullest moment of those that no run can do without."""
        return max((each for each in self.moments if each.name not in OPTIONAL), key=lambda moment: moment.total)

    def without(self, name: str) -> Memory:
        return replace(self, moments=tuple(each for each in self.moments if each.name != name))


@dataclass(frozen=True)
class _Group:
    """Parameters that the optimizer treats alike, which ZeRO flattens together."""

    parameters: tuple[Parameter, ...]
    state_bytes: float  # of the optimizer, for an element

    @cached_property
    def count(self) -> int:
        return sum(each.count for each in self.parameters)


def needed(found: Memory, device: clusters.Device) -> dict[str, float]:
    """GiB by part at the peak on a device: what the tensors take, and what comes on top of them there."""
    found = saving_in_room(found, device)
    parts = {name: size / GIB for name, size in found.peak.parts.items() if size}
    blocks = found.activations.large_tensors(10 * 2**20)
    parts["rounding"] = blocks * device.block_mib / 2 / 1024  # half a block for each tensor that has its own
    parts["context"] = device.context_gib
    if device.is_cpu:
        libraries = max(0.0, device.context_gib - (0 if found.tracer else TRACER_GIB))
        parts["context"] = libraries + (found.evaluating if device.context_gib else 0)
        if found.kernels:
            parts["kernels"] = found.kernels * KERNELS_MIB / 1024
    return parts | {"peak": sum(parts.values())}


def saving_in_room(found: Memory, device: clusters.Device) -> Memory:
    """Without the copy that a save makes, where there is no room for two of it: training waits for the disk then."""
    copy = found.peak.parts.get("snapshot", 0)
    return found.without("save") if (found.peak.total + copy) / GIB > device.memory_gib - device.context_gib else found


def estimate(config: Config, ranks: int, sizes: Sizes, device: Device) -> Memory:
    """Of `config` with its vocabulary set, on so many ranks, from the start to the last, whole evaluation."""
    found = replace(
        _alone(config, ranks, sizes, device), kernels=_kernels(config, ranks, device), evaluating=_evaluating(config)
    )
    beside = _teacher(config, ranks)
    if not beside:
        return found
    moments = tuple(Moment(each.name, each.parts | beside) for each in found.moments)
    return replace(found, states=found.states | beside, moments=moments)


def _teacher(config: Config, ranks: int) -> dict[str, int]:
    """A distillation's teacher, which stands beside the student all the time; nothing without one."""
    distil, taught_by = config.compress.distil, teacher(config)
    if distil is None or taught_by is None:
        return {}
    share = ranks if distil.teacher_sharded else 1
    elements = sum(math.ceil(each.count / share) for each in of_run(taught_by).parameters)
    return {"teacher": element_bytes(config) * elements}


def _kernels(config: Config, ranks: int, device: Device) -> int:
    """Lengths of labelled examples that matmul kernels are made for on a CPU, those of larger batches in the last
    evaluation counted by a third: it has no backward pass."""
    if device != "cpu" or config.train.precision == "fp32" or not isinstance(config.task, LABELLED_TASKS):
        return 0
    known = lengths.of(config)
    distinct = known.distinct if known else -(-longest_sequence(config) // 8)
    return distinct + (distinct // 3 if held_out_sequences(config, ranks) != micro_batch(config, ranks) else 0)


def _evaluating(config: Config) -> float:
    if getattr(config.task, "regression", False):
        return 0.0  # whose metrics are numpy's
    return EVALUATING_GIB.get(config.task.kind, 0.0)


def held_out_sequences(config: Config, ranks: int) -> int:
    """Of a batch of the last evaluation on one rank."""
    return max(micro_batch(config, ranks), EVAL_TOKENS // max(1, our_model(config.model).max_seq_len))


def _alone(config: Config, ranks: int, sizes: Sizes, device: Device) -> Memory:
    """Without a teacher."""
    element = element_bytes(config)
    setting = Setting(
        device, element, micro_batch(config, ranks), longest_sequence(config),
        documents=bool(getattr(config.data, "isolate_documents", False)), cpu_kernels=_cpu_kernels(),
    )  # fmt: skip
    found = activations.of(config, setting)
    held_out = replace(
        setting, sequences=held_out_sequences(config, ranks), length=longest_sequence(config, held_out=True)
    )
    evaluating = activations.evaluating(config, held_out)
    if isinstance(config.engine, AccelerateConfig):
        return _accelerate(config, ranks, sizes, found, device, evaluating)
    groups = _groups(config, sizes, device)
    return _Zero(config, config.engine, ranks, sizes, groups, found, element, device, evaluating).memory()


def _cpu_kernels() -> bool:
    """Whether models/cpu_kernels.py can be built here, without importing it and torch."""
    if os.environ.get("BIGTRAIN_CPU_KERNELS", "1") == "0":
        return False
    return bool(os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc"))


def _groups(config: Config, sizes: Sizes, device: Device) -> list[_Group]:
    """As engine/optimizers.parameter_groups makes them (layer_lr_decay splits them further, which changes padding)."""
    groups: dict[tuple[bool, bool], list[Parameter]] = {}
    for each in sizes.parameters:
        if each.trained:
            hidden = each.hidden and isinstance(config.optimizer, MuonConfig)
            groups.setdefault((len(each.shape) >= 2, hidden), []).append(each)
    return [_Group(tuple(parameters), _state_bytes(config, parameters, device)) for parameters in groups.values()]


def _state_bytes(config: Config, parameters: list[Parameter], device: Device) -> float:
    """Of the optimizer for each element, its fp32 master not counted."""
    kind = config.optimizer.kind
    if kind == "adamw8bit":
        large = sum(each.count for each in parameters if each.count >= SMALLEST_8BIT and each.count % BLOCK_8BIT == 0)
        total = sum(each.count for each in parameters)
        return (large * (2 + 2 * 4 / BLOCK_8BIT) + (total - large) * 8) / max(total, 1)
    if kind == "adafactor":  # a row and a column of sums for a matrix
        kept = sum(sum(each.shape) if len(each.shape) > 1 else each.count for each in parameters)
        return 4 * kept / max(sum(each.count for each in parameters), 1)
    if kind == "muon":
        return 4.0 if parameters[0].hidden else 8.0
    if kind == "lion":  # DeepSpeed's for hosts keeps a second moment that it does not use
        on_host = device == "cpu" or getattr(config.engine, "offload_optimizer", "none") != "none"
        return 8.0 if on_host else 4.0
    return 8.0


@dataclass(frozen=True)
class _Zero:
    """DeepSpeed's stages 0 to 3."""

    config: Config
    engine: DeepSpeedConfig
    ranks: int
    sizes: Sizes
    groups: list[_Group]
    found: Activations
    element: int
    device: Device
    evaluating: dict[str, int]  # bytes of the last evaluation's largest batch

    def option(self, name: str, ours: int) -> int:
        """Of ds_config's zero_optimization: what the user passes through in engine.deepspeed, else ours."""
        return int(self.engine.deepspeed.get("zero_optimization", {}).get(name, ours))

    @property
    def sub_group(self) -> int:
        return self.option("sub_group_size", SUB_GROUP)

    @property
    def live(self) -> int:
        return self.option("stage3_max_live_parameters", LIVE)

    def memory(self) -> Memory:
        engine = self.engine
        states, host, disk = self.states(), 0, 0
        update = self.update()
        if engine.offload_optimizer != "none":
            moved = states.pop("master", 0) + states.pop("optimizer", 0)
            gradients = states.pop("gradients", 0)
            shard = sum(map(self.shard, self.groups))
            gradients = 4 * shard + (gradients or (self.gradient_bytes * shard if self.accumulates else 0))
            host += self.element * shard if engine.stage < 3 else 0  # updated weights on their way back
            update = {}
            if engine.offload_optimizer == "nvme":
                disk += moved + 4 * shard
                host += 4 * 4 * self.largest_sub_group + gradients - 4 * shard  # buffer_count buffers
                born = 4 * 2 * self.largest_sub_group  # the first step makes its moments beside the buffers
                if self.device == "cpu":
                    update = {"temporary": born}
                else:
                    host += born
            else:
                host += moved + gradients
        if engine.offload_parameters != "none":
            moved = states.pop("parameters")
            if engine.offload_parameters == "nvme":
                disk += moved
                host += NVME_BUFFERS * NVME_BUFFER * self.element
            else:
                host += moved
        in_ram = self.device == "cpu"
        if in_ram and host:  # one memory for both
            states["offloaded"], host = host, 0
        offloaded = engine.offload_optimizer != "none" or engine.offload_parameters != "none"
        return Memory(
            states=states,
            moments=tuple(self.moments(states, update)),
            activations=self.found,
            host=host,
            host_building=0 if in_ram or (engine.stage == 3 and engine.zero_init) else 4 * self.sizes.total,
            disk=disk,
            tracer=self.tracer,
            assumptions=["offloaded states are counted from DeepSpeed's source, not measured"] if offloaded else [],
        )

    @property
    def tracer(self) -> bool:
        config = self.config
        marked = config.train.compile or config.train.activation_checkpointing
        compressed = config.compress.quantize is not None or config.compress.float8 is not None
        return self.engine.stage == 3 or marked or compressed or config.optimizer.kind != "adamw"

    # -------------------------------------------------------------------------------------------- all the time

    def states(self) -> dict[str, int]:
        """Between two steps."""
        stage, total, element = self.engine.stage, self.sizes.total, self.element
        frozen = self.sizes.total - self.sizes.trained
        if stage == 0:
            master = 4 * self.sizes.trained if element == 2 else 0
            optimizer = sum(round(group.count * group.state_bytes) for group in self.groups)
            return {"parameters": element * total, "master": master, "optimizer": optimizer}
        shards = {index: self.shard(group) for index, group in enumerate(self.groups)}
        held = {
            "master": 4 * sum(shards.values()),
            "optimizer": sum(round(shards[index] * group.state_bytes) for index, group in enumerate(self.groups)),
        }
        if stage < 3:
            flat = sum(shard * self.ranks for shard in shards.values())
            return {"parameters": element * (flat + frozen)} | held
        parts = sum(math.ceil(each.count / self.ranks) for each in self.sizes.parameters)
        gradients = self.gradient_bytes * sum(shards.values())  # one buffer for all of them, made at the start
        return {"parameters": element * parts} | held | {"gradients": gradients, "buckets": self.bucket}

    def shard(self, group: _Group) -> int:
        """Elements of a group that one rank updates: parameter by parameter in stage 3, before it of the flat whole,
        padded so that each rank's begins at a multiple of 2."""
        if self.engine.stage == 0:
            return group.count
        if self.engine.stage == 3:
            return sum(math.ceil(each.count / self.ranks) for each in group.parameters)
        return 2 * math.ceil(group.count / (2 * self.ranks))

    @cached_property
    def largest_sub_group(self) -> int:
        """Elements that a rank updates at once: ZeRO-3's sub-groups end with the parameter that reaches the limit."""
        if self.engine.stage < 3:
            return max(map(self.shard, self.groups), default=0)
        sizes = [0]
        for group in self.groups:
            for each in group.parameters:
                sizes[-1] += math.ceil(each.count / self.ranks)
                if sizes[-1] >= self.sub_group:
                    sizes.append(0)
            sizes.append(0)
        return max(sizes)

    @property
    def accumulates(self) -> bool:
        return accumulation_steps(self.config, self.ranks) > 1

    @property
    def gradient_bytes(self) -> int:
        """Of an element of the accumulated gradients (engine/deepspeed.py: bf16 is too coarse to add many up in)."""
        wide = self.config.train.precision == "bf16" and self.engine.stage >= 2 and self.accumulates
        return 4 if wide else self.element

    @property
    def bucket(self) -> int:
        return self.engine.bucket_mib * 2**20

    @property
    def buckets(self) -> int:
        """While gradients are reduced; two, where that overlaps with the computation of others."""
        double = self.engine.overlap_comm and self.device == "cuda" and self.engine.stage in (1, 2)
        return self.bucket * (2 if double else 1)

    # -------------------------------------------------------------------------------------- moments of a step

    def moments(self, states: dict[str, int], update: dict[str, int]) -> list[Moment]:
        found, checkpointing = self.found, self.config.train.activation_checkpointing
        saved = found.saved(checkpointing)
        kept = states | self.accumulated()
        loss = kept | self.gathered(backward=False) | {"activations": saved, "logits": found.head_peak}
        again = max(found.blocks, default=0) if checkpointing else 0  # of the block that is computed again
        backward = _sum(
            kept | self.gathered(backward=True),
            {"activations": saved + again, "logits": self.largest_gradient, "temporary": found.working},
            {"buckets": self.buckets if 0 < self.engine.stage < 3 else 0},
        )
        reducing = _sum(backward, {"gradients": self.arriving, "activations": -self.released})
        widest = max(backward, reducing, key=lambda parts: sum(parts.values()))
        moments = [Moment("loss", loss), Moment("backward", widest)]
        moments.append(Moment("end of backward", _sum(kept, self.reduced())))
        if update:
            moments.append(Moment("update", _sum(states, update)))
        moments.append(Moment("start", self.building(states)))
        moments.append(Moment("evaluation", states | self.gathered(backward=False) | self.evaluating))
        if (copy := self.snapshot(states)) and self.device == "cpu":
            moments.append(Moment("save", states | {"snapshot": copy}))
        return moments

    def snapshot(self, states: dict[str, int]) -> int:
        """What a save copies, to write it while training goes on (engine/snapshot.py); of the rank that has most."""
        engine = self.engine
        at_once = not self.config.train.async_save or self.config.optimizer.kind == "adamw8bit"
        if at_once or engine.offload_optimizer != "none" or engine.offload_parameters != "none":
            return 0
        return sum(states.get(name, 0) for name in ("parameters", "master", "optimizer"))

    @property
    def arriving(self) -> int:
        """ZeRO-2's buffer for a rank's gradients: made with the first of them, and the owner of the last layers has
        that while nearly all activations are still there."""
        engine = self.engine
        if engine.stage != 2 or engine.offload_optimizer != "none" or self.gradient_bytes != self.element:
            return 0
        fills = self.bucket < self.element * self.sizes.trained  # else all are reduced when all are there
        return self.element * self.owned_by[-1] if fills else 0

    @property
    def released(self) -> int:
        """Of the activations, when the first gradients go: that is when the bucket would overflow. Where the gradients
        of the head and of the last block's last layer fit into it, the one before that layer comes first, and what
        lies between the two has been let go (measured: not of a block that is computed again)."""
        model = self.config.model
        assert not isinstance(model, HuggingFaceConfig)  # activations.of knows none of those
        first = sum(each.count for each in self.sizes.parameters if each.part == "head")
        first += (model.ffn_dim or 4 * model.dim) * model.dim
        if self.config.train.activation_checkpointing or self.element * first >= self.bucket:  # norms and biases, too
            return 0
        return self.found.feed_forward

    @property
    def largest_gradient(self) -> int:
        """Of the vocabulary's table, which the loss has computed and the backward pass of the embedding adds to."""
        return max((self.element * each.count for each in self.sizes.parameters if each.part == "embedding"), default=0)

    def accumulated(self) -> dict[str, int]:
        """Gradients of the micro-batches before the last one."""
        if not self.accumulates or self.engine.stage == 3:
            return {}
        trained = self.sizes.trained
        if self.engine.stage == 2:
            if self.engine.offload_optimizer != "none":
                return {}  # added up in host memory
            owned = self.owned if self.gradient_bytes == self.element else sum(map(self.shard, self.groups))
            return {"gradients": self.gradient_bytes * owned}
        return {"gradients": self.element * trained} | ({"buckets": self.bucket} if self.engine.stage == 1 else {})

    @property
    def owned(self) -> int:
        """Of the rank that has most: a large table counts in full on each of its ranks."""
        return max(self.owned_by)

    @cached_property
    def owned_by(self) -> list[int]:
        """For each rank, elements of all the parameters that reach into its partition, whole as DeepSpeed's buffer for
        their gradients has them."""
        change = [0] * (self.ranks + 1)
        for group in self.groups:
            shard, start = self.shard(group), 0
            for each in group.parameters:
                change[start // shard] += each.count
                start += each.count
                change[(start - 1) // shard + 1] -= each.count
        return list(accumulate(change[: self.ranks]))

    def gathered(self, backward: bool) -> dict[str, int]:
        """Whole parameters of ZeRO-3 at the widest place. Each module that runs fetches another bucket ahead, until
        LIVE elements are there; in the backward pass the largest, used at both ends of the model, comes on top."""
        if self.engine.stage != 3:
            return {}
        largest = max((each.count for each in self.sizes.parameters), default=0)
        return {"gathered": self.element * min(self.sizes.total, self.live + (largest if backward else 0))}

    def reduced(self) -> dict[str, int]:
        """When the last gradient, that of the embedding, has come."""
        stage, element = self.engine.stage, self.element
        last = 2 * self.largest_gradient
        if stage == 0:
            flat = element * min(self.sizes.trained, ALL_REDUCED)
            own = 0 if self.accumulates else element * self.sizes.trained
            return {"gradients": own + max(last, flat)}
        if stage == 3:  # whose weights are let go when they are used for the last time
            return {"gradients": last, "gathered": self.largest_gradient}
        if stage == 2 and self.gradient_bytes != element:  # added to the accumulated ones at once
            return {"gradients": last, "buckets": self.buckets}
        whole = element * self.sizes.trained if stage == 1 and not self.accumulates else 0  # it reduces at the end
        return {"gradients": whole + element * self.owned + last, "buckets": self.buckets}

    def update(self) -> dict[str, int]:
        """On top of the states: gradients, and a group's of them in fp32, flat, or for the norm a piece in fp64."""
        stage, element = self.engine.stage, self.element
        shards = [self.shard(group) for group in self.groups]
        if stage == 0:
            return {"gradients": element * self.sizes.trained, "temporary": 4 * self.sizes.trained * (element == 2)}
        copies = self.largest_sub_group * (4 + (self.gradient_bytes if self.gradient_bytes != 4 else 0))
        owned = self.owned if stage < 3 and self.gradient_bytes == element else sum(shards)
        held = {} if stage == 3 else {"gradients": self.gradient_bytes * owned}
        if stage < 3:  # the norm is computed in fp64, piece by piece
            tensor = max((each.count for group in self.groups for each in group.parameters), default=0)
            copies = max(copies, 8 * min(tensor, max(shards, default=0), NORM_PIECE))
        return held | {"temporary": copies}

    def building(self, states: dict[str, int]) -> dict[str, int]:
        """Before the first step: the model as it was built, beside the flat copy that ZeRO makes of it."""
        total = self.sizes.total
        if self.engine.stage == 3 and self.engine.zero_init:
            return states
        whole = 4 * total if self.device == "cpu" else self.element * total
        if self.engine.stage == 0:
            return {"parameters": max(whole, self.element * total)} | {"master": states["master"]}
        return {"parameters": max(whole, 2 * self.element * total)}


def _accelerate(
    config: Config, ranks: int, sizes: Sizes, found: Activations, device: Device, evaluating: dict[str, int]
) -> Memory:
    """DDP and FSDP2 with fp32 weights: autocast keeps a 16-bit copy of the weights of what runs."""
    assert isinstance(config.engine, AccelerateConfig)
    sharded = config.engine.parallel == "fsdp2" and ranks > 1
    share = ranks if sharded else 1
    shard = sum(math.ceil(each.count / share) for each in sizes.parameters)
    optimizer = sum(round(group.count * group.state_bytes / share) for group in _groups(config, sizes, device))
    states = {"parameters": 4 * shard, "optimizer": optimizer}
    trained = math.ceil(sizes.trained / share)
    held = {"buckets": 4 * trained if ranks > 1 and not sharded else 0}  # DDP reduces in a copy of the gradients
    cast = 0 if config.train.precision == "fp32" else 2 * sizes.total
    saved = found.saved(config.train.activation_checkpointing)
    working = {"gathered": cast, "activations": saved, "logits": found.head_peak}
    if config.train.privacy.enabled:  # one for each example, and the sum of the clipped ones
        working["gradients"] = 4 * trained * (micro_batch(config, ranks) + 1)
    moments = (
        Moment("loss", states | held | working),
        Moment("update", states | held | {"gradients": 4 * trained, "temporary": 4 * trained}),
        Moment("evaluation", states | held | {"gathered": cast} | evaluating),
    )
    return Memory(states, moments, found, assumptions=["engine=accelerate is an estimate that was not measured"])


def _sum(*parts: dict[str, int]) -> dict[str, int]:
    result: dict[str, int] = {}
    for part in parts:
        for key, value in part.items():
            result[key] = result.get(key, 0) + value
    return {key: value for key, value in result.items() if value}
