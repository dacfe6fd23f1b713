"""A step on thousands of ranks, event by event, and a run of days with its failures.

Ranks that do the same thing at the same time are one: under data parallelism all ranks are, but for their speed. As
every collective waits for its last rank, the slowest one's two streams (computing, and communicating) are what a step
takes; how slow it is follows from the distribution of a maximum of N. 16,384 ranks cost what one costs.

A layer's weights are gathered before it runs, as far ahead as the prefetch bucket reaches; its gradients are reduced
after its backward pass. Streams run in order, and what needs something waits for it: DeepSpeed's ZeRO-3 in outline
(arXiv 1910.02054, section 7.2.2; runtime/zero/partitioned_param_coordinator.py).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Literal

import numpy as np

from bigtrain.config import Config, DeepSpeedConfig
from bigtrain.errors import ConfigError
from bigtrain.plan import communication, money, step_time
from bigtrain.plan.clusters import Cluster
from bigtrain.plan.sizes import Sizes, element_bytes

COMPUTE, NETWORK = "compute", "network"


@dataclass(frozen=True)
class Task:
    """Something that a stream does for `seconds` once everything in `after` is done."""

    name: str
    stream: str
    seconds: float
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Event:
    name: str
    stream: str
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What the slowest rank does in one step."""

    events: list[Event]
    seconds: float
    busy: dict[str, float]  # stream -> seconds
    exposed: float  # seconds in which the rank only waits for the network


def run(tasks: list[Task]) -> Timeline:
    """Run the tasks: each stream takes its own in order, the earliest that can start goes first.

    A discrete-event simulation: time jumps from one end of a task to the next.
    """
    queues: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        queues.setdefault(task.stream, []).append(index)
    position = dict.fromkeys(queues, 0)
    free = dict.fromkeys(queues, 0.0)
    ends: dict[int, float] = {}
    events: list[Event] = []
    ends_queue: list[tuple[float, int]] = []
    busy_streams: set[str] = set()

    def start_what_can(now: float) -> None:
        for stream, queue in queues.items():
            if stream in busy_streams or position[stream] >= len(queue):
                continue
            index = queue[position[stream]]
            task = tasks[index]
            if any(needed not in ends for needed in task.after):
                continue
            begin = max(now, free[stream])
            events.append(Event(task.name, stream, begin, begin + task.seconds))
            heapq.heappush(ends_queue, (begin + task.seconds, index))
            busy_streams.add(stream)
            position[stream] += 1

    start_what_can(0.0)
    now = 0.0
    while ends_queue:
        now, index = heapq.heappop(ends_queue)
        finished = [index]
        while ends_queue and ends_queue[0][0] <= now:
            finished.append(heapq.heappop(ends_queue)[1])
        for each in finished:
            ends[each] = now
            free[tasks[each].stream] = now
            busy_streams.discard(tasks[each].stream)
        start_what_can(now)
    if len(ends) != len(tasks):
        raise ValueError("tasks wait for one another in a circle")
    busy = {stream: sum(event.end - event.start for event in events if event.stream == stream) for stream in queues}
    return Timeline(events, now, busy, now - busy.get(COMPUTE, 0.0))


# ------------------------------------------------------------------------------------------------- one step


def slowest(ranks: int, deviation: float) -> float:
    """How far above the mean the slowest of `ranks` is to be expected, in units of one: each rank's time is normal with
    `deviation`.

    The maximum of N normal variables follows Gumbel's law with location and scale from the normal quantiles of
    1 - 1/N and 1 - 1/(N e) (Fisher and Tippett 1928); its mean is Euler's constant of scales above the location.
    """
    if ranks < 2:
        return 0.0
    if ranks == 2:
        return deviation / math.sqrt(math.pi)
    normal = NormalDist()
    location = normal.inv_cdf(1 - 1 / ranks)
    return deviation * (location + np.euler_gamma * (normal.inv_cdf(1 - 1 / (ranks * math.e)) - location))


def step(config: Config, cluster: Cluster, ranks: int, sizes: Sizes, jitter: float = 0.0) -> Timeline:
    """One optimizer step of ZeRO on `ranks` devices.

    jitter: standard deviation of a rank's computing in a step, as a fraction of it (0.01 to 0.05 on shared machines).
    """
    return run(_tasks(config, cluster, ranks, sizes, 1 + slowest(ranks, jitter)))


