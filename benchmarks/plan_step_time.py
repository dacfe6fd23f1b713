"""Predicted against measured step time on this machine: `python benchmarks/plan_step_time.py [--cluster FILE]`.

The machine is measured (`bigtrain doctor --cluster-file`), a recipe is planned with that and really trained, two ranks
on a machine without GPUs, and the median of its later steps is set beside the plan; and so for each recipe, for a
machine's clock drifts by more in some minutes than the plan is to be off. With --cluster all are planned with one file.
Nothing in the plan is fitted on these runs. On a machine that does other things too the figures mean little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS, WARM = 14, 4
GPT = ["model=gpt_mini", "model.dim=512", "model.n_layers=6", "model.n_heads=8"]
SMALL = ["model=gpt_mini", "model.dim=256", "model.n_layers=4", "model.n_heads=4"]
LLAMA = [
    "model=llama_1b",
    "model.dim=512",
    "model.n_layers=6",
    "model.n_heads=8",
    "model.n_kv_heads=4",
    "model.ffn_dim=1408",
]
BERT = ["model=bert_tiny", "model.dim=256", "model.n_layers=4", "model.n_heads=4", "task=masked_lm"]
RECIPES = {
    "GPT 256 x 4, ZeRO-2, bf16": [*SMALL, "engine=zero2"],
    "GPT 256 x 4, ZeRO-2, fp32": [*SMALL, "engine=zero2", "train.precision=fp32"],
    "GPT 512 x 6, ZeRO-0, bf16": [*GPT, "engine=zero0"],
    "GPT 512 x 6, ZeRO-1, bf16": [*GPT, "engine=zero1"],
    "GPT 512 x 6, ZeRO-3, bf16": [*GPT, "engine=zero3"],
    "GPT 512 x 6, ZeRO-2, bf16, checkpointing": [*GPT, "engine=zero2", "train.activation_checkpointing=true"],
    "GPT 512 x 6, ZeRO-2, bf16, accumulation": [*GPT, "engine=zero2", "train.micro_batch=2"],
    "Llama 512 x 6, ZeRO-2, bf16": [*LLAMA, "engine=zero2"],
    "Llama 512 x 6, ZeRO-3, fp32": [*LLAMA, "engine=zero3", "train.precision=fp32", "train.global_batch=8"],
    "BERT 256 x 4, ZeRO-1, fp32": [*BERT, "engine=zero1", "train.precision=fp32"],
    "BERT 256 x 4, ZeRO-2, bf16": [*BERT, "engine=zero2"],
    "BERT 256 x 4, ZeRO-3, bf16": [*BERT, "engine=zero3"],
}
# As they are; planned again once a first run has prepared the data, whose lengths the plan then knows.
EXPERIMENTS = (
    "tiny", "bert_pretrain", "classification", "tagging", "question_answering", "instruction", "translation",
)  # fmt: skip
COMMON = [
    "model.max_seq_len=256", "data.tokenizer.vocab_size=4096", "train.global_batch=16", f"train.steps={STEPS}",
    "train.eval_batches=1", "data.held_out=0.01", "logger.progress=false",
]  # fmt: skip


def bigtrain(*arguments: str) -> str:
    command = [sys.executable, "-m", "bigtrain.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def measured(overrides: list[str], run: Path) -> float:
    """Median seconds of the later steps of a real run."""
    bigtrain("train", *overrides, f"run_dir={run}", "train.async_save=false")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["perf/step_seconds"] for row in rows if "perf/step_seconds" in row]
    return statistics.median(seconds[WARM:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cluster", type=Path, help="a file that bigtrain doctor wrote; default: measure now and again"
    )
    parser.add_argument("--only", default="", help="recipes whose name has this in it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cluster = arguments.cluster or Path(folder) / "here.yaml"
        errors = []
        print(f"{'':50}{'planned s':>10}{'real s':>9}{'error':>8}")
        recipes = RECIPES | {name: [f"experiment={name}"] for name in EXPERIMENTS}
        for number, (name, own) in enumerate(recipes.items()):
            if arguments.only not in name:
                continue
            overrides = [*COMMON, *own]
            if name in EXPERIMENTS:
                overrides = [*own, f"train.steps={STEPS}", "schedule.warmup_steps=0", "train.eval_every=0"]
                overrides += ["logger.progress=false", f"data.cache_dir={folder}/cache"]
                bigtrain("train", *overrides, "train.steps=1", f"run_dir={folder}/prepared-{name}")
            if arguments.cluster is None:
                bigtrain("doctor", "--cluster-file", str(cluster))
            planned = json.loads(bigtrain("plan", *overrides, f"cluster={cluster}", "output=json"))["step_seconds"]
            real = measured(overrides, Path(folder) / str(number))
            errors.append(planned / real - 1)
            print(f"{name:50}{planned:10.3f}{real:9.3f}{errors[-1]:+8.1%}", flush=True)
    sizes = sorted(map(abs, errors))
    print(f"error: median {statistics.median(sizes):.1%}, worst {sizes[-1]:.1%}")


if __name__ == "__main__":
    main()
