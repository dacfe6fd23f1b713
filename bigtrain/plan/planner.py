"""Tier A: the whole plan of a run in closed form. Answers in a fraction of a second and imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from bigtrain import checks
from bigtrain.config import (
    AccelerateConfig,
    ClassificationConfig,
    Config,
    DeepSpeedConfig,
    accumulation_steps,
    micro_batch,
)
from bigtrain.errors import ConfigError
from bigtrain.plan import communication, flops, lengths, memory, money, step_time
from bigtrain.plan import sizes as parameter_sizes
from bigtrain.plan.clusters import Cluster
from bigtrain.plan.memory import Memory
from bigtrain.plan.result import GIB, Plan
from bigtrain.plan.sizes import Sizes
from bigtrain.plan.units import size

ZERO_PAPER = "arXiv 1910.02054, sections 3 and 5"
LIBRARIES_VARY = 0.75  # of their memory: whole ranks of 0.30 GiB were measured where 0.4 are taken for libraries
LIBRARIES_GIB = 0.6  # of host memory: a rank's process with torch and DeepSpeed, before any tensor
OPTIMIZER_BYTES = {  # of an element's states, beside its fp32 master
    "adamw": "8",
    "adamw8bit": "2 + 8 / 256 (8 in small tensors)",
    "adafactor": "4 (rows + columns) / elements",
    "lion": "4 (8 on hosts)",
    "muon": "4 in hidden matrices, else 8,",
}


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
    if parameter_sizes.guesses_vocabulary(config):
        plan.warnings.append(
            f"data.tokenizer.path={config.data.tokenizer.path}: no tokenizer.json there, so a vocabulary of"
            f" {config.model.vocab_size:,} is taken; model.vocab_size=N says what it is"
        )
    _parameters(plan, sizes)
    _lengths(plan, config)
    _memory(plan, config, cluster, sizes)
    _communication(plan, config, cluster, sizes)
    _time(plan, config, cluster, sizes, tokens)
    _inference(plan, config, cluster, sizes)
    _limits(plan)
    return plan


def _parameters(plan: Plan, sizes: Sizes) -> None:
    source = "bigtrain/plan/sizes.py, held to the modules tensor by tensor"
    plan.add("parameters", sizes.total, "", "sum of every tensor's elements, shared ones once", source)
    for part, count in plan.parameters_by_part.items():
        plan.add(f"parameters_by_part.{part}", count, "", parameter_sizes.FORMULAS[part], source)
    kept = "parameters less those that train.freeze and train.lora leave as they are"
    plan.add("trained_parameters", sizes.trained, "", kept, source)


def _lengths(plan: Plan, config: Config) -> None:
    known = lengths.of(config)
    source = "the prepared data" if known else "model.max_seq_len, or task.max_length"
    for name, value in {"mean": flops.sequence_length(config), "longest": flops.longest_sequence(config)}.items():
        formula = f"{name} over batches, padded to their longest example" if known else "all are taken for full"
        plan.sequence_length[name] = plan.add(f"sequence_length.{name}", value, "tokens", formula, source)


def _said(cluster: Cluster, name: str) -> str:
    """Where the cluster's file has a number of its own from."""
    return cluster.source.get(name, f"{name} of {cluster.name}, whose file names no source")


# ------------------------------------------------------------------------------------------------- memory


def _memory(plan: Plan, config: Config, cluster: Cluster, sizes: Sizes) -> None:
    device = cluster.device
    found = memory.estimate(config, plan.ranks, sizes, "cpu" if device.is_cpu else "cuda")
    found = memory.saving_in_room(found, device)
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
    _explain_memory(plan, config, cluster, sizes, found)
    margin, notes = _memory_margin(plan.memory, config, cluster, found)
    peak = plan.memory["peak"]
    low, high = peak / (1 + margin), peak * (1 + margin)
    if (shorter := flops.shortened(config)) is not None:
        least = memory.estimate(shorter, plan.ranks, sizes, "cpu" if device.is_cpu else "cuda")
        low = min(low, memory.needed(least, device)["peak"] / (1 + margin))
    plan.add_interval("memory.peak", peak, low, high, "bigtrain/plan/planner.py, _memory_margin")
    plan.warnings += notes
    short = [
        ("device memory", plan.memory["peak"], device.memory_gib),
        ("host memory", plan.host_memory_gib, cluster.host_memory_gib),
        ("disk", plan.disk_gib, cluster.disk_gib),
    ]
    missing = [f"{name}: {size(needed)} of {size(there)}" for name, needed, there in short if needed > there]
    plan.fits, plan.binding = not missing, "; ".join(missing)


