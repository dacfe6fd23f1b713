"""Which settings to train a model with on a cluster.

`search` tries every sensible combination of world size, ZeRO stage, offload, activation checkpointing and micro-batch
with the global batch held (it is part of what is learned, not of how it is run), throws away what does not fit, and
names the best, the Pareto front, what binds and what would help next. budget.py answers backwards.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import yaml

from bigtrain import checks
from bigtrain import config as schema
from bigtrain.config import Config, DeepSpeedConfig, accumulation_steps, kinds, micro_batch
from bigtrain.errors import ConfigError
from bigtrain.files import conf_dir
from bigtrain.plan import memory, money, step_time
from bigtrain.plan import sizes as parameter_sizes
from bigtrain.plan.clusters import Cluster
from bigtrain.plan.planner import LIBRARIES_GIB
from bigtrain.plan.result import GIB
from bigtrain.plan.sizes import Sizes

Goal = Literal["time", "cost", "memory"]
GOALS: tuple[Goal, ...] = ("time", "cost", "memory")
Where = Literal["none", "cpu", "nvme"]
ONE_MACHINE = ("local", "dryrun")  # ways of launching that take no launch.nodes


@dataclass(frozen=True)
class Room:
    """What one rank needs, and how that compares with what there is."""

    parts: dict[str, float]  # part -> GiB on the device at its fullest moment, and `peak`, their sum
    shares: dict[str, float]  # device memory, host memory, disk -> needed / there

    @property
    def fits(self) -> bool:
        return max(self.shares.values()) <= 1


@dataclass(frozen=True)
class Candidate:
    """One way to run the training."""

    config: Config
    cluster: Cluster  # with as many devices as `ranks`
    ranks: int
    room: Room
    time: step_time.StepTime
    bill: money.Bill  # for all tokens
    switches_engine: bool = False  # what was asked for runs on another engine

    @property
    def peak_gib(self) -> float:
        return self.room.parts["peak"]

    @property
    def overrides(self) -> dict[str, Any]:
        """Dotted key -> value: what `train` must be told, beside what names the model and the data."""
        engine, train, launch = self.config.engine, self.config.train, self.config.launch
        assert isinstance(engine, DeepSpeedConfig)
        return {
            **({"engine": f"zero{engine.stage}"} if self.switches_engine else {}),
            "engine.stage": engine.stage,
            "engine.offload_optimizer": engine.offload_optimizer,
            "engine.offload_parameters": engine.offload_parameters,
            "train.global_batch": train.global_batch,
            "train.micro_batch": micro_batch(self.config, self.ranks),
            "train.activation_checkpointing": train.activation_checkpointing,
            "train.steps": train.steps,
            **self._points,
            "launch.ranks": launch.ranks,
            **({} if launch.nodes is None else {"launch.nodes": launch.nodes}),
        }

    @property
    def _points(self) -> dict[str, Any]:
        """At which steps something begins or ends."""
        prune, quantize = self.config.compress.prune, self.config.compress.quantize
        points: dict[str, Any] = {"schedule.warmup_steps": self.config.schedule.warmup_steps}
        if prune is not None:
            for name in ("begin", "end", "steps"):
                points[f"compress.prune.schedule.{name}"] = getattr(prune.schedule, name)
        if quantize is not None:
            points |= {"compress.quantize.start": quantize.start, "compress.quantize.freeze": quantize.freeze}
        return points

    @property
    def line(self) -> str:
        """The overrides as `train` takes them on its command line."""
        return " ".join(f"{key}={_plain(value)}" for key, value in self.overrides.items())

    @property
    def to_add(self) -> str | None:
        """What the line cannot say: by what the ranks of several nodes are started, where launch is one machine."""
        nodes, launch = self.cluster.nodes, self.config.launch
        if nodes == 1 or launch.kind not in ONE_MACHINE:
            return None
        return (
            f"add what starts {launch.ranks} ranks on each of {nodes} nodes: launch=slurm launch.nodes={nodes}, or "
            f"launch=hostfile launch.hostfile=FILE launch.nodes={nodes}"
        )

    @property
    def yaml(self) -> str:
        """The whole run as a file for conf/experiment: `experiment=` that file is what was planned.

        Sections are written against the schema's defaults (`_decoder`), since it is not known which files they came
        from; of train and schedule also what conf/config.yaml sets after them.
        """
        defaults, sections = [], {}
        recipe = yaml.safe_load((conf_dir() / "config.yaml").read_text(encoding="utf-8"))
        # Where the data lies prepared here is nothing that a run is told.
        config = replace(self.config, data=replace(self.config.data, prepared_dir=None))
        real, public = schema.to_dict(config), schema.public(config)
        for name in ("model", "task", "data", "engine", "optimizer", "schedule", "train", "compress", "launch"):
            part = getattr(config, name)
            default = dataclasses.asdict(type(part)())
            if kinds(type(part)):
                defaults.append({f"override /{name}": f"_{part.kind}"})
                default["kind"] = part.kind
            default |= dict.fromkeys(recipe.get(name, {}), _SET)
            if changed := _differing(real[name], public[name], default):
                sections[name] = changed
        if self.config.init_from is not None:
            sections["init_from"] = public["init_from"]
        text = yaml.safe_dump({"defaults": defaults, **sections}, sort_keys=False, allow_unicode=True, width=120)
        return "# @package _global_\n" + (f"# {self.to_add}\n" if self.to_add else "") + text

    @property
    def short(self) -> str:
        engine = self.config.engine
        assert isinstance(engine, DeepSpeedConfig)
        offload = [
            what
            for what, where in (("optimizer", engine.offload_optimizer), ("parameters", engine.offload_parameters))
            if where != "none"
        ]
        return ", ".join(
            [
                f"{self.ranks} devices",
                f"stage {engine.stage}",
                *([f"{' and '.join(offload)} offloaded"] if offload else []),
                *(["activation checkpointing"] if self.config.train.activation_checkpointing else []),
                f"micro-batch {micro_batch(self.config, self.ranks)} x {accumulation_steps(self.config, self.ranks)}",
            ]
        )


@dataclass(frozen=True)
class Recommendation:
    goal: Goal
    best: Candidate
    front: list[Candidate]  # Pareto: none is better in hours, cost and memory at once; by hours
    tried: int
    fitting: int
    binds: str
    next_change: str


def _plain(value: Any) -> str:
    """As Hydra's grammar reads it, without blanks."""
    return json.dumps(value, separators=(",", ":")) if isinstance(value, (bool, list, type(None))) else str(value)


