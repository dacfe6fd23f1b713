"""The planner's estimates beside what others have measured and published: `python benchmarks/plan_ground_truth.py`.

The figures lie in benchmarks/ground_truth with their sources. Constants are never fitted on the rows that they are
tested on: throughput is predicted for each model with the constants of all the others (leave one model out), at every
device at once. `--fit` prints the constants of all rows together, which bigtrain/plan/efficiency.py holds.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import plan_accuracy
from scipy.optimize import lsq_linear

from bigtrain.config import Config, DecoderConfig, DeepSpeedConfig, TrainConfig, from_dict, micro_batch
from bigtrain.plan import clusters, communication, flops, memory, money, sizes, step_time
from bigtrain.plan.efficiency import AMPERE, HOPPER, Efficiency

TABLES = Path(__file__).parent / "ground_truth"
MPT = {  # model -> dim, layers, heads: the yamls of scripts/train/yamls/pretrain
    "125m": (768, 12, 12), "350m": (1024, 24, 16), "760m": (1536, 24, 12), "1b": (2048, 24, 16), "3b": (2560, 32, 20),
    "7b": (4096, 32, 32), "13b": (5120, 40, 40), "30b": (7168, 48, 56), "70b": (8192, 80, 64),
}  # fmt: skip
MPT_VOCABULARY = 50368
CLUSTERS = {"a100_40gb": "a100_40gb", "a100_80gb": "a100_80gb", "h100_80gb": "h100"}


def read(table: str) -> list[dict[str, str]]:
    lines = (TABLES / f"{table}.csv").read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


@dataclass(frozen=True)
class Errors:
    """Relative errors, signed."""

    values: np.ndarray

    @property
    def mean(self) -> float:
        return float(np.abs(self.values).mean())

    @property
    def p90(self) -> float:
        return float(np.quantile(np.abs(self.values), 0.9))

    @property
    def worst(self) -> float:
        return float(np.abs(self.values).max())

    def __str__(self) -> str:
        return f"{len(self.values):4d} rows   mean {self.mean:6.2%}   p90 {self.p90:6.2%}   worst {self.worst:6.2%}"


# ----------------------------------------------------------------------------------------- throughput


def decoder_config(
    dim: int, layers: int, heads: int, vocabulary: int, length: int, batch: int, micro_batch: int, checkpointing: bool
) -> Config:
    """A GPT with biases and learned positions under ZeRO-3 in bf16."""
    model = DecoderConfig(dim=dim, n_layers=layers, n_heads=heads, vocab_size=vocabulary, max_seq_len=length)
    train = TrainConfig(global_batch=batch, micro_batch=micro_batch, activation_checkpointing=checkpointing)
    return Config(model=model, engine=DeepSpeedConfig(stage=3), train=train)


def gpt_parameters(config: Config) -> int:
    """12 L d^2 + 13 L d + (V + T + 2) d: weights, biases, norms, embeddings."""
    model = flops.our_model(config.model)
    assert model.vocab_size is not None
    dim = model.dim
    return model.n_layers * (12 * dim**2 + 13 * dim) + (model.vocab_size + model.max_seq_len + 2) * dim


@dataclass(frozen=True)
class Row:
    """A row of llm-foundry's tables, with what the planner makes of it before any constant."""

    model: str
    generation: str  # A or H
    fp8: bool
    tokens_per_second: float
    tokens: int  # of a step
    ideal: step_time.Ideal

    @property
    def seconds(self) -> float:
        return self.tokens / self.tokens_per_second


def rows() -> list[Row]:
    found = []
    for line in read("llm_foundry"):
        dim, layers, heads = MPT[line["model"]]
        gpus, micro_batch, accumulation = (int(line[key]) for key in ("gpus", "micro_batch", "accumulation"))
        length, batch = int(line["seq_len"]), gpus * micro_batch * accumulation
        checkpointing = line["activation_checkpointing"] == "1"
        config = decoder_config(dim, layers, heads, MPT_VOCABULARY, length, batch, micro_batch, checkpointing)
        cluster = clusters.find(CLUSTERS[line["gpu"]]).resized(gpus)
        precision = "fp8" if line["precision"] == "fp8" else ""
        ideal = step_time.ideal(config, cluster, gpus, gpt_parameters(config), precision=precision)
        found.append(
            Row(
                line["model"], line["gpu"][0].upper(), bool(precision), float(line["tokens_per_second"]),
                batch * length, ideal,
            )
        )  # fmt: skip
    return found


