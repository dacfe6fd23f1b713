"""What a step sends, over which link, and how long the links need for it.

The volumes are those of the ZeRO paper (arXiv 1910.02054, section 7) as DeepSpeed 0.19 really runs them: its stages 1
and 2 reduce gradients by all-reduce of whole buckets (`use_multi_rank_bucket_allreduce`), which is twice what a
reduce-scatter takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bigtrain.config import Config, DeepSpeedConfig, accumulation_steps
from bigtrain.plan.clusters import Cluster
from bigtrain.plan.sizes import element_bytes

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]
LIVE_PARAMETERS = 1_000_000_000  # stage3_max_live_parameters and stage3_max_reuse_distance of our ds_config


@dataclass(frozen=True)
class Collective:
    """`times` collectives in an optimizer step that together move the whole of `bytes` once each."""

    name: str
    kind: Kind
    bytes: float  # of the whole tensor, not of one rank's shard
    times: int  # in an optimizer step
    calls: int  # into how many calls each is split: buckets, or a layer at a time

    def sent_per_rank(self, ranks: int) -> float:
        """Bytes that each rank sends in a step: (N - 1) / N of the tensor, an all-reduce twice that."""
        return self.bytes * self.times * (ranks - 1) / ranks * (2 if self.kind == "all_reduce" else 1)


@dataclass(frozen=True)
class Transfer:
    """Bytes of one rank in a step over a link that is not between ranks."""

    name: str
    link: Literal["host", "disk"]
    bytes: float


def collectives(config: Config, ranks: int, parameters: int, trained: int, layers: int) -> list[Collective]:
    """Of one optimizer step. parameters, trained: their numbers; layers: what stage 3 gathers at a time."""
    if ranks == 1:
        return []
    element = element_bytes(config)
    accumulation = accumulation_steps(config, ranks)
    gradients, weights = float(trained * element), float(parameters * element)
    if not isinstance(config.engine, DeepSpeedConfig):
        if config.engine.parallel == "ddp":
            return [Collective("gradients", "all_reduce", 4.0 * trained, 1, _buckets(4.0 * trained, 25))]
        return _sharded(4.0 * trained, weights, accumulation, layers, gathers=2)
    engine = config.engine
    buckets = _buckets(gradients, engine.bucket_mib)
    if engine.stage == 0:
        return [Collective("gradients", "all_reduce", gradients, 1, buckets)]
    if engine.stage == 3:
        # What is used again within so many elements stays gathered: a small model from forward to backward.
        gathers = 2 if 2 * parameters > LIVE_PARAMETERS else 1
        return _sharded(gradients, weights, accumulation, layers, gathers)
    times = accumulation if engine.stage == 2 else 1  # stage 2 keeps no whole gradients to add up
    return [
        Collective("gradients", "all_reduce", gradients, times, buckets),
        Collective("parameters", "all_gather", float(trained * element), 1, buckets),
    ]


def _sharded(gradients: float, weights: float, accumulation: int, layers: int, gathers: int) -> list[Collective]:
    gathered = [Collective("parameters, forward", "all_gather", weights, accumulation, layers)]
    if gathers == 2:
        gathered.append(Collective("parameters, backward", "all_gather", weights, accumulation, layers))
    return [*gathered, Collective("gradients", "reduce_scatter", gradients, accumulation, layers)]


def _buckets(size: float, bucket_mib: float) -> int:
    return max(1, round(size / (bucket_mib * 2**20)))


def transfers(config: Config, ranks: int, parameters: int, trained: int) -> list[Transfer]:
    """Between each rank and its host or disk in a step, for what is offloaded (arXiv 2101.06840, 2104.07857)."""
    engine = config.engine
    if not isinstance(engine, DeepSpeedConfig):
        return []
    element = element_bytes(config)
    accumulation = accumulation_steps(config, ranks)
    result = []
    if engine.offload_optimizer != "none":
        times = accumulation if engine.stage >= 2 else 1
        result.append(Transfer("gradients to the host", "host", element * trained / ranks * times))
        result.append(Transfer("parameters from the host", "host", element * trained / ranks))
    if engine.offload_optimizer == "nvme":  # fp32 parameters and two moments, read and written
        result.append(Transfer("optimizer states, read and written", "disk", 2 * 12 * trained / ranks))
    if engine.stage == 3 and engine.offload_parameters != "none":
        gathers = 2 if 2 * parameters > LIVE_PARAMETERS else 1
        shard = element * parameters / ranks
        result.append(Transfer("parameters to be gathered", "host", shard * gathers * accumulation))
        if engine.offload_parameters == "nvme":
            result.append(Transfer("parameters, read", "disk", shard * gathers * accumulation))
            result.append(Transfer("parameters, written", "disk", shard))
    return result


def seconds(collective: Collective, cluster: Cluster, ranks: int) -> float:
    """Of all of a step's calls of it, alone on the links."""
    one = collective_seconds(collective.kind, collective.bytes, cluster, ranks, collective.calls)
    return one * collective.times


def collective_seconds(kind: Kind, size: float, cluster: Cluster, ranks: int, calls: int = 1) -> float:
    """Of `size` bytes through rings that go node by node: each node takes in (M - 1) / M of the tensor through all its
    network links together, while its n devices pass all of it along among themselves. The slower of the two is what
    one waits for, and each hop has its latency. An all-reduce is a reduce-scatter and an all-gather
    (Patarasuk and Yuan 2009; NCCL's rings do the same).
    """
    if ranks <= 1:
        return 0.0
    per_node = min(ranks, cluster.devices_per_node)
    nodes = -(-ranks // per_node)
    within = size * (ranks - 1) / ranks / (cluster.intra_node_gb_per_second * 1e9) if per_node > 1 else 0.0
    between = size * (nodes - 1) / nodes / (cluster.inter_node_gb_per_second * 1e9 * per_node)
    latency = (per_node - 1) * cluster.intra_node_latency_us + (nodes - 1) * cluster.inter_node_latency_us
    passes = 2 if kind == "all_reduce" else 1
    reached = cluster.device.efficiency.get(kind, 1.0)  # of the links' speed, where it was measured
    return passes * (max(within, between) / reached + calls * latency * 1e-6)


def transfer_seconds(transfer: Transfer, cluster: Cluster) -> float:
    """Of one rank while the others of its node do the same: a disk is shared, a host link is the device's own."""
    if transfer.link == "host":
        return transfer.bytes / (cluster.host_link_gb_per_second * 1e9)
    return transfer.bytes * cluster.devices_per_node / (cluster.disk_gb_per_second * 1e9)
