"""Training throughput of bigtrain beside its peers: same model, same tokens, same global batch, in turns.

    python benchmarks/train_throughput.py [--layout 2x1|1x2|both] [--rounds 3] [--steps 8] [--json out.json]
    python benchmarks/train_throughput.py --model 1.3b --seq-len 1024 --global-batch 32 --micro-batch 8   # on a GPU

A layout is ranks x threads of each (on a GPU: ranks). Each round starts every variant once, one after the other,
because a machine's speed drifts between minutes; a variant's first steps are dropped and the others' median is its
speed in that round. Ratios are taken within rounds; the table shows the median over rounds.

    hf         Hugging Face Trainer + DeepSpeed ZeRO-2, bf16 with fp32 master weights, transformers' GPT2LMHeadModel
    bare       a bare DeepSpeed loop with bigtrain's model, ds_config and optimizer: what is left is bigtrain's overhead
    plain      plain PyTorch in pure bf16, no master weights (DDP on several ranks), a model as in nanoGPT
    plain_own  the same loop with bigtrain's model
    bigtrain   `bigtrain train`, step times from its metrics.jsonl
    *_compiled (on request) bare, plain and bigtrain with torch.compile

The column cpu is a rank's processor time for a step, all its threads: it hardly moves when a busy machine makes
everything slower, so with one thread per rank it compares variants where wall time cannot.

`plain` and `hf` run in the environment as it is; bare, plain_own and bigtrain in the one that bigtrain gives its ranks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
import yaml
from peers import trainer_zero2
from torch import Tensor, nn

from bigtrain import config
from bigtrain.config import Config, DecoderConfig
from bigtrain.data import Prepared, load_prepared, prepare
from bigtrain.data.loader import TrainLoader
from bigtrain.engine import optimizers
from bigtrain.engine.deepspeed import ds_config
from bigtrain.engine.peak import peak_flops
from bigtrain.hardware import Placement, cores, place
from bigtrain.launch.local import free_port, start_of
from bigtrain.models import build, flops_per_token

VARIANTS = ("hf", "bare", "plain", "plain_own", "bigtrain")
COMPILED = ("bare_compiled", "plain_compiled", "bigtrain_compiled")
MODELS = {  # name -> overrides of `bigtrain train`
    "gpt2_124m": ["model=gpt2_124m"],
    "1.3b": ["model=gpt2_1558m", "model.dim=2048", "model.n_layers=24", "model.n_heads=16"],  # GPT-3 XL's shape
    "gpt_1m": ["model=gpt_1m", "model.vocab_size=4096"],  # to try the benchmark itself
}
WARMUP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layout", default="both", help="2x1, 1x2, both, or any RANKSxTHREADS; on a GPU 1x1 ...")
    parser.add_argument("--model", choices=MODELS, default="gpt2_124m")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS + COMPILED, default=VARIANTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help=f"per variant and round, of which {WARMUP} are warm-up")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--global-batch", type=int, default=4, help="sequences per optimizer step, over all ranks")
    parser.add_argument("--micro-batch", type=int, help="sequences per rank and forward; default: all of a rank's")
    parser.add_argument("--json", type=Path, help="where every step time goes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        run_worker(json.loads(arguments.worker))
        return
    layouts = ["2x1", "1x2"] if arguments.layout == "both" else [arguments.layout]
    if torch.cuda.is_available() and arguments.layout == "both":
        layouts = ["1x1"]
    results = [measure(layout, arguments) for layout in layouts]
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


# ------------------------------------------------------------------------------------------- parent: the rounds


def measure(layout: str, arguments: argparse.Namespace) -> dict[str, Any]:
    ranks, threads = map(int, layout.split("x"))
    if not torch.cuda.is_available() and ranks * threads > cores():
        sys.exit(f"--layout {layout}: {ranks} ranks x {threads} threads on {cores()} cores")
    micro_batch = arguments.micro_batch or arguments.global_batch // ranks
    with tempfile.TemporaryDirectory() as directory:
        overrides = [
            *MODELS[arguments.model], "engine=zero2", "data=stdlib", "schedule=constant", "logger=quiet",
            f"model.max_seq_len={arguments.seq_len}", f"train.global_batch={arguments.global_batch}",
            f"train.micro_batch={micro_batch}", "train.precision=bf16", "train.steps=1000000",
            "schedule.warmup_steps=0", "train.eval_every=0",
            f"launch.ranks={ranks}", f"launch.threads_per_rank={threads}",
        ]  # fmt: skip
        command = [sys.executable, "-m", "bigtrain.cli", "train", "--cfg", "job", *overrides, f"run_dir={directory}"]
        settings = config.from_dict(yaml.safe_load(subprocess.check_output(command, text=True)))
        settings.data.prepared_dir = str(prepare(settings).directory)
        placement = place(settings.launch)
        tokens = arguments.global_batch * arguments.seq_len
        print(f"{arguments.model}, {layout} ({placement.device}), {tokens} tokens per step", flush=True)
        seconds: dict[str, list[list[float]]] = {variant: [] for variant in arguments.variants}
        cpu: dict[str, list[float]] = {variant: [] for variant in arguments.variants}
        memory: dict[str, float] = {}
        for round_index in range(arguments.rounds):
            for variant in arguments.variants:
                if variant.startswith("bigtrain"):
                    compiled = f"train.compile={str(variant.endswith('compiled')).lower()}"
                    run_dir = Path(directory) / f"{variant}-{round_index}"
                    found = run_bigtrain([*overrides, compiled], run_dir, arguments.steps)
                else:
                    found = run_ranks(variant, settings, placement, arguments.steps, Path(directory))
                seconds[variant].append(found["step_seconds"][WARMUP:])
                cpu[variant].append(found["cpu_seconds"])
                memory[variant] = max(found["peak_memory_gib"], memory.get(variant, 0.0))
                speed = f"{tokens / statistics.median(seconds[variant][-1]):10,.0f} tokens/s"
                print(f"  round {round_index + 1} {variant:17s}{speed}, {cpu[variant][-1]:.2f} s cpu", flush=True)
        model = settings.model
        assert isinstance(model, DecoderConfig)
        device = torch.device(placement.device)
        peak = peak_flops(device, torch.bfloat16) * (ranks if placement.device == "cuda" else 1)
        print_table(seconds, cpu, memory, tokens, flops_per_token(model) / peak)
    return {
        "model": arguments.model, "layout": layout, "device": placement.device, "tokens_per_step": tokens,
        "step_seconds": seconds, "cpu_seconds": cpu, "peak_memory_gib": memory,
    }  # fmt: skip


def print_table(
    seconds: dict[str, list[list[float]]],
    cpu: dict[str, list[float]],
    memory: dict[str, float],
    tokens: int,
    mfu: float,
) -> None:
    """`mfu`: model FLOPs utilisation at one token per second (on a CPU: of its measured matmul speed)."""
    medians = {variant: [statistics.median(steps) for steps in rounds] for variant, rounds in seconds.items()}
    print(f"\n{'variant':18s}{'tokens/s':>10s}{'best':>10s}{'MFU':>7s}{'GiB/rank':>10s}{'cpu':>7s}   speed relative to")
    for variant, rounds in medians.items():
        speed = tokens / statistics.median(rounds)
        best = tokens / min(min(steps) for steps in seconds[variant])
        ratios = []
        for peer in ("hf", "plain", "bare"):
            if peer in medians and peer != variant:
                ratio = statistics.median(b / a for a, b in zip(rounds, medians[peer], strict=True))
                ratios.append(f"{peer} {ratio:.2f}")
        print(
            f"{variant:18s}{speed:10,.0f}{best:10,.0f}{speed * mfu:7.1%}{memory[variant]:10.2f}"
            f"{statistics.median(cpu[variant]):7.2f}   {', '.join(ratios)}"
        )
    if "bare" in medians and "bigtrain" in medians:
        wall, processor = (
            statistics.median(ours / bare - 1 for ours, bare in zip(of["bigtrain"], of["bare"], strict=True))
            for of in (medians, cpu)
        )
        print(f"overhead of bigtrain over the bare DeepSpeed loop: {wall:+.1%} of step time, {processor:+.1%} of cpu")
    print(flush=True)


def run_ranks(variant: str, settings: Config, placement: Placement, steps: int, directory: Path) -> dict[str, Any]:
    """Start one process per rank on `run_worker`; returns what rank 0 measured."""
    output = directory / "worker.json"
    output.unlink(missing_ok=True)
    job = {"variant": variant, "config": config.to_dict(settings), "steps": steps, "output": str(output)}
    ours = variant.startswith(("bare", "plain_own"))
    environment = {**os.environ, **(start_of(settings, placement, "").environment if ours else {})}
    environment.pop("BIGTRAIN_PARENT_PID", None)
    environment |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(placement.ranks),
        "LOCAL_WORLD_SIZE": str(placement.ranks), "OMP_NUM_THREADS": str(placement.threads_per_rank),
        "DS_ACCELERATOR": placement.device, "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    if placement.device == "cpu":
        environment |= {"GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    with (directory / "worker.log").open("w") as log:
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", json.dumps(job)],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for rank in range(placement.ranks)
        ]
        failed = any([process.wait() for process in processes])
    if failed or not output.exists():
        sys.exit(f"{variant} failed:\n{(directory / 'worker.log').read_text()[-3000:]}")
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def run_bigtrain(overrides: list[str], run_dir: Path, steps: int) -> dict[str, Any]:
    """`bigtrain train` until it has logged `steps` steps; then it is told to end at once, without its last save."""
    command = [sys.executable, "-m", "bigtrain.cli", "train", *overrides, f"run_dir={run_dir}"]
    log = run_dir.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    metrics = run_dir / "metrics.jsonl"
    rows: list[str] = []
    cpu_at: dict[int, float] = {}  # a rank's processor time when that many steps were done
    while len(rows) < steps:
        if process.poll() is not None:
            sys.exit(f"bigtrain failed:\n{log.read_text()[-3000:]}")
        time.sleep(0.05)
        rows = metrics.read_text().splitlines() if metrics.exists() else []
        if rows and len(rows) not in cpu_at:
            cpu_at[len(rows)] = rank_cpu_seconds(process.pid)
    for _ in range(2):  # asked twice, it does not wait for the ranks
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    process.wait()
    first, last = min(step for step in cpu_at if step >= WARMUP), max(cpu_at)
    found = [json.loads(row) for row in rows[:steps]]
    return {
        "step_seconds": [row["perf/step_seconds"] for row in found],
        "cpu_seconds": (cpu_at[last] - cpu_at[first]) / (last - first),
        "peak_memory_gib": max(row["perf/peak_memory_gib"] for row in found),
    }


def rank_cpu_seconds(launcher: int) -> float:
    """Processor time of the first of the launcher's descendants that is a rank."""
    for process in psutil.Process(launcher).children(recursive=True):
        words = process.cmdline()
        if "bigtrain.worker" in words and "--module" not in words and process.children() == []:
            times = process.cpu_times()
            return float(times.user + times.system)
    raise RuntimeError("no rank of bigtrain is running")