def _memory_margin(
    needed: dict[str, float], config: Config, cluster: Cluster, found: Memory
) -> tuple[float, list[str]]:
    """Half the width of the interval of the peak as a fraction, and a line for all that widens it.

    0.03 is what the worst of two and four real ranks stays below (benchmarks/plan_accuracy.py), of tensors: what a
    rank's libraries take besides depends on what a run loads.
    """
    margin, notes = 0.03, []
    train, compress, kind = config.train, config.compress, config.optimizer.kind

    def widen(by: float, why: str) -> None:
        nonlocal margin
        margin += by
        notes.append(f"memory: {why}; interval +{by:.0%}")

    if cluster.device.is_cpu:
        share = LIBRARIES_VARY * needed["context"] / needed["peak"]
        if share >= 0.01:
            widen(share, f"libraries take {size(needed['context'])}, more or less by what a run loads")
        if kernels := needed.get("kernels", 0) / needed["peak"]:
            widen(
                kernels, f"{found.kernels} lengths of examples have kernels made for each, of {memory.KERNELS_MIB} MiB"
            )
    else:
        widen(0.12, "held to real runs on CPUs; on a GPU fragmentation comes on top")
    for assumption in found.assumptions:
        widen(0.10, assumption)
    if train.compile:
        widen(0.20, "train.compile saves fewer activations than are counted here")
    if train.lora.rank:
        widen(0.10, "train.lora: the adapters' own activations are not counted")
    if kind not in ("adamw", "lion"):
        widen(0.05, f"optimizer={kind} was not measured")
    if compress.distil is not None:
        known = parameter_sizes.teacher(config) is not None
        missing = "what it computes is not" if known else "it is no run on this machine, and nothing of it is"
        widen(0.10 if known else 1.0, f"compress.distil.teacher: {missing} counted")
    if compress.quantize is not None:
        widen(0.20, "compress.quantize: rounded weights are not counted")
    if compress.prune is not None:
        widen(0.05, "compress.prune: masks and scores are not counted")
    if compress.float8 is not None:
        widen(0.10, "compress.float8: copies in float8 are not counted")
    if isinstance(config.task, ClassificationConfig) and config.task.adversarial != "none":
        widen(1.0, f"task.adversarial={config.task.adversarial}: the activations of its second pass are not counted")
    if isinstance(config.engine, DeepSpeedConfig) and config.engine.quantized_communication:
        widen(0.10, "engine.quantized_communication: its buffers are not counted")
    if getattr(config.model, "unpadded", False):
        widen(0.10, "model.unpadded: padding is counted as if it were kept")
    return margin, notes


def _explain_memory(plan: Plan, config: Config, cluster: Cluster, sizes: Sizes, found: Memory) -> None:
    described = _accelerate_formulas if isinstance(config.engine, AccelerateConfig) else _zero_formulas
    activations = "what each operator saves for its gradient", "arXiv 2205.05198, section 4; plan/activations.py"
    held_out = f"at most what a block would save, {memory.held_out_sequences(config, plan.ranks)} sequences at a time"
    peak_activations, logits = (
        activations,
        ("a chunk of logits, and the loss's gradients", "bigtrain/models/cross_entropy.py"),
    )
    if found.peak.name == "evaluation":
        peak_activations = held_out, "bigtrain/plan/activations.py, evaluating"
        logits = (
            "those that the task reads, or a text's cache as it is written",
            "bigtrain/plan/activations.py, evaluating",
        )
    more = f", and {found.evaluating} of what evaluates" if found.evaluating and cluster.device.is_cpu else ""
    without = "" if found.tracer or not cluster.device.is_cpu else f", less {memory.TRACER_GIB} of TorchDynamo"
    formulas = {
        "activations": peak_activations,
        "logits": logits,
        "kernels": (
            f"{memory.KERNELS_MIB} MiB x {found.kernels} lengths, those of an evaluation's batches among them",
            "resident memory of real ranks; oneDNN's primitive cache",
        ),
        "snapshot": ("parameters + master + optimizer, once more", "bigtrain/engine/snapshot.py"),
        "teacher": (
            f"{parameter_sizes.element_bytes(config)} P of the teacher, / N where sharded",
            "bigtrain/compress/teacher.py",
        ),
        "rounding": ("half of device.block_mib for each large tensor", _said(cluster, "device.block_mib")),
        "context": (f"device.context_gib: libraries and driver{without}{more}", _said(cluster, "device.context_gib")),
        "peak": (f"their sum, at the fullest moment: {found.peak.name}", "bigtrain/plan/memory.py"),
    } | described(config, cluster, sizes, found)
    for name, gib in plan.memory.items():
        plan.add(f"memory.{name}", gib, "GiB", *formulas[name])
    for name, gib in plan.activations.items():
        plan.add(f"activations.{name}", gib, "GiB", *activations)
    beside = (
        "memory.peak" if cluster.device.is_cpu else f"({LIBRARIES_GIB} + the offloaded, or the model as it is built)"
    )
    source = "arXiv 2101.06840; the libraries as a rank's process shows them"
    plan.add("host_memory_gib", plan.host_memory_gib, "GiB", f"ranks of a node x {beside}", source)
    offloaded = "ranks of a node x offloaded master, moments, fp32 gradients and weights"
    plan.add("disk_gib", plan.disk_gib, "GiB", offloaded, "arXiv 2104.07857; DeepSpeed 0.19, runtime/swap_tensor")