# One unknown each, and what is physically possible: no kernel beats its data sheet, none is ten times slower.
UNKNOWNS = {
    "matmul A": (1.05, 10), "matmul H": (1.05, 10), "matmul H fp8": (1.05, 10), "attention A": (1, 10),
    "attention H": (1, 10), "memory": (1.05, 1.7), "optimizer": (1, 8), "layer A": (0, 0.01), "layer H": (0, 0.01),
    "exposed": (0, 0.6),
}  # fmt: skip


def features(row: Row) -> dict[str, float]:
    """Seconds of a step are the sum of these times the unknowns (step_time.combine, linear)."""
    one, times, kind = row.ideal, row.ideal.accumulation, row.generation
    matmul = times * (one.matmul_forward + one.matmul_backward + one.matmul_recompute)
    attention = times * (one.attention_forward + one.attention_backward + one.attention_recompute)
    memory = times * (one.memory_forward + one.memory_backward + one.memory_recompute)
    return {
        f"matmul {kind}{' fp8' if row.fp8 else ''}": matmul,
        f"attention {kind}": attention,
        "memory": memory,
        "optimizer": one.optimizer,
        f"layer {kind}": float(times * one.layers),
        "exposed": times * one.communication_micro_batch + one.communication_step,
    }


def fit(sample: Sequence[Row]) -> dict[str, float]:
    """The unknowns with the smallest sum of relative errors (least squares, reweighted), within their bounds."""
    names = list(UNKNOWNS)
    matrix = np.array([[features(row).get(name, 0.0) for name in names] for row in sample])
    matrix /= np.array([[row.seconds] for row in sample])
    weights = np.ones(len(sample))
    low, high = zip(*UNKNOWNS.values(), strict=True)
    for _ in range(15):
        solution = lsq_linear(matrix * weights[:, None], weights, bounds=(low, high)).x
        weights = 1 / np.sqrt(np.maximum(np.abs(matrix @ solution - 1), 0.01))
    return dict(zip(names, solution, strict=True))


def efficiency(row: Row, unknowns: dict[str, float]) -> Efficiency:
    kind = row.generation
    return replace(
        AMPERE if kind == "A" else HOPPER,
        matmul=1 / unknowns[f"matmul {kind}{' fp8' if row.fp8 else ''}"],
        attention=1 / unknowns[f"attention {kind}"],
        memory=1 / unknowns["memory"],
        optimizer=1 / unknowns["optimizer"],
        layer_seconds=unknowns[f"layer {kind}"],
        exposed=unknowns["exposed"],
    )


def predicted(row: Row, unknowns: dict[str, float]) -> float:
    parts, _ = step_time.combine(row.ideal, efficiency(row, unknowns), overlap=True)
    return sum(parts.values())


def throughput_errors() -> tuple[list[Row], Errors]:
    """Of every row, with constants from the rows of other models."""
    found = rows()
    errors = np.zeros(len(found))
    for model in MPT:
        unknowns = fit([row for row in found if row.model != model])
        for index, row in enumerate(found):
            if row.model == model:
                errors[index] = row.seconds / predicted(row, unknowns) - 1  # of tokens per second
    return found, Errors(errors)


def rule_of_thumb_errors(found: list[Row]) -> Errors:
    """What C = 6 P D makes of the same rows (Kaplan et al., arXiv 2001.08361; EleutherAI's cookbook, calc/README.md)
    with the best single utilisation of each device, found on the rows of other models: the yardstick."""
    lines = read("llm_foundry")
    ideal = []
    for line, row in zip(lines, found, strict=True):
        dim, layers, heads = MPT[line["model"]]
        config = decoder_config(dim, layers, heads, MPT_VOCABULARY, int(line["seq_len"]), 1, 1, False)
        cluster = clusters.find(CLUSTERS[line["gpu"]])
        peak = cluster.device.tflops("fp8" if row.fp8 else "bf16") * 1e12 * int(line["gpus"])
        ideal.append(6 * gpt_parameters(config) * row.tokens / peak)
    groups = [(row.generation, row.fp8) for row in found]
    errors = []
    for index, row in enumerate(found):
        others = [
            other.seconds / ideal[at]
            for at, other in enumerate(found)
            if other.model != row.model and groups[at] == groups[index]
        ]
        errors.append(row.seconds / (ideal[index] * float(np.median(others))) - 1)
    return Errors(np.array(errors))


