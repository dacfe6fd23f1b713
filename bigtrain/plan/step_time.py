"""How long an optimizer step takes.

A roofline by parts: every matmul at a fraction of the peak, attention at another, elementwise kernels at a fraction of
the memory bandwidth, collectives on their links, partly hidden behind computation. The fractions are in efficiency.py;
what they multiply, the `Ideal`, has no fitted constant in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from bigtrain.config import ClassificationConfig, Config, DeepSpeedConfig, accumulation_steps, micro_batch
from bigtrain.plan import communication, flops
from bigtrain.plan.clusters import Cluster
from bigtrain.plan.efficiency import FIXED, HOOKS, Efficiency, measured_widths, of
from bigtrain.plan.sizes import Sizes, element_bytes, of_run, teacher

# Bytes that an optimizer step moves for each parameter: fp32 master and moments read and written, gradient read, weight
# written. Muon's matmuls come on top.
OPTIMIZER_BYTES = {"adamw": 28, "adamw8bit": 16, "adafactor": 20, "lion": 20, "muon": 24}
HOST_BYTES_PER_SECOND = 200e9  # of a node's main memory, for an optimizer on the CPU: eight channels of DDR4
GRADIENT_PASSES = 6  # over each gradient: into a bucket, divided there, out of it and onto the earlier ones
MUON_MATMULS = 15  # five Newton-Schulz iterations of three matmuls

FORMULAS = {
    "forward": ("2 m n k / (peak x efficiency) + scores + bytes / bandwidth", "arXiv 2204.02311, appendix B"),
    "backward": ("two matmuls for each of the forward's; 2.5 x the scores; 2 x the bytes", "arXiv 2205.14135"),
    "recompute": ("the blocks' forward once more", "arXiv 2205.05198, section 6"),
    "communication": ("max(exposed x C, C - computation), C from hierarchical rings", "arXiv 1910.02054, section 7"),
    "optimizer": ("bytes of parameters and moments / bandwidth, a rank's share", "arXiv 1910.02054, section 5"),
    "offload": ("bytes / PCIe and disk bandwidth, host optimizer / host bandwidth", "arXiv 2101.06840; 2104.07857"),
    "teacher": ("forward, of the teacher; no work of the model in mfu and hfu", "arXiv 1503.02531"),
}  # fmt: skip


@dataclass(frozen=True)
class Ideal:
    """Seconds of one micro-batch (forward and backward) and of one optimizer step with nothing lost anywhere."""

    matmul_forward: float
    matmul_backward: float
    matmul_recompute: float
    attention_forward: float
    attention_backward: float
    attention_recompute: float
    memory_forward: float
    memory_backward: float
    memory_recompute: float
    optimizer: float
    optimizer_matmul: float
    offload: float  # links and the host's optimizer
    communication_micro_batch: float  # of what is sent in every micro-batch
    communication_step: float  # of what is sent once a step
    layers: int
    accumulation: int


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, by part, and what follows from them."""

    parts: dict[str, float]  # by the names of FORMULAS; teacher only where there is one
    low: float
    high: float
    tokens: int  # of a step, over all ranks
    tokens_per_second: float
    mfu: float
    hfu: float
    model_flops: float  # of a step, over all ranks
    communication: float  # seconds of it, hidden or not
    notes: list[str] = field(default_factory=list)  # why the interval is wide

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def estimate(config: Config, cluster: Cluster, ranks: int, sizes: Sizes) -> StepTime:
    """Seconds of an optimizer step of `config` on `ranks` devices of `cluster`.

    sizes: what the run builds (sizes.of_run). Raises ConfigError for a model whose shape is not known.
    """
    found = _estimate(config, cluster, ranks, sizes)
    if (shorter := flops.shortened(config)) is None:
        return found
    least = _estimate(shorter, cluster, ranks, sizes).low
    full, short = flops.sequence_length(config), flops.sequence_length(shorter)
    note = (
        f"step time: the data is not prepared here, so that all examples are taken for {full} tokens long; the"
        f" interval begins at what {short} take"
    )
    return replace(found, low=min(found.low, least), notes=[*found.notes, note])