def _tasks(config: Config, cluster: Cluster, ranks: int, sizes: Sizes, slowness: float) -> list[Task]:
    """A step of a rank that computes for `slowness` times as long as the mean, as tasks."""
    efficiency = step_time.assumed(config, cluster)
    ideal = step_time.ideal(config, cluster, ranks, sizes.total, sizes.trained)
    parts, _ = step_time.combine(ideal, efficiency, overlap=True)
    parts = {name: slowness * seconds for name, seconds in parts.items()}  # its communication is not used below
    layers, times = ideal.layers, ideal.accumulation
    overlap = step_time.overlapped(config, cluster)
    forward, backward, again = (parts[name] / times / layers for name in ("forward", "backward", "recompute"))
    sent = communication.collectives(config, ranks, sizes.total, sizes.trained, layers)
    per_layer = {each.name: communication.seconds(each, cluster, ranks) / each.times / layers for each in sent}
    every_batch = {each.name: each.times > 1 or times == 1 for each in sent}
    network = NETWORK if overlap else COMPUTE
    ahead = _prefetched(config, sizes.total, layers) if overlap else 1
    tasks: list[Task] = []

    def add(name: str, stream: str, seconds: float, *after: int | None) -> int:
        tasks.append(Task(name, stream, seconds, tuple(each for each in after if each is not None)))
        return len(tasks) - 1

    reduced: list[int] = []

    def through(name: str, layer_order: range, seconds: float, before: int | None, reduce: bool) -> int | None:
        """One pass through the layers; its last task."""
        sequence, gathered = list(layer_order), per_layer.get(f"parameters, {name}")
        gather: dict[int, int] = {}
        done: list[int] = []
        # The streams share one device: computing slows down beside a collective.
        beside = (gathered or 0.0) + (per_layer["gradients"] if reduce else 0.0)
        busy = seconds + (efficiency.exposed * min(beside, seconds) if overlap else 0.0)

        def ask(place: int) -> None:
            """Gather the weights of the layer at `place`, once those `ahead` places before it are used up."""
            if gathered is not None and place < layers:
                free = done[place - ahead] if place >= ahead else before
                gather[place] = add(f"gather {sequence[place]}", network, gathered, free)

        for place in range(ahead):
            ask(place)
        for place, layer in enumerate(sequence):
            previous = done[-1] if done else before
            done.append(add(f"{name} {layer}", COMPUTE, busy, previous, gather.get(place)))
            ask(place + ahead)
            if reduce:
                reduced.append(add(f"reduce {layer}", network, per_layer["gradients"], done[-1]))
        return done[-1]

    last: int | None = None
    taught = slowness * step_time.teacher_seconds(config, cluster, ranks) / times
    for batch in range(times):
        if taught:
            last = add("teacher", COMPUTE, taught, last)
        last = through("forward", range(layers), forward, last, False)
        reduces = "gradients" in per_layer and (every_batch["gradients"] or batch == times - 1)
        last = through("backward", range(layers - 1, -1, -1), backward + again, last, reduces)
    update = add("optimizer", COMPUTE, parts["optimizer"] + parts["offload"], last, *reduced[-1:])
    if "parameters" in per_layer:
        add("gather all", network, per_layer["parameters"] * layers, update)
    return tasks


def _prefetched(config: Config, parameters: int, layers: int) -> int:
    """Layers whose weights may be gathered at once: as many as the prefetch bucket has room for, and the next one."""
    engine = config.engine
    if not isinstance(engine, DeepSpeedConfig):
        return 2  # FSDP gathers one ahead
    element = element_bytes(config)
    return 1 + max(1, int(engine.bucket_mib * 2**20 / element / (parameters / layers)))