# ------------------------------------------------------------------------------ Megatron: FLOPs and ZeRO-3


def megatron_config(line: dict[str, str]) -> Config:
    """Of a row with dim, layers, heads and batch, as those papers have it: 2,048 tokens of 51,200 words."""
    dim, layers, heads, batch = (int(line[key]) for key in ("dim", "layers", "heads", "batch"))
    return decoder_config(dim, layers, heads, 51200, 2048, batch, int(line.get("micro_batch", 1)), True)


def megatron_flops(config: Config, batch: int) -> float:
    """Their count: model FLOPs and the whole forward of every block again, scores as the full square (eq. 3)."""
    work = flops.operations(config, batch)
    again = sum(each.flops for each in work.matmuls if each.in_block) + sum(each.square for each in work.scores)
    return flops.count(config, batch).model + again


def korthikanti_errors() -> Errors:
    """Of the MFU that follows from their iteration times."""
    errors = []
    for line in read("korthikanti_table5"):
        model = flops.count(megatron_config(line), int(line["batch"])).model
        mfu = model / (float(line["iteration_seconds"]) * int(line["gpus"]) * 312e12)
        errors.append(mfu / (float(line["mfu_percent"]) / 100) - 1)
    return Errors(np.array(errors))


def megatron_parameters() -> list[tuple[float, float]]:
    """(published, counted) billions of table 1."""
    counted = []
    for line in read("megatron_sc21_table1"):
        model = flops.our_model(megatron_config(line).model)
        counted.append((float(line["parameters_billions"]), sizes.of_model(model).total / 1e9))
    return counted


def zero3_errors() -> Errors:
    """Of DeepSpeed's step times of 2021: max(arithmetic, what each rank sends / its share of the network).

    Arithmetic runs at the mean rate of table 1, Megatron's own rows, which these are not. What share of the links that
    DeepSpeed reached is taken for each row from the other rows that waited for the network.
    """
    rate = float(np.mean([float(line["tflops_per_gpu"]) for line in read("megatron_sc21_table1")])) * 1e12
    arithmetic, sent, measured = [], [], []
    for line in read("megatron_sc21_zero3"):
        config, gpus, batch = megatron_config(line), int(line["gpus"]), int(line["batch"])
        parameters = sizes.of_model(flops.our_model(config.model)).total
        layers = int(line["layers"])
        collectives = communication.collectives(config, gpus, parameters, parameters, layers)
        sent.append(sum(each.sent_per_rank(gpus) for each in collectives))
        arithmetic.append(megatron_flops(config, batch) / (gpus * rate))
        measured.append(float(line["training_days"]) * 86400 / (300e9 / (batch * 2048)))
    waiting = [index for index, seconds in enumerate(measured) if seconds > 1.25 * arithmetic[index]]
    errors = []
    for index, seconds in enumerate(measured):
        bandwidth = float(np.mean([sent[other] / measured[other] for other in waiting if other != index]))
        errors.append(max(arithmetic[index], sent[index] / bandwidth) / seconds - 1)
    return Errors(np.array(errors))


# ------------------------------------------------------------------------------------------ energy, memory


def energy_errors() -> Errors:
    """Of MWh and of tonnes of CO2 of LLaMA's table 15, which is printed without decimals."""
    errors = []
    for line in read("llama_energy"):
        cluster = clusters.find("a100_80gb")
        assert cluster.device.watts == float(line["gpu_watts"])
        bill = money.bill(float(line["gpu_hours"]), 1, cluster)
        errors += [bill.energy_kwh / 1000 / float(line["mwh"]) - 1, bill.kg_co2 / 1000 / float(line["tonnes_co2"]) - 1]
    return Errors(np.array(errors))


def zero_states_gb(parameters: float, ranks: int, stage: int) -> float:
    """GB of model states of one rank, as the planner's memory model has them: what table 1 counts."""
    # Of equal tensors none reaches into two ranks' partitions, which would hold its gradient whole.
    shape = (2 * math.ceil(parameters / 2 / 1024), 1)
    tensors = tuple(sizes.Parameter(f"blocks.{index}.weight", shape, "attention") for index in range(1024))
    # The paper's stage 1 holds all gradients, which DeepSpeed does where it accumulates.
    batches = 2 if stage == 1 else 1
    train = TrainConfig(global_batch=batches * ranks, micro_batch=1)
    config = Config(model=DecoderConfig(vocab_size=64, n_layers=1), engine=DeepSpeedConfig(stage=stage), train=train)
    found = memory.estimate(config, ranks, sizes.Sizes(tensors), "cuda")
    moments = {moment.name: moment.parts for moment in found.moments}
    gradients = moments["backward" if stage == 1 else "end of backward"].get("gradients", 0)
    if stage == 3:
        gradients = found.states["gradients"]
    return (sum(found.states[name] for name in ("parameters", "master", "optimizer")) + gradients) / 1e9