def _estimate(config: Config, cluster: Cluster, ranks: int, sizes: Sizes) -> StepTime:
    efficiency = assumed(config, cluster)
    ideal_step = ideal(config, cluster, ranks, sizes.total, sizes.trained)
    parts, communicated = combine(ideal_step, efficiency, overlapped(config, cluster))
    if taught := teacher_seconds(config, cluster, ranks):
        parts["teacher"] = taught
    total = sum(parts.values())
    work = flops.count(config, micro_batch(config, ranks))
    micro_batches = ranks * ideal_step.accumulation
    tokens = work.tokens * micro_batches
    peak = cluster.device.tflops(config.train.precision) * 1e12 * ranks
    fixed = parts_fixed(ideal_step, efficiency) / total
    margin, notes = _margin(config, cluster, ranks, efficiency, sizes.total, fixed)
    return StepTime(
        parts=parts, low=total / (1 + margin), high=total * (1 + margin), tokens=tokens,
        tokens_per_second=tokens / total,
        mfu=work.model * micro_batches / (peak * total), hfu=work.hardware * micro_batches / (peak * total),
        model_flops=work.model * micro_batches, communication=communicated, notes=notes,
    )  # fmt: skip


def teacher_seconds(config: Config, cluster: Cluster, ranks: int) -> float:
    """Of a step: the forward passes of a distillation's teacher over the student's sequences. 0 without one."""
    taught_by = teacher(config)
    if taught_by is None:
        return 0.0
    length = min(taught_by.model.max_seq_len, config.model.max_seq_len)
    alike = replace(taught_by, model=replace(taught_by.model, max_seq_len=length))  # type: ignore[arg-type]
    sizes = of_run(taught_by)
    parts, _ = combine(ideal(alike, cluster, ranks, sizes.total), assumed(alike, cluster), overlapped(alike, cluster))
    return parts["forward"]


def assumed(config: Config, cluster: Cluster) -> Efficiency:
    """The device's fractions. A layer's fixed seconds are those that were measured here, with gathered weights or
    without; else those of fully sharded runs in public tables, and what is left of them without is a guess (see the
    interval)."""
    precision = config.train.precision
    found, gathers = of(cluster.device, precision), gathers_layers(config)
    measured = cluster.device.efficiency
    narrow = measured.get(f"matmul_narrow_{precision}", measured.get("matmul_narrow"))
    if narrow is not None:
        dim = flops.our_model(config.model).dim
        found = replace(found, matmul=between(dim, measured_widths(cluster.device.is_cpu), (narrow, found.matmul)))
    if gathers and "layer_seconds_gathered" in measured:
        figures: dict[str, Any] = {name: measured.get(f"{name}_gathered", 0.0) for name in FIXED}
        return replace(found, **figures)
    if gathers == ("layer_seconds" in measured):
        return replace(found, layer_seconds=found.layer_seconds * (HOOKS if gathers else 1 / HOOKS))
    return found


def between(width: float, widths: tuple[int, int], values: tuple[float, float]) -> float:
    """Of `values` at two widths, that at `width`: along the width's logarithm, and level outside."""
    share = math.log(width / widths[0]) / math.log(widths[1] / widths[0])
    return values[0] + min(1.0, max(0.0, share)) * (values[1] - values[0])


def gathers_layers(config: Config) -> bool:
    """Whether each layer's weights are put together before it runs: ZeRO-3 and FSDP."""
    engine = config.engine
    return engine.stage == 3 if isinstance(engine, DeepSpeedConfig) else engine.parallel == "fsdp2"


def overlapped(config: Config, cluster: Cluster) -> bool:
    """Whether collectives run beside computation: on streams of their own, which a CPU has not."""
    engine = config.engine
    return not cluster.device.is_cpu and (not isinstance(engine, DeepSpeedConfig) or engine.overlap_comm)


def combine(ideal_step: Ideal, efficiency: Efficiency, overlap: bool) -> tuple[dict[str, float], float]:
    """Seconds by part, and of all communication, hidden or not."""
    one, steps = ideal_step, ideal_step.accumulation

    def computing(matmul: float, attention: float, memory: float, share: float) -> float:
        fixed = share * one.layers * efficiency.layer_seconds
        return steps * (
            matmul / efficiency.matmul + attention / efficiency.attention + memory / efficiency.memory + fixed
        )

    forward = computing(one.matmul_forward, one.attention_forward, one.memory_forward, 1 / 3)
    backward = computing(one.matmul_backward, one.attention_backward, one.memory_backward, 2 / 3)
    recompute = computing(one.matmul_recompute, one.attention_recompute, one.memory_recompute, 0.0)
    every, once = steps * one.communication_micro_batch, one.communication_step
    if overlap:  # what is sent once a step can hide behind the last micro-batch's backward pass only
        last_backward = (backward + recompute) / steps
        exposed = max(efficiency.exposed * every, every - (forward + backward + recompute))
        exposed += max(efficiency.exposed * once, once - last_backward)
    else:
        exposed = every + once
    parts = {
        "forward": forward,
        "backward": backward,
        "recompute": recompute,
        "communication": exposed,
        "optimizer": one.optimizer / efficiency.optimizer
        + one.optimizer_matmul / efficiency.matmul
        + one.layers * efficiency.layer_step_seconds
        + efficiency.step_seconds,
        "offload": one.offload,
    }
    return parts, every + once