def _zero_formulas(config: Config, cluster: Cluster, sizes: Sizes, found: Memory) -> dict[str, tuple[str, str]]:
    engine, moment = config.engine, found.peak.name
    assert isinstance(engine, DeepSpeedConfig)
    states, gradients, of_weights = (" / N, padded" if engine.stage >= least else "" for least in (1, 2, 3))
    trained = "P" if sizes.trained == sizes.total else "P_trained"
    element = parameter_sizes.element_bytes(config)
    weights = f"{element} P{of_weights}"
    if moment == "start" and not (engine.stage == 3 and engine.zero_init):
        built, flat = 4 if cluster.device.is_cpu else element, element * (2 if engine.stage else 1)
        weights = f"max({built}, {flat}) P: the model as it was built, and ZeRO's flat copy"
    temporary = {
        "update": "gradients of what is updated at once in fp32, or for the norm a piece in fp64",
        "start": "moments, as the first step makes them",
    }
    return {
        "parameters": (weights, ZERO_PAPER),
        "master": (f"4 {trained}{states}", ZERO_PAPER),
        "optimizer": (f"{OPTIMIZER_BYTES[config.optimizer.kind]} {trained}{states}", ZERO_PAPER),
        "gradients": (f"those held at the peak ({moment}), of {trained}{gradients}", "DeepSpeed 0.19, runtime/zero"),
        "buckets": ("engine.bucket_mib, twice where reducing overlaps", "DeepSpeed 0.19, setup_buckets"),
        "gathered": ("weights in use and fetched ahead, up to 1e9", "DeepSpeed 0.19, stage3_max_live_parameters"),
        "temporary": (temporary.get(moment, "gradients in flight"), "DeepSpeed 0.19, runtime/zero"),
        "offloaded": ("states in host memory, which a CPU's device memory is", "arXiv 2101.06840"),
    }


def _accelerate_formulas(config: Config, cluster: Cluster, sizes: Sizes, found: Memory) -> dict[str, tuple[str, str]]:
    engine = config.engine
    assert isinstance(engine, AccelerateConfig)
    share = " / N" if engine.parallel == "fsdp2" and cluster.devices > 1 else ""
    trained = "P" if sizes.trained == sizes.total else "P_trained"
    source = "torch 2, fully_shard: fp32 shards" if share else "torch 2, DistributedDataParallel: all on each rank"
    gradients = f"4 {trained}{share}"
    if config.train.privacy.enabled and found.peak.name == "loss":
        gradients = f"4 {trained} x (micro_batch + 1): each example's and their sum"
    return {
        "parameters": (f"4 P{share}", source),
        "optimizer": (f"{OPTIMIZER_BYTES[config.optimizer.kind]} {trained}{share}", source),
        "buckets": (f"4 {trained}: the gradients once more, in buckets", source),
        "gathered": ("2 P: the weights in 16 bits", "torch 2, autocast"),
        "gradients": (gradients, source),
        "temporary": (f"4 {trained}{share}: what the update computes", source),
    }


# --------------------------------------------------------------------------------------- time and money


def _communication(plan: Plan, config: Config, cluster: Cluster, sizes: Sizes) -> None:
    """GB that a rank sends in a step, by collective, and over the links to its host and disk."""
    layers = max(getattr(config.model, "n_layers", 1), 1)
    network = "inter-node" if cluster.nodes > 1 else "intra-node"
    formulas = {}
    for each in communication.collectives(config, plan.ranks, sizes.total, sizes.trained, layers):
        name = f"{each.kind} of {each.name}, {network}"
        plan.communication[name] = plan.communication.get(name, 0.0) + each.sent_per_rank(plan.ranks) / 1e9
        passes = "2 x " if each.kind == "all_reduce" else ""
        formulas[name] = f"{passes}bytes x (N - 1) / N x {each.times} a step", "arXiv 1910.02054, section 7"
    for transfer in communication.transfers(config, plan.ranks, sizes.total, sizes.trained):
        name = f"{transfer.name}, {transfer.link}"
        plan.communication[name] = transfer.bytes / 1e9
        formulas[name] = "bytes of a rank's share that pass the link in a step", "arXiv 2101.06840; 2104.07857"
    for name, sent in plan.communication.items():
        plan.add(f"communication.{name}", sent, "GB", *formulas[name])


