"""Hours, money, energy and CO2 of a run; what a checkpoint weighs and how long training waits for it; what the trained
model then needs to be used."""

from __future__ import annotations

from dataclasses import dataclass

from bigtrain.config import AccelerateConfig, Config, DecoderConfig, Seq2SeqConfig, head_dim
from bigtrain.errors import ConfigError
from bigtrain.plan import communication, flops
from bigtrain.plan.clusters import Cluster
from bigtrain.plan.efficiency import HOOKS, of
from bigtrain.plan.sizes import Sizes, element_bytes

GIB = 2**30
SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Bill:
    hours: float
    device_hours: float
    cost: float  # US dollars
    energy_kwh: float
    kg_co2: float


def bill(hours: float, devices: int, cluster: Cluster) -> Bill:
    """Of `devices` for `hours`.

    energy = device hours x watts x PUE; CO2 = energy x the grid's intensity (arXiv 2302.13971, section 6). Every
    device is taken for at full load, and is paid for whether it computes or not.
    """
    device_hours = hours * devices
    energy_kwh = device_hours * cluster.device.watts / 1000 * cluster.pue
    cost = device_hours * cluster.price_per_device_hour
    return Bill(hours, device_hours, cost, energy_kwh, energy_kwh * cluster.kg_co2_per_kwh)


def hours_for(tokens: float, tokens_per_second: float) -> float:
    """Hours to train on so many tokens. Raises ConfigError for none."""
    if not tokens > 0:
        raise ConfigError("tokens", tokens, "must be above 0", "the number of tokens to train on, 140e9 for example")
    return tokens / tokens_per_second / SECONDS_PER_HOUR


# ---------------------------------------------------------------------------------------------- checkpoint

STATE_BYTES = {"adamw": 12, "adamw8bit": 6, "adafactor": 4, "lion": 8, "muon": 8}  # fp32 master and moments


SAVE_SECONDS = 0.05  # of the smallest save, that all ranks agree and name its files: 0.05 to 0.07 were measured


@dataclass(frozen=True)
class CheckpointCost:
    gib: float  # of one checkpoint, all ranks' files together
    write_seconds: float  # until it is on disk
    stall_seconds: float  # that training waits


def checkpoint(config: Config, cluster: Cluster, ranks: int, sizes: Sizes) -> CheckpointCost:
    """Weights in the training precision, and of what is trained fp32 master weights and the optimizer's moments.

    Accelerate's weights are fp32 and their own master (engine/accelerate.py). Written by every node to a disk of its
    own rate, of DDP by the first. With train.async_save training waits for the copy into host memory only, which a CPU
    makes at its memory bandwidth, else for the disk, as it always does with Accelerate.
    """
    engine, at_once = config.engine, not config.train.async_save
    per_node = min(ranks, cluster.devices_per_node)
    nodes = -(-ranks // per_node)
    if isinstance(engine, AccelerateConfig):
        element, master, at_once = 4, 0, True
        nodes = 1 if engine.parallel == "ddp" else nodes
    else:
        element = element_bytes(config)
        master = 0 if config.train.precision == "fp32" and engine.stage == 0 else 4
    size = element * sizes.total + (STATE_BYTES[config.optimizer.kind] - 4 + master) * sizes.trained
    if config.optimizer.kind == "muon":  # which leaves the rest to AdamW, with its second moment
        size += 4 * (sizes.trained - sizes.hidden)
    write = size / (nodes * cluster.disk_gb_per_second * 1e9)
    link = cluster.device.memory_gb_per_second if cluster.device.is_cpu else cluster.host_link_gb_per_second
    copy = size / ranks / (link * 1e9)
    return CheckpointCost(size / GIB, write + SAVE_SECONDS, SAVE_SECONDS + (write if at_once else min(copy, write)))


# ---------------------------------------------------------------------------------------------- inference


@dataclass(frozen=True)
class Inference:
    """Of the trained model in 16 bits on as few of the cluster's devices as hold it, weights split among them."""

    devices: int
    weights_gib: float
    kv_cache_gib: float  # of the whole batch at full length
    prefill_seconds: float  # from prompt to first token, the batch together
    decode_seconds: float  # of one more token for each sequence of the batch
    tokens_per_second: float  # generated, the batch together
    bound: str  # memory or compute: what one more token waits for


def inference(
    config: Config, cluster: Cluster, parameters: int, batch: int = 1, prompt: int | None = None
) -> Inference:
    """Latency of generating with `batch` sequences, prompts of `prompt` tokens (by default half of the longest).

    A CPU's launches and Python are a third of what a layer has beside arithmetic in training: its forward pass.
    Prefill is arithmetic, 2 P T; each further token reads all the weights and the cache once, so that decoding waits
    for memory until the batch is large (arXiv 2211.05102, section 2.1). KV cache: 2 x layers x kv_heads x head_dim x 2
    bytes a token. Raises ConfigError for an encoder, which generates nothing, and for what no node holds.
    """
    model = flops.our_model(config.model)
    if not isinstance(model, (DecoderConfig, Seq2SeqConfig)):
        raise ConfigError("model.kind", model.kind, "generates no text")
    if batch < 1:
        raise ConfigError("batch", batch, "must be at least 1")
    device, efficiency = cluster.device, of(cluster.device)
    length = model.max_seq_len
    prompt = length // 2 if prompt is None else prompt
    kv_heads = (isinstance(model, DecoderConfig) and model.n_kv_heads) or model.n_heads
    layers = model.n_layers + 2 * getattr(model, "n_decoder_layers", 0)
    cache_per_token = 2 * 2 * layers * kv_heads * head_dim(model)
    weights, cache = 2.0 * parameters, float(batch * length * cache_per_token)
    room = (device.memory_gib - device.context_gib) * GIB
    devices = max(1, -int(-(weights + cache) // room))
    if devices > cluster.devices:
        raise ConfigError(
            "cluster", cluster.name, f"{(weights + cache) / GIB:,.0f} GiB of weights and cache need {devices} devices"
        )
    peak = device.tflops("bf16") * 1e12 * devices
    bandwidth = device.memory_gb_per_second * 1e9 * devices * max(efficiency.memory, 0.6)
    scores = 4.0 * batch * prompt * (prompt + 1) / 2 * model.dim * layers
    arithmetic = 2.0 * parameters * batch * prompt / efficiency.matmul / peak + scores / efficiency.attention / peak
    middle = cache_per_token * batch * (prompt + length) / 2  # of the cache, half-way through the answer
    waiting = (weights + middle) / bandwidth
    computing = 2.0 * parameters * batch / efficiency.matmul / peak

    def talking(tokens: int) -> float:
        """Two all-reduces a layer of the activations, where the weights are split (Megatron-LM, arXiv 1909.08053,
        section 3); beyond a node they go over its network links too."""
        sent = 2.0 * tokens * model.dim
        return 2 * model.n_layers * communication.collective_seconds("all_reduce", sent, cluster, devices)

    fixed = efficiency.layer_seconds / 3 * layers if device.is_cpu else 0.0
    if "layer_seconds" not in device.efficiency:  # those of gathered layers (step_time.assumed)
        fixed /= HOOKS
    prefill = max(arithmetic, weights / bandwidth) + talking(batch * prompt) + fixed
    decode = max(waiting, computing) + talking(batch) + fixed
    return Inference(
        devices, weights / GIB, cache / GIB, prefill, decode, batch / decode,
        "memory" if waiting >= computing else "compute",
    )  # fmt: skip