def parts_fixed(one: Ideal, efficiency: Efficiency) -> float:
    """Seconds of a step that no arithmetic takes: hooks, launches, Python."""
    layers = one.layers * (one.accumulation * efficiency.layer_seconds + efficiency.layer_step_seconds)
    return layers + efficiency.step_seconds


def ideal(
    config: Config, cluster: Cluster, ranks: int, parameters: int, trained: int | None = None, precision: str = ""
) -> Ideal:
    """precision: of the blocks' matmuls, by default train.precision."""
    trained = parameters if trained is None else trained
    device, sequences = cluster.device, micro_batch(config, ranks)
    wide = device.tflops(config.train.precision) * 1e12
    peak = device.tflops(precision or config.train.precision) * 1e12
    bandwidth = device.memory_gb_per_second * 1e9
    element = element_bytes(config)
    tile = of(device).tile
    work = flops.operations(config, sequences)
    again = config.train.activation_checkpointing
    frozen = bool(config.train.lora.rank)
    forward = backward = recompute = 0.0
    for matmul in work.matmuls:
        # Roofline: a product that is too thin for the arithmetic units waits for its operands.
        rows, inputs, outputs = matmul.rows, matmul.inputs, matmul.outputs
        size = 2.0 * math.prod(flops.padded(each, tile) for each in (rows, inputs, outputs))
        moved = element * (rows * inputs + inputs * outputs + rows * outputs)
        one = matmul.count * max(size / (peak if matmul.in_block else wide), moved / bandwidth)
        forward += one
        backward += one if frozen and matmul.in_block else 2 * one
        recompute += one if again and matmul.in_block and matmul.again else 0.0
    attention = sum(scores.computed for scores in work.scores) / wide
    memory = flops.elementwise_bytes(config, sequences, element) / bandwidth
    copies = 0.0  # fractions that were fitted on whole steps have them in them, measured ones have not
    if device.efficiency and isinstance(config.engine, DeepSpeedConfig) and ranks > 1:
        copies = GRADIENT_PASSES * element * trained / bandwidth
    accumulation = accumulation_steps(config, ranks)
    layers = _layers(config)
    sent = communication.collectives(config, ranks, parameters, trained, layers)
    times = [(each, communication.seconds(each, cluster, ranks)) for each in sent]
    every = sum(seconds for each, seconds in times if each.times == accumulation and accumulation > 1)
    stage3 = all(each.kind != "all_reduce" for each in sent)
    if accumulation == 1:  # what every micro-batch sends hides behind all of it, the rest behind the backward pass
        every = sum(seconds for _, seconds in times) if stage3 else 0.0
    total = sum(seconds for _, seconds in times)
    offload, optimizer, products = _optimizer(config, cluster, ranks, trained, wide)
    return Ideal(
        matmul_forward=forward, matmul_backward=backward, matmul_recompute=recompute,
        attention_forward=attention, attention_backward=attention * flops.FLASH_BACKWARD,
        attention_recompute=attention if again else 0.0,
        memory_forward=memory, memory_backward=2 * memory + copies, memory_recompute=memory if again else 0.0,
        optimizer=optimizer, optimizer_matmul=products, offload=offload,
        communication_micro_batch=every / accumulation, communication_step=total - every,
        layers=layers, accumulation=accumulation,
    )  # fmt: skip


def _layers(config: Config) -> int:
    model = flops.our_model(config.model)
    return model.n_layers + getattr(model, "n_decoder_layers", 0)