def _time(plan: Plan, config: Config, cluster: Cluster, sizes: Sizes, tokens: float | None) -> None:
    found = step_time.estimate(config, cluster, plan.ranks, sizes)
    ours = "bigtrain/plan/step_time.py"
    seconds = plan.add("step_seconds", found.seconds, "s", "sum of the parts under time", ours)
    plan.step_seconds, plan.time = seconds, dict(found.parts)
    plan.add_interval("step_seconds", seconds, found.low, found.high, f"{ours}, _margin")
    plan.tokens_per_step, plan.tokens_per_second = found.tokens, found.tokens_per_second
    plan.mfu, plan.hfu = found.mfu, found.hfu
    for part, value in found.parts.items():
        plan.add(f"time.{part}", value, "s", *step_time.FORMULAS[part])
    sequences = "train.global_batch x tokens of a sequence (of an encoder-decoder, of both)"
    plan.add("tokens_per_step", found.tokens, "tokens", sequences, "bigtrain/plan/flops.py")
    rate = plan.add("tokens_per_second", found.tokens_per_second, "tokens/s", "tokens_per_step / step_seconds", ours)
    slower, faster = found.tokens_per_second * seconds / found.high, found.tokens_per_second * seconds / found.low
    plan.add_interval("tokens_per_second", rate, slower, faster, f"{ours}, _margin")
    formula = "(6 per multiplied weight + 12 layers h T) x tokens / (peak x time)"
    plan.add("mfu", found.mfu, "", formula, "arXiv 2204.02311, appendix B")
    again = "as mfu, and what is computed again: scores in the backward pass, blocks with activation checkpointing"
    plan.add("hfu", found.hfu, "", again, "arXiv 2205.05198, section 6; 2205.14135")
    plan.warnings += found.notes
    if tokens is None:
        plan.steps, plan.tokens = config.train.steps, float(config.train.steps * found.tokens)
        formulas = ("train.steps", "steps x tokens_per_step")
    else:
        plan.steps, plan.tokens = max(1, round(tokens / found.tokens)), tokens
        formulas = ("tokens / tokens_per_step, rounded", "what was asked for, or follows from the goal")
    plan.add("steps", plan.steps, "", formulas[0], "the run's config and the plan's own keys")
    plan.add("tokens", plan.tokens, "", formulas[1], "the run's config and the plan's own keys")
    paid = money.bill(plan.tokens / found.tokens_per_second / 3600, plan.ranks, cluster)
    plan.hours = plan.add("hours", paid.hours, "h", "tokens / tokens_per_second / 3600", "bigtrain/plan/money.py")
    price = _said(cluster, "price_per_device_hour")
    plan.cost = plan.add("cost", paid.cost, "USD", "device hours x price_per_device_hour", price)
    plan.energy_kwh = plan.add(
        "energy_kwh", paid.energy_kwh, "kWh", "device hours x watts x PUE", "arXiv 2302.13971, section 6"
    )
    plan.co2_kg = plan.add("co2_kg", paid.kg_co2, "kg", "energy x the grid's intensity", "arXiv 2302.13971, section 6")
    for name in ("hours", "cost", "energy_kwh", "co2_kg"):
        value = getattr(plan, name)
        plan.add_interval(name, value, value * found.low / seconds, value * found.high / seconds, f"{ours}, _margin")
    saved = money.checkpoint(config, cluster, plan.ranks, sizes)
    plan.checkpoint_gib = plan.add(
        "checkpoint_gib", saved.gib, "GiB", "weights, fp32 master, moments", "bigtrain/plan/money.py"
    )
    plan.checkpoint_stall_seconds = plan.add(
        "checkpoint_stall_seconds", saved.stall_seconds, "s", "copy to the host, or write", "bigtrain/plan/money.py"
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
    beside = "all-reduces, and layers x layer_seconds / 3 on a CPU"
    formulas = {
        "devices": ("", "(weights + cache) / memory of a device, rounded up"),
        "weights_gib": ("GiB", "2 P"),
        "kv_cache_gib": ("GiB", "2 x 2 bytes x layers x kv_heads x head_dim x max_seq_len"),
        "prefill_seconds": ("s", f"max(2 P T / (peak x efficiency), weights / bandwidth), {beside}"),
        "decode_seconds": ("s", f"max((weights + cache) / bandwidth, 2 P / (peak x efficiency)), {beside}"),
        "tokens_per_second": ("tokens/s", "1 / decode_seconds"),
    }
    for name, value in plan.inference.items():
        plan.add(f"inference.{name}", value, *formulas[name], "arXiv 2211.05102, section 2.1")


def _limits(plan: Plan) -> None:
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
                    overrides = [f"{key}={str(new).lower()}" for key, (old, new) in changed.items() if old != new]
                    yield ([] if zero is engine else [f"engine=zero{zero.stage}"]) + overrides, candidate
