"""How much of what int4 costs is won back by training with it: the same run, with and without, over some seeds.

    python benchmarks/qat_recovery.py --seeds 3 --steps 600

dense: the run as it is; ptq: its weights quantized when it is finished; qat: a run of as many steps, the second half of
them with quantized weights. Held-out loss of each on the same data; recovered = (ptq - qat) / (ptq - dense). With a
scale for each 32 weights of a row, and with one for a whole row (--group-sizes 0). What int4 costs a model of 0.2M
parameters is little, 0.002 nats after 600 steps at the recipe's own rate and 0.009 after 1,500 at this one: as much as
two runs differ by, so that "recovered" is noise there. --bits 2 costs twenty times that. What follows `--` are settings
of the runs, as on bigtrain's command line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bigtrain import config as configuration
from bigtrain import tasks
from bigtrain.checkpoint import inference, newest
from bigtrain.compress.quantize import as_trained, quantize, scheme_of
from bigtrain.compress_config import QuantizeConfig
from bigtrain.data.example_loader import Share
from bigtrain.evaluate import measure

LR = 1e-2  # high for so small a model: it learns more in as many steps, and weights that int4 hurts


def train(run: Path, seed: int, steps: int, *overrides: str) -> None:
    command = [
        sys.executable, "-m", "bigtrain.cli", "train", "experiment=tiny", "logger=quiet", f"train.seed={seed}",
        f"train.steps={steps}", "train.eval_every=0", "launch.ranks=1", "launch.threads_per_rank=1",
        f"optimizer.lr={LR}", f"run_dir={run}", *overrides,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-3000:]}")


def loss(run: Path, post_training: QuantizeConfig | None = None) -> float:
    """Held-out, with the weights that the run trained with, or with them quantized now."""
    config, checkpoint = configuration.load(run / "config.yaml"), newest(run)
    assert checkpoint is not None
    task = tasks.build(config)
    model, device = inference.load(
        lambda: as_trained(task.build_model(config.model), config, checkpoint), checkpoint, "cpu"
    )
    if post_training is not None:
        quantize(model, scheme_of(post_training), post_training.include, post_training.exclude, "benchmark")
    return task.metrics(measure(task, model, Share(0, 1, 32, 32, config.train.seed), device))["eval/loss"]


def seed_rows(seed: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each size of groups; the dense run is the same for all."""
    name = arguments.runs / f"dense-{seed}"
    train(name, seed, arguments.steps, *arguments.settings)
    dense = loss(name)
    rows = []
    for size in arguments.group_sizes:
        quantized = QuantizeConfig(bits=arguments.bits, group_size=size or None)
        qat = arguments.runs / f"qat-{size}-{seed}"
        train(
            qat, seed, arguments.steps, "compress=[qat_int4]", f"compress.quantize.group_size={size or 'null'}",
            f"compress.quantize.bits={arguments.bits}",
            f"compress.quantize.start={arguments.steps // 2}", *arguments.settings,
        )  # fmt: skip
        row: dict[str, Any] = {
            "group": size or "row",
            "seed": seed,
            "dense": dense,
            "ptq": loss(name, quantized),
            "qat": loss(qat),
        }
        row["recovered"] = (row["ptq"] - row["qat"]) / (row["ptq"] - dense)
        rows.append(row)
        print(
            f"int{arguments.bits}, {f'groups of {size}' if size else 'whole rows':13s} seed {seed}: dense {dense:.4f}"
            f"  ptq {row['ptq']:.4f} ({row['ptq'] - dense:+.4f})  qat {row['qat']:.4f} ({row['qat'] - dense:+.4f})"
            f"  recovered {row['recovered']:.0%}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--bits", type=int, default=4, choices=(2, 4, 8), help="of a weight")
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[32, 0], help="0: one scale for a whole row")
    parser.add_argument("--runs", type=Path, default=Path("runs/qat_recovery"))
    parser.add_argument("--out", type=Path, default=Path("qat_recovery.json"))
    parser.add_argument("settings", nargs="*", help="after --: the runs' settings")
    arguments = parser.parse_args()
    began = time.perf_counter()
    rows = [row for seed in range(arguments.seeds) for row in seed_rows(seed, arguments)]
    summary = {}
    for size in arguments.group_sizes:
        found = [row["recovered"] for row in rows if row["group"] == (size or "row")]
        summary[str(size or "row")] = {"recovered_median": statistics.median(found), "recovered_least": min(found)}
        print(f"recovered, {size or 'row'}: {statistics.median(found):.0%} in the median, {min(found):.0%} at least")
    print(f"{time.perf_counter() - began:.0f} s")
    arguments.out.write_text(json.dumps({"steps": arguments.steps, "rows": rows, "summary": summary}, indent=1) + "\n")


if __name__ == "__main__":
    main()