_SET = object()  # by conf/config.yaml: equal to no value, so that ours is written


def _differing(real: dict[str, Any], public: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """What of `real` is not as in `default`; without secrets, which `public` masks."""
    found: dict[str, Any] = {}
    for key, value in real.items():
        other = default.get(key, _SET)
        if isinstance(value, dict) and isinstance(other, dict):
            if inner := _differing(value, public[key], other):
                found[key] = inner
        elif value != other and value == public[key]:
            found[key] = value
    return found


def room(config: Config, cluster: Cluster, ranks: int, sizes: Sizes) -> Room:
    """What `config` (with its vocabulary set) needs of a node and of its devices, by the memory model."""
    device, per_node = cluster.device, min(ranks, cluster.devices_per_node)
    found = memory.estimate(config, ranks, sizes, "cpu" if device.is_cpu else "cuda")
    parts = memory.needed(found, device)
    if device.is_cpu:
        host = per_node * parts["peak"]
    else:
        host = per_node * (LIBRARIES_GIB + max(found.host, found.host_building) / GIB)
    shares = {
        "device memory": parts["peak"] / device.memory_gib,
        "host memory": host / cluster.host_memory_gib,
        "disk": per_node * found.disk / GIB / cluster.disk_gib,
    }
    return Room(parts, shares)


def search(config: Config, cluster: Cluster, goal: Goal, tokens: float) -> Recommendation:
    """The best way to train `config`'s model on `tokens` tokens with up to all devices of `cluster`.

    goal: least time, least money, or least memory of a rank. Raises ConfigError for an unknown goal, for no tokens,
    and where nothing fits (naming what comes closest).
    """
    if goal not in GOALS:
        raise ConfigError("goal", goal, "unknown", f"one of {', '.join(GOALS)}")
    if not tokens > 0:
        raise ConfigError("tokens", tokens, "must be above 0", "the number of tokens to train on, 140e9 for example")
    sizes = parameter_sizes.of_run(config)
    fitting, tried = [], 0
    closest: tuple[float, str] | None = None
    for ranks in world_sizes(cluster):
        here = cluster.resized(ranks)
        for candidate in ways_to_run(config, here, ranks):
            tried += 1
            needed = room(candidate, here, ranks, sizes)
            if needed.fits:
                fitting.append(priced(config, candidate, here, ranks, needed, tokens, sizes))
            elif closest is None or max(needed.shares.values()) < closest[0]:
                short, share = max(needed.shares.items(), key=lambda item: item[1])
                closest = (share, f"{share:.0%} of the {short} on {ranks} device{'s' * (ranks > 1)}")
    if not fitting:
        if closest is None:
            raise ConfigError(
                "train.global_batch", config.train.global_batch, "cannot be shared out among any number of devices"
            )
        raise ConfigError(
            "cluster", cluster.name, f"nothing fits: the least is {closest[1]}",
            "take more devices, a smaller model or shorter sequences",
        )  # fmt: skip
    best = min(fitting, key=_order(goal))
    front = pareto(fitting)
    change = _next_change(config, cluster, best, goal, tokens, sizes)
    return Recommendation(goal, best, front, tried, len(fitting), _binds(best), change)


def _order(goal: Goal) -> Callable[[Candidate], tuple[float, ...]]:
    """Ties go to the simpler way: fewer devices, a lower stage, no offload."""

    def simplicity(candidate: Candidate) -> tuple[float, ...]:
        engine = candidate.config.engine
        assert isinstance(engine, DeepSpeedConfig)
        return (candidate.ranks, engine.stage, engine.offload_optimizer != "none")

    def key(candidate: Candidate) -> tuple[float, ...]:
        hours, cost, gib = candidate.bill.hours, candidate.bill.device_hours, candidate.peak_gib
        first = {"time": (hours, cost), "cost": (cost, hours), "memory": (gib, hours)}[goal]
        return tuple(round(value, 6) for value in first) + simplicity(candidate)

    return key


def world_sizes(cluster: Cluster) -> list[int]:
    """1, 2, 4 ... devices of a node, then 1, 2, 4 ... nodes, and all of them."""
    within = [2**power for power in range(cluster.devices_per_node.bit_length())]
    found = {size for size in within if size <= cluster.devices_per_node}
    nodes = 1
    while nodes <= cluster.nodes:
        found.add(nodes * cluster.devices_per_node)
        nodes *= 2
    return sorted(found | {cluster.devices})


def ways_to_run(config: Config, cluster: Cluster, ranks: int) -> Iterator[Config]:
    """Every combination on `ranks` devices that `train` takes."""
    engine = config.engine if isinstance(config.engine, DeepSpeedConfig) else DeepSpeedConfig()
    if config.train.global_batch % ranks:
        return
    share = config.train.global_batch // ranks
    nodes = None if config.launch.kind in ONE_MACHINE else cluster.nodes
    batches = [size for size in _powers(share) if share % size == 0]
    offloads: list[tuple[Where, Where]] = [("none", "none"), ("cpu", "none"), ("cpu", "cpu")]
    if engine.nvme_path:
        offloads += [("nvme", "none"), ("nvme", "cpu"), ("nvme", "nvme")]
    for stage in (0, 1, 2, 3) if ranks > 1 else (0, 2, 3):
        for optimizer, parameters in offloads:
            if cluster.device.is_cpu and optimizer == "cpu":
                continue  # the device's memory is the host's
            for checkpointing in (False, True):
                for batch in batches:
                    candidate = replace(
                        config,
                        engine=replace(engine, stage=stage, offload_optimizer=optimizer, offload_parameters=parameters),
                        train=replace(config.train, micro_batch=batch, activation_checkpointing=checkpointing),
                        launch=replace(config.launch, ranks=cluster.devices_per_node, nodes=nodes),
                    )
                    try:
                        checks.check(candidate)
                    except ConfigError:
                        break  # of stage, offload and optimizer: no batch size changes it
                    yield candidate


def _powers(most: int) -> list[int]:
    return sorted({2**power for power in range(most.bit_length())} | {most})


def priced(
    given: Config, config: Config, cluster: Cluster, ranks: int, needed: Room, tokens: float, sizes: Sizes
) -> Candidate:
    """What `config`, a way to run `given` that needs that much room, takes for so many tokens."""
    time = step_time.estimate(config, cluster, ranks, sizes)
    steps = max(1, math.ceil(tokens / time.tokens))
    bill = money.bill(steps * time.seconds / 3600, ranks, cluster)
    switches = given.engine.kind != config.engine.kind
    return Candidate(_lasting(config, steps), cluster, ranks, needed, time, bill, switches)


def _lasting(config: Config, steps: int) -> Config:
    """`config` for so many steps: the warm-up and what pruning and quantizing wait for keep their share of them."""

    def at(step: int) -> int:
        return step * steps // config.train.steps

    schedule, compress = config.schedule, config.compress
    if (prune := compress.prune) is not None:
        ramp = prune.schedule
        ramp = replace(ramp, begin=at(ramp.begin), end=at(ramp.end), steps=[at(step) for step in ramp.steps])
        compress = replace(compress, prune=replace(prune, schedule=ramp))
    if (quantize := compress.quantize) is not None:
        freeze = None if quantize.freeze is None else at(quantize.freeze)
        compress = replace(compress, quantize=replace(quantize, start=at(quantize.start), freeze=freeze))
    return replace(
        config, train=replace(config.train, steps=steps), compress=compress,
        schedule=replace(schedule, warmup_steps=at(schedule.warmup_steps)),
    )  # fmt: skip


def pareto(candidates: list[Candidate]) -> list[Candidate]:
    """Those that no other is at least as good as in hours, device hours and memory, and better in one; by hours."""
    front: list[Candidate] = []
    best: list[tuple[float, float]] = []  # device hours, memory of those that are faster
    for candidate in sorted(candidates, key=lambda each: (each.bill.hours, each.bill.device_hours, each.peak_gib)):
        paid, gib = candidate.bill.device_hours, candidate.peak_gib
        if any(other_paid <= paid * (1 + 1e-9) and other_gib <= gib * (1 + 1e-9) for other_paid, other_gib in best):
            continue
        best.append((paid, gib))
        front.append(candidate)
    return front


def _binds(best: Candidate) -> str:
    """What keeps the best way from being better."""
    total = best.time.seconds
    shares = {name: seconds / total for name, seconds in best.time.parts.items()}
    full = best.peak_gib / best.cluster.device.memory_gib
    memory = f"device memory is {full:.0%} full"
    if shares["offload"] > 0.2:
        return f"offload: {shares['offload']:.0%} of a step; {memory}"
    if shares["communication"] > 0.2:
        return f"communication: {shares['communication']:.0%} of a step; {memory}"
    if full > 0.85:
        return f"{memory}: it keeps the micro-batch from growing"
    if shares["recompute"] > 0.1:
        return f"recomputing activations: {shares['recompute']:.0%} of a step; {memory}"
    return f"arithmetic: {shares['forward'] + shares['backward']:.0%} of a step; {memory}"


def _next_change(config: Config, cluster: Cluster, best: Candidate, goal: Goal, tokens: float, sizes: Sizes) -> str:
    """The smallest step beyond the cluster that helps: one more node (or device) up to twice as many."""
    unit = cluster.devices_per_node if cluster.nodes > 1 or _whole_node(cluster) else 1
    for more in (unit, cluster.devices):
        devices = cluster.devices + more
        try:
            larger = cluster.resized(devices) if unit > 1 else replace(cluster, devices_per_node=devices)
        except ConfigError:
            continue
        ways = []
        for candidate in ways_to_run(config, larger, devices):
            needed = room(candidate, larger, devices, sizes)
            if needed.fits:
                ways.append(priced(config, candidate, larger, devices, needed, tokens, sizes))
        if not ways:
            continue
        found = min(ways, key=_order(goal))
        faster = best.bill.hours / found.bill.hours
        if faster < 1.02 and found.peak_gib > 0.98 * best.peak_gib:
            continue
        paid = found.bill.device_hours / best.bill.device_hours
        notes = [f"{faster:.2f}x as fast at {paid:.2f}x the device hours"]
        before, after = accumulation_steps(best.config, best.ranks), accumulation_steps(found.config, found.ranks)
        if after < before:
            notes.append("removes accumulation" if after == 1 else f"accumulation {before} -> {after}")
        if best.config.train.activation_checkpointing and not found.config.train.activation_checkpointing:
            notes.append("removes activation checkpointing")
        if best.overrides["engine.offload_optimizer"] != "none" == found.overrides["engine.offload_optimizer"]:
            notes.append("removes offload")
        return f"{devices} devices instead of {cluster.devices}: {', '.join(notes)} ({found.short})"
    return f"up to {2 * cluster.devices} devices, more do not help while train.global_batch={config.train.global_batch}"


def _whole_node(cluster: Cluster) -> bool:
    return cluster.devices_per_node >= 8
