"""Tier A: the whole plan of a run in closed form. Answers in a fraction of a second and imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from bigtrain import checks
from bigtrain.config import Config, DeepSpeedConfig, accumulation_steps, micro_batch
from bigtrain.errors import ConfigError
from bigtrain.plan import communication, memory, money, step_time
from bigtrain.plan import sizes as parameter_sizes
from bigtrain.plan.clusters import Cluster
from bigtrain.plan.memory import Memory
from bigtrain.plan.result import GIB, Plan
from bigtrain.plan.sizes import Sizes

ZERO_PAPER = "arXiv 1910.02054, sections 3 and 5"
LIBRARIES_GIB = 0.6  # of host memory: a rank's process with torch and DeepSpeed, before any tensor


def make(config: Config, cluster: Cluster, tokens: float | None = None) -> Plan:
    """Plan `config`, one rank on each device of `cluster`, for `tokens` tokens or train.steps.

    Raises ConfigError for a batch that does not divide among the ranks and for a model whose shape is not known.
    """
    ranks = cluster.devices
    checks.check_batch(config, ranks)
    config = parameter_sizes.with_vocabulary(config)
    sizes = parameter_sizes.of_run(config)
    plan = Plan(
        cluster=cluster.name if cluster.name.endswith(f"x{ranks}") else f"{cluster.name} x {ranks}",
        ranks=ranks,
        parameters=sizes.total,
        parameters_by_part=sizes.by_part(),
        trained_parameters=sizes.trained,
        micro_batch=micro_batch(config, ranks),
        accumulation=accumulation_steps(config, ranks),
    )
    plan.add(
        "parameters", sizes.total, "", "sum of every tensor's elements, shared ones once", "bigtrain/plan/sizes.py"
    )
    _memory(plan, config, cluster, sizes)
    _communication(plan, config, cluster, sizes)
    _time(plan, config, cluster, sizes, tokens)
    _inference(plan, config, cluster, sizes)
    _limits(plan, config, cluster)
    return plan


# ------------------------------------------------------------------------------------------------- memory


def _memory(plan: Plan, config: Config, cluster: Cluster, sizes: Sizes) -> None:
    device = cluster.device
    found = memory.estimate(config, plan.ranks, sizes, "cpu" if device.is_cpu else "cuda")
    plan.memory = memory.needed(found, device)
    plan.device_memory_gib = device.memory_gib
    saved = found.activations
    plan.activations = {
        "per_layer": saved.per_layer / GIB,
        "with_checkpointing": saved.saved(True) / GIB,
        "without_checkpointing": saved.saved(False) / GIB,
    }
    per_node = min(plan.ranks, cluster.devices_per_node)
    if device.is_cpu:
        plan.host_memory_gib = per_node * plan.memory["peak"]
    else:
        plan.host_memory_gib = per_node * (LIBRARIES_GIB + max(found.host, found.host_building) / GIB)
    plan.disk_gib = per_node * found.disk / GIB
    plan.warnings += found.assumptions
    _explain_memory(plan, config, found)
    short = [
        ("device memory", plan.memory["peak"], device.memory_gib),
        ("host memory", plan.host_memory_gib, cluster.host_memory_gib),
        ("disk", plan.disk_gib, cluster.disk_gib),
    ]
    missing = [f"{name}: {needed:,.1f} GiB of {there:,.1f}" for name, needed, there in short if needed > there]
    plan.fits, plan.binding = not missing, "; ".join(missing)


def _explain_memory(plan: Plan, config: Config, found: Memory) -> None:
    engine = config.engine
    stage = engine.stage if isinstance(engine, DeepSpeedConfig) else 0
    share = {0: ("", "", ""), 1: ("", "", " / N"), 2: ("", " / N", " / N"), 3: (" / N", " / N", " / N")}[stage]
    element = 4 if config.train.precision == "fp32" else 2
    plain = {
        "parameters": (f"{element} P{share[0]}, padded", ZERO_PAPER),
        "master": (f"4 P{share[2]}, padded", ZERO_PAPER),
        "optimizer": (f"bytes of {config.optimizer.kind} for an element x P{share[2]}", ZERO_PAPER),
        "gradients": (f"those held at the peak ({found.peak.name}), of P{share[1]}", "DeepSpeed 0.19, runtime/zero"),
        "activations": (
            "what each operator saves for its gradient",
            "arXiv 2205.05198, section 4; plan/activations.py",
        ),
        "logits": ("a chunk of logits, and the loss's gradients", "bigtrain/models/cross_entropy.py"),
        "buckets": ("engine.bucket_mib, twice where reducing overlaps", "DeepSpeed 0.19, setup_buckets"),
        "gathered": ("weights in use and fetched ahead, up to 1e9", "DeepSpeed 0.19, stage3_max_live_parameters"),
        "temporary": ("gradients in flight, or their copy in fp32", "DeepSpeed 0.19, runtime/zero"),
        "offloaded": ("states in host memory, which a CPU's device memory is", "arXiv 2101.06840"),
        "rounding": ("half a block for each large tensor", "torch.cuda's caching allocator"),
        "context": ("libraries and driver", "the cluster's file"),
        "peak": (f"their sum, at the fullest moment: {found.peak.name}", "bigtrain/plan/memory.py"),
    }
    for name, gib in plan.memory.items():
        plan.add(f"memory.{name}", gib, "GiB", *plain[name])
    for name, gib in plan.activations.items():
        plan.add(f"activations.{name}", gib, "GiB", *plain["activations"])


# --------------------------------------------------------------------------------------- time and money


def _communication(plan: Plan, config: Config, cluster: Cluster, sizes: Sizes) -> None:
    """GB that a rank sends in a step, by collective, and over the links to its host and disk."""
    layers = max(getattr(config.model, "n_layers", 1), 1)
    network = "inter-node" if cluster.nodes > 1 else "intra-node"
    for each in communication.collectives(config, plan.ranks, sizes.total, sizes.trained, layers):
        name = f"{each.kind} of {each.name}, {network}"
        plan.communication[name] = plan.communication.get(name, 0.0) + each.sent_per_rank(plan.ranks) / 1e9
    for transfer in communication.transfers(config, plan.ranks, sizes.total, sizes.trained):
        plan.communication[f"{transfer.name}, {transfer.link}"] = transfer.bytes / 1e9
    for name, sent in plan.communication.items():
        plan.add(f"communication.{name}", sent, "GB", "bytes x (N - 1) / N, an all-reduce twice", "arXiv 1910.02054, 7")


def _time(plan: Plan, config: Config, cluster: Cluster, sizes: Sizes, tokens: float | None) -> None:
    found = step_time.estimate(config, cluster, plan.ranks, sizes)
    seconds = plan.add("step_seconds", found.seconds, "s", "sum of the parts under time", "bigtrain/plan/step_time.py")
    plan.step_seconds, plan.time = seconds, dict(found.parts)
    plan.intervals["step_seconds"] = (found.low, found.high)
    plan.tokens_per_step, plan.tokens_per_second = found.tokens, found.tokens_per_second
    plan.mfu, plan.hfu = found.mfu, found.hfu
    for part, value in found.parts.items():
        plan.add(f"time.{part}", value, "s", *step_time.FORMULAS[part])
    plan.add("tokens_per_second", found.tokens_per_second, "tokens/s", "tokens of a step / step_seconds", "")
    formula = "(6 per multiplied weight + 12 layers h T) x tokens / (peak x time)"
    plan.add("mfu", found.mfu, "", formula, "arXiv 2204.02311, appendix B")
    plan.add("hfu", found.hfu, "", "recomputation counted too", "arXiv 2205.05198, section 6")
    plan.warnings += found.notes
    if tokens is None:
        plan.steps, plan.tokens = config.train.steps, float(config.train.steps * found.tokens)
    else:
        plan.steps, plan.tokens = max(1, round(tokens / found.tokens)), tokens
    paid = money.bill(plan.tokens / found.tokens_per_second / 3600, plan.ranks, cluster)
    plan.hours = plan.add("hours", paid.hours, "h", "tokens / tokens_per_second / 3600", "")
    plan.cost = plan.add("cost", paid.cost, "USD", "device hours x price", "the cluster's file")
    plan.energy_kwh = plan.add(
        "energy_kwh", paid.energy_kwh, "kWh", "device hours x watts x PUE", "arXiv 2302.13971, section 6"
    )
    plan.co2_kg = plan.add("co2_kg", paid.kg_co2, "kg", "energy x the grid's intensity", "arXiv 2302.13971, section 6")
    saved = money.checkpoint(config, cluster, plan.ranks, sizes.total, sizes.trained)
    plan.checkpoint_gib = plan.add("checkpoint_gib", saved.gib, "GiB", "weights, fp32 master, moments", "plan/money.py")
    plan.checkpoint_stall_seconds = plan.add(
        "checkpoint_stall_seconds", saved.stall_seconds, "s", "copy to the host, or write", "plan/money.py"
    )


def _inference(plan: Plan, config: Config, cluster: Cluster, sizes: Sizes) -> None:
    try:
        found = money.inference(config, cluster, sizes.total)
    except ConfigError:
        return  # an encoder, or more than the cluster holds
    plan.inference = {
        "devices": float(found.devices),
        "weights_gib": found.weights_gib,
        "kv_cache_gib": found.kv_cache_gib,
        "prefill_seconds": found.prefill_seconds,
        "decode_seconds": found.decode_seconds,
        "tokens_per_second": found.tokens_per_second,
    }
    for name, value in plan.inference.items():
        plan.add(
            f"inference.{name}", value, "", "2 P per token, or weights and cache / bandwidth", "arXiv 2211.05102, 2.1"
        )


def _limits(plan: Plan, config: Config, cluster: Cluster) -> None:
    """Where the estimate leaves what it was held to."""
    if config.train.compile:
        plan.warnings.append("train.compile: the compiler saves fewer activations than are counted here")
    if config.train.lora.rank:
        plan.warnings.append("train.lora: the adapters' own activations are not counted")
    if not cluster.device.is_cpu:
        plan.warnings.append("memory was held to real runs on CPUs; on a GPU fragmentation comes on top")
    if plan.memory["peak"] > 0.92 * plan.device_memory_gib and plan.fits:
        plan.warnings.append(f"{plan.memory['peak'] / plan.device_memory_gib:.0%} of the device's memory: a tight fit")
    plan.warnings = list(dict.fromkeys(plan.warnings))


# ------------------------------------------------------------------------------------- what would fit instead


def nearest_fit(config: Config, cluster: Cluster) -> tuple[list[str], Plan] | None:
    """The smallest change of `config` that fits into `cluster`, as overrides, and its plan; None if none does.

    Tried in the order of what they cost: smaller micro-batch, higher stage, activation checkpointing, both, offload.
    """
    for overrides, candidate in _changes(config, cluster):
        try:
            checks.check(candidate)
            plan = make(candidate, cluster)
        except ConfigError:
            continue
        if plan.fits:
            return overrides, plan
    return None


def _changes(config: Config, cluster: Cluster) -> Iterable[tuple[list[str], Config]]:
    from dataclasses import replace

    ranks, engine = cluster.devices, config.engine
    now = micro_batch(config, ranks)
    batches = [now] + [size for size in (2**power for power in range(now.bit_length(), -1, -1)) if size < now]
    batches = [size for size in batches if config.train.global_batch % (size * ranks) == 0]
    zero = engine if isinstance(engine, DeepSpeedConfig) else DeepSpeedConfig()
    stages = sorted({zero.stage, *(stage for stage in (1, 2, 3) if stage > zero.stage and ranks > 1)})
    offloads = [(zero.offload_optimizer, zero.offload_parameters)]
    if not cluster.device.is_cpu:
        offloads += [("cpu", zero.offload_parameters), ("cpu", "cpu")]
    for optimizer, parameters in dict.fromkeys(offloads):
        for checkpointing in dict.fromkeys((config.train.activation_checkpointing, True)):
            for stage in stages if optimizer == "none" or ranks == 1 else [stage for stage in stages if stage > 0]:
                if parameters != "none" and stage < 3:
                    continue
                for batch in batches:
                    candidate = replace(
                        config,
                        engine=replace(zero, stage=stage, offload_optimizer=optimizer, offload_parameters=parameters),
                        train=replace(config.train, micro_batch=batch, activation_checkpointing=checkpointing),
                    )
                    changed = {
                        "engine.stage": (zero.stage, stage),
                        "engine.offload_optimizer": (zero.offload_optimizer, optimizer),
                        "engine.offload_parameters": (zero.offload_parameters, parameters),
                        "train.activation_checkpointing": (config.train.activation_checkpointing, checkpointing),
                        "train.micro_batch": (now, batch),
                    }
                    yield [f"{key}={str(new).lower()}" for key, (old, new) in changed.items() if old != new], candidate