# ------------------------------------------------------------------------------------- one rank of one variant


def run_worker(job: dict[str, Any]) -> None:
    settings, steps = config.from_dict(job["config"]), job["steps"]
    on_gpu = os.environ["DS_ACCELERATOR"] == "cuda"
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    prepared = load_prepared(Path(settings.data.prepared_dir or ""))
    name = job["variant"].removesuffix("_compiled")
    if name == "hf":
        seconds, cpu = hf_trainer(settings, prepared, steps, Path(settings.run_dir))
    else:
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
        loop = deepspeed_loop if name == "bare" else plain_loop
        step = loop(settings, device, own=name != "plain", compiled=job["variant"].endswith("_compiled"))
        seconds, cpu = time_steps(step, settings, prepared, device, steps)
    if rank == 0:
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = {
            "step_seconds": seconds,
            "cpu_seconds": statistics.mean(cpu[WARMUP:]),
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else kib / 2**20,
        }
        Path(job["output"]).write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)  # the orderly end of a few libraries takes seconds


Micro = list[tuple[Tensor, Tensor]]


class Clock:
    """Wall and processor time of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.start()

    def start(self) -> None:
        self.now = time.perf_counter(), time.process_time()

    def lap(self) -> None:
        before = self.now
        self.start()
        self.seconds.append(self.now[0] - before[0])
        self.cpu.append(self.now[1] - before[1])


def time_steps(
    step: Callable[[Micro], Tensor], settings: Config, prepared: Prepared, device: torch.device, steps: int
) -> tuple[list[float], list[float]]:
    """Each step's time, reading its data and its loss included, as bigtrain counts it."""
    loader, clock = make_loader(settings, prepared), Clock()
    for index in range(steps):
        batches = [{key: value.to(device) for key, value in batch.items()} for batch in loader.batches(index)]
        loss = step([(batch["tokens"], batch["targets"]) for batch in batches]).item()
        assert math.isfinite(loss)
        clock.lap()
    return clock.seconds, clock.cpu


