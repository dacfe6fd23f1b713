"""A window of steps that is looked into: the traces, tables and counts of two real ranks, and no step changed by it."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

from tests.runs import TINY, bigtrain, losses


def test_a_window_leaves_traces_and_what_the_ranks_said_to_each_other(tmp_path: Path, data_cache: Path) -> None:
    window = ["start_step=2", "steps=2", "flops=true", "all_ranks=true"]
    words = [*TINY, f"data.cache_dir={data_cache}", "train.steps=6", "train.eval_every=0", "launch.ranks=2",
             "launch.device=cpu", "launch.threads_per_rank=1"]  # fmt: skip
    bigtrain("train", *words, f"run_dir={tmp_path}/seen", *[f"train.profile.{each}" for each in window])
    bigtrain("train", *words, f"run_dir={tmp_path}/unseen")
    assert losses(tmp_path / "seen") == losses(tmp_path / "unseen")
    folder = tmp_path / "seen/profile"
    for rank in (0, 1):
        trace = json.loads(gzip.decompress((folder / f"trace-rank-{rank}.json.gz").read_bytes()))
        names = {event.get("name") for event in trace["traceEvents"]}
        assert "aten::mm" in names or "aten::linear" in names
        assert "Self CPU" in (folder / f"operators-rank-{rank}.txt").read_text()
        said = json.loads((folder / f"communication-rank-{rank}.json").read_text())
        assert said["steps"] == 2
        (reduced, *_) = [row for row in said["collectives"] if "reduce" in row["name"]]
        assert reduced["calls"] >= 2
        assert 0 < reduced["seconds_per_call"] <= reduced["seconds"]
    flops = (folder / "flops.txt").read_text()
    assert re.search(r"params per GPU: +[\d.]+ ?[kKM]", flops), flops[:2000]
    assert not (tmp_path / "unseen/profile").exists()
