"""How much of what int4 costs is won back by training with it: the same run, with and without, over some seeds.

    python benchmarks/qat_recovery.py --seeds 3 --steps 600

dense: the run as it is; ptq: its weights quantized when it is finished; qat: a run of as many steps, the second half of
them with quantized weights. Held-out loss of each on the same data; recovered = (ptq - qat) / (ptq - dense).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from bigtrain import config as configuration
from bigtrain import tasks
from bigtrain.checkpoint import inference, newest
from bigtrain.compress.quantize import as_trained, quantize, scheme_of
from bigtrain.compress_config import QuantizeConfig
from bigtrain.data.example_loader import Share
from bigtrain.evaluate import measure

QUANTIZED = QuantizeConfig(bits=4, group_size=32)


def train(run: Path, seed: int, steps: int, *overrides: str) -> None:
    command = [
        sys.executable, "-m", "bigtrain.cli", "train", "experiment=tiny", "logger=quiet", f"train.seed={seed}",
        f"train.steps={steps}", "train.eval_every=0", "launch.ranks=1", f"run_dir={run}", *overrides,
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def loss(run: Path, post_training: bool = False) -> float:
    """Held-out, with the weights that the run trained with, or with them quantized now."""
    config, checkpoint = configuration.load(run / "config.yaml"), newest(run)
    assert checkpoint is not None
    task = tasks.build(config)
    model, device = inference.load(
        lambda: as_trained(task.build_model(config.model), config, checkpoint), checkpoint, "cpu"
    )
    if post_training:
        quantize(model, scheme_of(QUANTIZED), QUANTIZED.include, QUANTIZED.exclude, "benchmark")
    return task.metrics(measure(task, model, Share(0, 1, 32, 32, config.train.seed), device))["eval/loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--runs", type=Path, default=Path("runs/qat_recovery"))
    parser.add_argument("--out", type=Path, default=Path("qat_recovery.json"))
    arguments, overrides = parser.parse_known_args()
    rows = []
    for seed in range(arguments.seeds):
        dense, qat = arguments.runs / f"dense-{seed}", arguments.runs / f"qat-{seed}"
        train(dense, seed, arguments.steps, *overrides)
        train(
            qat, seed, arguments.steps, "compress=[qat_int4]", f"compress.quantize.start={arguments.steps // 2}",
            *overrides,
        )  # fmt: skip
        row = {"seed": seed, "dense": loss(dense), "ptq": loss(dense, post_training=True), "qat": loss(qat)}
        row["recovered"] = (row["ptq"] - row["qat"]) / (row["ptq"] - row["dense"])
        rows.append(row)
        print("  ".join(f"{name} {value:.4f}" for name, value in row.items()), flush=True)
    recovered = [row["recovered"] for row in rows]
    found = {"rows": rows, "recovered_median": statistics.median(recovered), "recovered_least": min(recovered)}
    arguments.out.write_text(json.dumps(found, indent=1))
    print(f"recovered: {found['recovered_median']:.0%} in the median, {found['recovered_least']:.0%} at least")


if __name__ == "__main__":
    main()