def make_loader(settings: Config, prepared: Prepared) -> TrainLoader:
    train, length = settings.train, settings.model.max_seq_len
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    per_forward = config.micro_batch(settings, world_size)
    return TrainLoader(prepared, length, train.global_batch, per_forward, train.seed, rank, world_size)


def deepspeed_loop(settings: Config, device: torch.device, own: bool, compiled: bool) -> Callable[[Micro], Tensor]:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as bigtrain does: it would be built, never used
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    world_size = torch.distributed.get_world_size()
    assert isinstance(settings.model, DecoderConfig)
    model: nn.Module = build(settings.model)
    if compiled:
        model.compile()
    groups = optimizers.parameter_groups(model, settings.optimizer)
    optimizer = optimizers.build(settings.optimizer, groups, device, offloaded=False)
    chosen = ds_config(settings, world_size, device.type)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=chosen)

    def step(micro_batches: Micro) -> Tensor:
        total = torch.zeros((), device=device)
        for index, (tokens, targets) in enumerate(micro_batches):
            engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            loss, nll = engine(tokens, targets)
            engine.backward(loss / (targets.numel() * len(micro_batches)), scale_wrt_gas=False)
            total += nll
        engine.step()
        return total

    return step


def plain_loop(settings: Config, device: torch.device, own: bool, compiled: bool) -> Callable[[Micro], Tensor]:
    """Pure bf16: weights, gradients and Adam's moments, no float32 master copy; no gradient clipping."""
    assert isinstance(settings.model, DecoderConfig)
    model: nn.Module = build(settings.model) if own else ReferenceGPT(settings.model)
    model = model.to(device, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    if compiled:
        model.compile()
    if torch.distributed.get_world_size() > 1:
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    def step(micro_batches: Micro) -> Tensor:
        total = torch.zeros((), device=device)
        for tokens, targets in micro_batches:
            loss = model(tokens, targets)[0] / targets.numel() if own else model(tokens, targets)
            (loss / len(micro_batches)).backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


class ReferenceBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(self.norm1(x)).split(dim, dim=2)
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, dim))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class ReferenceGPT(nn.Module):
    """GPT-2 as nanoGPT has it, with what PyTorch offers: nn.Linear, SDPA, F.gelu, F.cross_entropy."""

    def __init__(self, model: DecoderConfig) -> None:
        super().__init__()
        assert model.vocab_size is not None
        self.tokens = nn.Embedding(model.vocab_size, model.dim)
        self.positions = nn.Embedding(model.max_seq_len, model.dim)
        self.blocks = nn.ModuleList(ReferenceBlock(model.dim, model.n_heads) for _ in range(model.n_layers))
        self.norm = nn.LayerNorm(model.dim)
        self.head = nn.Linear(model.dim, model.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.size(1), device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def hf_trainer(settings: Config, prepared: Prepared, steps: int, directory: Path) -> tuple[list[float], list[float]]:
    """The Trainer as its documentation sets it up with DeepSpeed: ZeRO-2, bf16, the rest "auto"."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    model, train = settings.model, settings.train
    assert isinstance(model, DecoderConfig)
    world_size = int(os.environ["WORLD_SIZE"])
    loader = make_loader(settings, prepared)
    rows: list[dict[str, Tensor]] = []
    while len(rows) < steps * train.global_batch:  # the Trainer deals rows out to the ranks and shifts the labels
        for batch in loader.batches(len(rows)):
            rows += [{"input_ids": tokens, "labels": tokens} for tokens in batch["tokens"]]
    arguments = TrainingArguments(
        output_dir=str(directory / "hf"), max_steps=steps,
        per_device_train_batch_size=config.micro_batch(settings, world_size),
        gradient_accumulation_steps=config.accumulation_steps(settings, world_size), learning_rate=3e-4,
        weight_decay=0.1, max_grad_norm=1.0, bf16=True, logging_steps=1, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=os.environ["DS_ACCELERATOR"] == "cpu",
        deepspeed=trainer_zero2(),
    )  # fmt: skip
    clock = Clock()

    class Laps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_log(self, *_: Any, **__: Any) -> None:  # after a step's loss has been read
            clock.lap()

    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=model.vocab_size, n_positions=model.max_seq_len, n_embd=model.dim, n_layer=model.n_layers,
            n_head=model.n_heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        )
    )  # fmt: skip
    Trainer(gpt2, arguments, train_dataset=rows, callbacks=[Laps()]).train()
    return clock.seconds[:steps], clock.cpu[:steps]


if __name__ == "__main__":
    main()