def as_printed(printed: str, value: float) -> bool:
    """Whether `value` rounds, or is cut off, to what a table prints."""
    scale = 10 ** len(printed.partition(".")[2])
    return round(float(printed) * scale) in (math.floor(value * scale + 0.5), math.floor(value * scale + 1e-9))


def zero_table() -> list[tuple[str, float]]:
    """(printed, ours) for all 54 figures of the ZeRO paper's table 1, in GB."""
    found = []
    for line in read("zero_table1"):
        parameters, ranks = float(line["parameters_billions"]) * 1e9, int(line["ranks"])
        for stage in (1, 2, 3):
            found.append((line[f"stage{stage}_gb"], zero_states_gb(parameters, ranks, stage)))
    return found


# ------------------------------------------------------------------------------------- memory, beside peers

PEERS = ("bigtrain plan", "DeepSpeed", "accelerate", "EleutherAI")
MEASURED = (  # of plan_accuracy's recipes
    "GPT, ZeRO-2, bf16, checkpointing",
    "GPT, ZeRO-3, bf16",
    "Llama, ZeRO-2, bf16",
    "Llama, ZeRO-3, fp32",
    "BERT, ZeRO-2, bf16",
)


@dataclass(frozen=True)
class Compared:
    """One memory of one rank, and relative errors, signed, of what each of PEERS says; None: it says nothing."""

    what: str
    truth: str
    errors: tuple[float | None, ...]


def peers(parameters: int, largest: int, ranks: int, stage: int, element: int, rest: float) -> list[float | None]:
    """Bytes of a rank. largest: elements of the largest layer; rest: what EleutherAI adds to the states.

    DeepSpeed has estimators of the states of stages 2 and 3. accelerate's (`estimate-memory`) knows neither ranks nor
    stages nor batches. EleutherAI's cookbook (calc/calc_transformer_mem.py) has fp32 gradients.
    """
    from accelerate.commands.estimate import estimate_training_usage
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    deepspeed = None
    if stage == 2:
        deepspeed = float(estimate_zero2_model_states_mem_needs(parameters, ranks, 1, cpu_offload=False)[1])
    if stage == 3:
        deepspeed = float(estimate_zero3_model_states_mem_needs(parameters, largest, ranks, 1, False, False)[1])
    usage = estimate_training_usage(4 * parameters, "float32" if element == 4 else "bfloat16")
    weights, gradients, optimizer = (1 / ranks if stage >= least else 1.0 for least in (3, 2, 1))
    states = parameters * (element * weights + 4 * gradients + 12 * optimizer)
    return [deepspeed, float(max(usage.values())), states + rest]


def peers_on_zero_table() -> list[Compared]:
    """All 54 figures of the ZeRO paper's table 1, which are of model states alone."""
    found = []
    for line in read("zero_table1"):
        parameters, ranks = int(float(line["parameters_billions"]) * 1e9), int(line["ranks"])
        for stage in (1, 2, 3):
            truth = float(line[f"stage{stage}_gb"])
            said = [zero_states_gb(parameters, ranks, stage) * 1e9, *peers(parameters, 0, ranks, stage, 2, 0.0)]
            what = f"{line['parameters_billions']}B, ZeRO-{stage}, {ranks} ranks, states"
            found.append(Compared(what, f"{truth:g} GB", _errors(said, truth * 1e9)))
    return found


