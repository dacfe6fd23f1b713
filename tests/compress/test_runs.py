"""A sparse run by the command: exact in metrics.jsonl, continued at another stage and world size, kept as it is."""

from __future__ import annotations

from pathlib import Path

from bigtrain.checkpoint import newest
from bigtrain.checkpoint.weights import iterate_weights
from bigtrain.compress.schedule import fraction
from bigtrain.compress_config import PruneConfig
from bigtrain.config import load
from tests.runs import TINY, bigtrain, metrics, result


def test_a_sparse_run_from_start_to_end(tmp_path: Path, data_cache: Path) -> None:
    run = tmp_path / "run"
    always = [*TINY, f"run_dir={run}", f"data.cache_dir={data_cache}", "train.steps=9", "logger=quiet",
              "train.eval_every=0"]  # fmt: skip
    ramp = "compress.prune.schedule={begin: 1, end: 6, every: 2}"
    sparse = ["compress=[prune_global]", "compress.prune.sparsity=0.75", ramp]
    bigtrain("train", *always, *sparse, "train.stop_at=4")
    assert '"compress/prune.safetensors"' in (run / "checkpoints/step-00000004/manifest.json").read_text()
    bigtrain("train", *always, *sparse, "engine=zero3", "launch.ranks=1", "train.stop_at=8")
    prune = load(run / "config.yaml").compress.prune
    assert isinstance(prune, PruneConfig)
    told = {line["step"]: line["compress/sparsity"] for line in metrics(run) if "compress/sparsity" in line}
    checkpoint = newest(run)
    assert checkpoint is not None
    layers = [(name, weight) for name, weight in iterate_weights(checkpoint) if weight.dim() == 2 and "blocks." in name]
    size = sum(weight.numel() for _, weight in layers)
    assert told == {step: round(0.75 * fraction(prune.schedule, step) * size) / size for step in range(1, 9)}
    assert sum(int((weight == 0).sum()) for _, weight in layers) == round(0.75 * size)
    assert result(run)["compress/sparsity"] == told[8]
    dense = bigtrain("train", *always, "compress=[]", expect=2)
    assert "compress.prune" in dense
    assert len(dense.strip().splitlines()) == 1