def _optimizer(config: Config, cluster: Cluster, ranks: int, trained: int, peak: float) -> tuple[float, float, float]:
    """Ideal seconds of offloading, of the update on the device, and of the update's matmuls."""
    engine = config.engine
    sharded = engine.stage >= 1 if isinstance(engine, DeepSpeedConfig) else engine.parallel == "fsdp2"
    updated = trained / ranks if sharded else trained
    kind = config.optimizer.kind
    moved, products = OPTIMIZER_BYTES[kind] * updated, 0.0
    if kind == "muon":  # which multiplies the layers' matrices, and leaves the rest to AdamW
        hidden = of_run(config).hidden / max(trained, 1) * updated
        moved = OPTIMIZER_BYTES[kind] * hidden + OPTIMIZER_BYTES["adamw"] * (updated - hidden)
        products = MUON_MATMULS * 2.0 * hidden * flops.our_model(config.model).dim / peak
    links = sum(
        communication.transfer_seconds(each, cluster)
        for each in communication.transfers(config, ranks, trained, trained)
    )
    if isinstance(engine, DeepSpeedConfig) and engine.offload_optimizer != "none" and not cluster.device.is_cpu:
        return links + moved * min(ranks, cluster.devices_per_node) / HOST_BYTES_PER_SECOND, 0.0, products
    return links, moved / (cluster.device.memory_gb_per_second * 1e9), products


def _margin(
    config: Config, cluster: Cluster, ranks: int, efficiency: Efficiency, parameters: int, fixed: float
) -> tuple[float, list[str]]:
    """Half the width of the interval as a fraction, and a line for all that widens it.

    fixed: the share of a step that is hooks, launches and Python. 0.10 is the 90th percentile of the error on public
    rows of models that the constants were not fitted on.
    """
    margin, notes = 0.10, []
    model = flops.our_model(config.model)

    def widen(by: float, why: str) -> None:
        nonlocal margin
        margin += by
        notes.append(f"step time: {why}; interval +{by:.0%}")

    if cluster.device.is_cpu:
        if not cluster.device.efficiency:
            widen(0.5, "this CPU was not measured (bigtrain doctor --cluster-file FILE)")
        else:
            widen(0.1, "kernels of a CPU differ more by shape than those of a GPU")
        if fixed >= 0.1:
            widen(fixed, f"{fixed:.0%} of it is a small model's hooks, launches and Python, which vary with the load")
    elif not efficiency.validated:
        widen(0.25, f"{cluster.device.name} has no public rows here: taken for a Hopper GPU")
    engine = config.engine
    offloaded = isinstance(engine, DeepSpeedConfig) and (
        engine.offload_optimizer != "none" or engine.offload_parameters != "none"
    )
    if not cluster.device.is_cpu:
        if not isinstance(engine, DeepSpeedConfig) or engine.stage != 3:
            widen(0.05, "validated on fully sharded runs")
        if ranks > 128:
            widen(min(0.5, 0.05 * math.log2(ranks / 128)), f"{ranks} ranks, validated to 128")
        if not 1e8 <= parameters <= 7.5e10:
            widen(0.10, f"{parameters / 1e9:.3g}B parameters, validated from 0.1B to 70B")
        if model.max_seq_len < 512 or model.max_seq_len > 65536:
            widen(0.10, f"sequences of {model.max_seq_len} tokens, validated from 512 to 65,536")
        if model.kind != "decoder":
            widen(0.10, "validated on decoders")
    if offloaded:
        widen(0.30, "offload depends on the host's memory and disks")
    if config.train.compile:
        widen(0.10, "torch.compile fuses what is counted apart here")
    if config.optimizer.kind != "adamw":
        widen(0.10, f"optimizer={config.optimizer.kind}, validated with adamw")
    compress, task = config.compress, config.task
    if compress.distil is not None:
        known = teacher(config) is not None
        counted = (
            "the teacher's forward pass is" if known else "the teacher is no run on this machine and nothing of it is"
        )
        widen(0.10 if known else 1.0, f"compress.distil: {counted} counted")
    if compress.quantize is not None:
        widen(0.30, "compress.quantize: rounding the weights in every pass is not counted")
    if compress.prune is not None:
        widen(0.05, "compress.prune: masks and their renewal are not counted")
    if compress.float8 is not None:
        widen(0.50, f"compress.float8: its matmuls are counted as those of {config.train.precision}")
    if isinstance(task, ClassificationConfig) and task.adversarial != "none":
        passes = 1 + (task.adversarial_steps if task.adversarial == "pgd" else 1)
        widen(float(passes), f"task.adversarial={task.adversarial}: {passes} more passes over a batch are not counted")
    if isinstance(engine, DeepSpeedConfig) and engine.quantized_communication:
        widen(0.30, "engine.quantized_communication: sent in full is counted")
    if getattr(model, "unpadded", False):
        widen(0.50, "model.unpadded: padding is counted as if it were computed")
    if config.train.privacy.enabled:
        widen(1.0, "train.privacy: gradients example by example are not counted")
    return margin, notes
