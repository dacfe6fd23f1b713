"""Every recipe that runs offline, a few steps or in full: seconds per step, memory, and its metric beside a baseline.

    python benchmarks/recipes.py                              # a few steps of each, for time and memory
    python benchmarks/recipes.py --full --recipes translation # as the recipe is: its metric too

s/step is the median of the steps after the first ones, GiB/rank the peak of rank 0 (on a CPU its resident memory,
libraries included). The metric is that of the last, whole evaluation; the baseline knows nothing: the most frequent
label, no entity at all, no answer ever, the source copied, one in two, or all tokens alike.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARMUP = 3
Result = dict[str, Any]
Baseline = Callable[[Result], float]


def uniform(result: Result) -> float:
    """The loss of all tokens alike, in nats. A vocabulary of 4,096 is what the recipes' tokenizers have."""
    return math.log(4096)


RECIPES: dict[str, tuple[str, Baseline]] = {  # -> its metric, and what is reached without learning
    "tiny": ("eval/loss", lambda result: math.log(512)),
    "bert_pretrain": ("eval/sentence_accuracy", lambda result: 0.5),
    "bert_tiny_pretrain": ("eval/sentence_accuracy", lambda result: 0.5),
    "classification": ("eval/accuracy", lambda result: result["eval/majority"]),
    "tagging": ("eval/f1", lambda result: 0.0),
    "question_answering": ("eval/exact_match", lambda result: result["eval/none_exact_match"]),
    "instruction": ("eval/loss", uniform),
    "translation": ("eval/bleu", lambda result: result["eval/copy_bleu"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--steps", type=int, default=20, help=f"of each, {WARMUP} of them not timed")
    parser.add_argument("--full", action="store_true", help="as many steps as the recipe has")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where the numbers go")
    parser.add_argument("overrides", nargs="*", help="further settings of every run, as on bigtrain's command line")
    arguments = parser.parse_args()
    if not arguments.full and arguments.steps <= WARMUP:
        parser.error(f"--steps {arguments.steps}: more than {WARMUP} are needed")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        print(f"{'recipe':20s}{'steps':>7s}{'s/step':>9s}{'GiB/rank':>10s}{'total s':>9s}   metric", flush=True)
        for recipe in arguments.recipes:
            row = measure(recipe, arguments, Path(directory))
            rows.append(row)
            print(
                f"{recipe:20s}{row['steps']:7d}{row['step_seconds']:9.3f}{row['peak_memory_gib']:10.2f}"
                f"{row['total_seconds']:9.1f}   {row['metric']} {row['value']:.4f}"
                f", without learning {row['baseline']:.4f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(recipe: str, arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    run_dir = directory / recipe
    short = [] if arguments.full else [f"train.steps={arguments.steps}", "schedule.warmup_steps=0"]
    command = [
        sys.executable, "-m", "bigtrain.cli", "train", f"experiment={recipe}", f"launch.ranks={arguments.ranks}",
        "train.eval_every=0", "logger=quiet", f"run_dir={run_dir}", *short, *arguments.overrides,
    ]  # fmt: skip
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{recipe} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    result: Result = json.loads((run_dir / "result.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "perf/step_seconds" in line]
    metric, baseline = RECIPES[recipe]
    return {
        "recipe": recipe, "steps": result["train/steps"],
        "step_seconds": statistics.median(line["perf/step_seconds"] for line in steps[WARMUP:]),
        "peak_memory_gib": max(line["perf/peak_memory_gib"] for line in steps),
        "total_seconds": time.perf_counter() - started,
        "metric": metric, "value": result[metric], "baseline": baseline(result),
    }  # fmt: skip


if __name__ == "__main__":
    main()