def scaling(
    config: Config,
    cluster: Cluster,
    planned: int,
    sizes: Sizes,
    counts: list[int],
    jitter: float = 0.0,
) -> list[tuple[int, float, float]]:
    """(ranks, tokens per second, fraction of linear scaling from the first), each rank with the work that it has on
    `planned` ranks: weak scaling."""
    found: list[tuple[int, float, float]] = []
    share = config.train.global_batch // planned
    for ranks in counts:
        same = replace(config, train=replace(config.train, global_batch=share * ranks))
        here = cluster.resized(ranks)
        seconds = step(same, here, ranks, sizes, jitter).seconds
        tokens = step_time.estimate(same, here, ranks, sizes).tokens / seconds
        base = found[0][1] / found[0][0] if found else tokens / ranks
        found.append((ranks, tokens, tokens / ranks / base))
    return found


def counts(cluster: Cluster, ranks: int) -> list[int]:
    """Numbers of devices to draw a scaling curve over, `ranks` among them: from a node to eight times as many."""
    per_node = cluster.devices_per_node
    most = 8 * max(ranks, per_node)
    found = {size for size in (per_node * 2**power for power in range(most.bit_length())) if size <= most} | {ranks}
    return sorted(size for size in found if size <= per_node or size % per_node == 0)


# ------------------------------------------------------------------------------------------- days and failures


YEAR = 365.25 * 86400.0
# Of one device with its share of the node: Llama 3 saw 419 unexpected interruptions of 16,384 H100s in 54 days
# (arXiv 2407.21783, section 3.3.4).
FAILURE_YEARS = 5.8


@dataclass(frozen=True)
class Period:
    """Part of a run: steps that count, with `saves` checkpoints at even distances; steps that were lost; a restart."""

    kind: Literal["work", "lost", "restart"]
    start: float  # hours
    end: float
    saves: int = 0


@dataclass(frozen=True)
class Goodput:
    """Of a run with failures: what part of the time became steps that counted."""

    fraction: float
    failures: float
    hours: float
    lost_hours: float  # steps done again
    checkpoint_hours: float
    restart_hours: float
    interval_seconds: float  # between checkpoints
    periods: list[Period] = field(default_factory=list)  # the first thousand


def best_interval(checkpoint_seconds: float, mean_seconds_between_failures: float) -> float:
    """Seconds between checkpoints that lose least: Daly's higher-order estimate (2006, eq. 37), to first order Young's
    sqrt(2 C M) (1974)."""
    cost, between = checkpoint_seconds, mean_seconds_between_failures
    if cost >= 2 * between:
        return between
    ratio = cost / (2 * between)
    return math.sqrt(2 * cost * between) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def goodput(
    hours: float,
    devices: int,
    step_seconds: float,
    checkpoint_seconds: float,
    device_failure_years: float = FAILURE_YEARS,
    interval_seconds: float | None = None,
    restart_seconds: float = 300.0,
    seed: int = 0,
    write_seconds: float = 0.0,
) -> Goodput:
    """Simulate a run that needs `hours` of steps, failure by failure.

    device_failure_years: mean time between failures of one device with its share of the node.
    checkpoint_seconds: that training waits for each. write_seconds: until it is on the disk, where that is longer:
    until then a failure goes back to the one before, and the next one does not begin.
    Raises ConfigError for a run that never gets ahead.
    """
    if hours <= 0 or step_seconds <= 0:
        raise ConfigError("hours", hours, "a run of no length has no goodput")
    between = device_failure_years * YEAR / devices
    goal = hours * 3600
    interval = interval_seconds or best_interval(max(checkpoint_seconds, 1e-3), between)
    interval = max(step_seconds, interval - interval % step_seconds)  # at the end of a step
    if interval < write_seconds:
        interval = math.ceil(write_seconds / step_seconds) * step_seconds
    span = interval + checkpoint_seconds
    # Failures that a span takes until none falls into it (Daly 2006, section 2); below 1% one may wait for ever.
    again = math.expm1(min(700.0, (min(interval, goal) + checkpoint_seconds) / between))
    if min(interval, goal) < 0.01 * again * (between + restart_seconds):
        raise ConfigError(
            "devices", devices, f"one fails every {between:,.0f} s: such a run does not get ahead",
            "save more often, or write checkpoints faster",
        )  # fmt: skip
    random = np.random.default_rng(seed)
    clock = done = saved = written = lost = checkpoints = restarts = 0.0
    failures = 0
    periods: list[Period] = []

    def passed(kind: Literal["work", "lost", "restart"], until: float, saves: int = 0) -> None:
        nonlocal clock
        if len(periods) < 1000 and until > clock:
            periods.append(Period(kind, clock / 3600, until / 3600, saves))
        clock = until

    next_failure = float(random.exponential(between))
    while done < goal:
        whole = min(int((next_failure - clock) / span), int((goal - done) / interval))
        if whole > 0:  # all intervals until something happens at once
            passed("work", clock + whole * span, whole)
            done += whole * interval
            saved, checkpoints = done, checkpoints + whole * checkpoint_seconds
            written = clock + write_seconds - checkpoint_seconds
            continue
        rest = goal - done
        if rest < interval and clock + rest + checkpoint_seconds <= next_failure:
            passed("work", clock + rest + checkpoint_seconds, 1)
            checkpoints += checkpoint_seconds
            break
        if next_failure < written:
            saved, lost, written = saved - interval, lost + interval, 0.0
        lost += next_failure - clock
        passed("lost", next_failure)
        passed("restart", clock + restart_seconds)
        done = saved
        restarts += restart_seconds
        failures += 1
        next_failure = clock + float(random.exponential(between))
    return Goodput(
        goal / clock, failures, clock / 3600, lost / 3600, checkpoints / 3600, restarts / 3600, interval, periods
    )