def peers_on_real_peaks() -> list[Compared]:
    """Peaks of real ranks, measured now (plan_accuracy.py says how). Each estimator is told the run's own numbers."""
    ranks, found = 2, []
    real = plan_accuracy.in_ranks([plan_accuracy.RECIPES[name] for name in MEASURED], ranks)
    for number, name in enumerate(MEASURED):
        recipe = plan_accuracy.RECIPES[name]
        config = from_dict(recipe)
        assert isinstance(config.engine, DeepSpeedConfig)
        counted = sizes.of_run(config)
        element, stage = 4 if config.train.precision == "fp32" else 2, config.engine.stage
        rest = _eleuther_rest(config, element, ranks, counted.total)
        largest = max(each.count for each in counted.parameters)
        peak = max(of_rank[number]["peak"] for of_rank in real)
        ours = float(plan_accuracy.planned(recipe, ranks).peak.total)
        said = [ours, *peers(counted.total, largest, ranks, stage, element, rest)]
        found.append(Compared(f"{name}, {ranks} ranks, peak", f"{peak / 2**20:.1f} MiB", _errors(said, peak)))
    return found


def _eleuther_rest(config: Config, element: int, ranks: int, parameters: int) -> float:
    """Bytes of its buckets, gathered weights and activations, with the run's own sizes in place of its defaults."""
    model, engine = flops.our_model(config.model), config.engine
    assert isinstance(engine, DeepSpeedConfig)
    activations = 16 * element + 2.0
    if not config.train.activation_checkpointing:
        activations += (2 * element + 1) * model.n_heads * model.max_seq_len / model.dim
    saved = model.max_seq_len * micro_batch(config, ranks) * model.dim * model.n_layers * activations
    return saved + engine.bucket_mib * 2**20 + (min(parameters, memory.LIVE) * element if engine.stage == 3 else 0)


def _errors(said: Sequence[float | None], truth: float) -> tuple[float | None, ...]:
    return tuple(None if bytes_ is None else bytes_ / truth - 1 for bytes_ in said)


def of_peer(rows: Sequence[Compared], peer: str) -> Errors:
    """Its errors in the rows of which it says anything."""
    every = (row.errors[PEERS.index(peer)] for row in rows)
    return Errors(np.array([error for error in every if error is not None]))


def peers_table(rows: Sequence[Compared]) -> str:
    lines = [f"{'':50}{'truth':>11}" + "".join(f"{peer:>15}" for peer in PEERS)]
    for row in rows:
        cells = "".join(f"{'-' if error is None else f'{error:+.1%}':>15}" for error in row.errors)
        lines.append(f"{row.what:50}{row.truth:>11}{cells}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- print


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fit", action="store_true", help="print the constants for bigtrain/plan/efficiency.py")
    arguments = parser.parse_args()
    found, throughput = throughput_errors()
    if arguments.fit:
        for name, value in fit(found).items():
            inverse = f"   1/x = {1 / value:.3f}" if not name.startswith(("layer", "exposed")) else ""
            print(f"{name:<16}{value:9.4g}{inverse}")
        return
    print("Tokens per second, llm-foundry, one model left out at a time")
    print(f"  bigtrain plan                   {throughput}")
    for name, gpu in (("A100", "a100"), ("H100", "h100")):
        chosen = [index for index, line in enumerate(read("llm_foundry")) if line["gpu"].startswith(gpu)]
        print(f"    {name}                          {Errors(throughput.values[chosen])}")
    print(f"  6 P D at one utilisation        {rule_of_thumb_errors(found)}")
    print("Step time of ZeRO-3 on 384 to 2,240 A100, Megatron SC21 table 2, one row left out at a time")
    print(f"  bigtrain plan                   {zero3_errors()}")
    print("MFU from iteration times, Korthikanti et al. table 5")
    print(f"  bigtrain plan                   {korthikanti_errors()}")
    print("Energy and CO2, LLaMA table 15")
    print(f"  bigtrain plan                   {energy_errors()}")
    pairs = zero_table()
    same = sum(as_printed(printed, value) for printed, value in pairs)
    print(f"Model states, ZeRO table 1: {same} of {len(pairs)} figures as printed")
    counted = megatron_parameters()
    same = sum(as_printed(f"{said:.1f}", ours) for said, ours in counted)
    print(f"Parameters, Megatron SC21 table 1: {same} of {len(counted)} as printed")
    print(
        "Memory of a rank, error of each estimator (-: says nothing; DeepSpeed's and accelerate's know no activations)"
    )
    real, states = peers_on_real_peaks(), peers_on_zero_table()
    print(peers_table([*real, *states]))
    for name, rows in (("real peaks", real), ("ZeRO table 1", states)):
        for peer in PEERS:
            print(f"  {name:<16}{peer:<16}{of_peer(rows, peer)}")


if __name__ == "__main__":
    main()