def expected(
    hours: float,
    devices: int,
    step_seconds: float,
    checkpoint_seconds: float,
    device_failure_years: float = FAILURE_YEARS,
    interval_seconds: float | None = None,
    write_seconds: float = 0.0,
) -> Goodput:
    """`goodput` in the mean: of many short runs, or of the beginning of a very long one. Without its periods."""
    between_hours = device_failure_years * YEAR / devices / 3600
    simulated = min(hours, 2000 * between_hours)
    runs = 100 if simulated < 4 * between_hours else math.ceil(400 * between_hours / simulated)
    found = [
        goodput(
            simulated, devices, step_seconds, checkpoint_seconds, device_failure_years, interval_seconds,
            seed=seed, write_seconds=write_seconds,
        )
        for seed in range(runs)
    ]  # fmt: skip
    names = ("hours", "failures", "lost_hours", "checkpoint_hours", "restart_hours")
    means = {name: hours / simulated * sum(getattr(each, name) for each in found) / runs for name in names}
    return Goodput(fraction=hours / means["hours"], interval_seconds=found[0].interval_seconds, **means)


def interval_of(config: Config, step_seconds: float, hours: float) -> float:
    """Seconds between the checkpoints of a run of `hours` that train.save_every asks for."""
    return config.train.save_every * step_seconds or hours * 3600


def goodput_of(config: Config, cluster: Cluster, sizes: Sizes, time: step_time.StepTime, hours: float) -> float:
    """The fraction of the time that counts in a run of `hours` that saves as often as train.save_every says, or as is
    best where it says nothing. Raises ConfigError for a run that never gets ahead."""
    saved = money.checkpoint(config, cluster, cluster.devices, sizes)
    interval = config.train.save_every * time.seconds or None
    return expected(
        hours, cluster.devices, time.seconds, saved.stall_seconds, interval_seconds=interval,
        write_seconds=saved.write_seconds,
    ).fraction  # fmt: skip


def intervals(
    devices: int, step_seconds: float, checkpoint_seconds: float, failures: int = 400, write_seconds: float = 0.0
) -> Iterator[tuple[float, float]]:
    """(seconds between checkpoints, goodput) around the optimum, of a run so long that chance evens out; 0 for one
    that never gets ahead."""
    between = FAILURE_YEARS * YEAR / devices
    best = max(best_interval(max(checkpoint_seconds, 1e-3), between), write_seconds, step_seconds)
    for factor in (0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.5, 5.0, 10.0):
        if best * factor < max(write_seconds, step_seconds):
            continue
        try:
            fraction = goodput(
                failures * between / 3600, devices, step_seconds, checkpoint_seconds, interval_seconds=best * factor,
                write_seconds=write_seconds,
            ).fraction  # fmt: skip
        except ConfigError:
            fraction = 0.0
        yield best * factor, fraction
