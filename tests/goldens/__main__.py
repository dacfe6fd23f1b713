"""`python -m tests.goldens [PART ...]`: write the numbers anew, all or some; `runs`: add runs and exports of today."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from tests.distributed.ranks import run_ranks
from tests.goldens import kept
from tests.goldens.recipes import FOLDER, RUNS, at_home

MAKING = Path("/tmp/goldens")  # a stored run's config and manifest name the directory that it was made in
LEFT_OUT = shutil.ignore_patterns("logs", "heartbeats", "failures", ".lock", "swap", "ds_config.json", "*_config.json")
SOURCES = {"gpt": "gpt_zero2", "bert": "bert_zero3"}


def make_runs() -> None:
    """trained/ and exports/ of today. What was there stays: a name that is taken is passed over."""
    shutil.rmtree(MAKING, ignore_errors=True)
    stored = kept.recipes(RUNS)
    with at_home():
        files = [str(kept.write(MAKING / name, kept.prepared(stored[name], MAKING / "cache"))) for name in RUNS]
    for told in run_ranks("tests.goldens.walk:walk", 2, {"files": files})[0]:
        assert "problem" not in told, told["problem"]
    for name in RUNS:
        if not (FOLDER / "trained" / name).exists():
            shutil.copytree(MAKING / name, FOLDER / "trained" / name, ignore=LEFT_OUT)
    for name, run in SOURCES.items():
        if not (FOLDER / "exports" / name).exists():
            kept.printed("export", str(MAKING / run), "--out", str(FOLDER / "exports" / name))
    shutil.rmtree(MAKING)


def main(arguments: list[str]) -> None:
    if arguments == ["runs"]:
        make_runs()
        return
    wanted = arguments or list(kept.PARTS)
    for part in wanted:
        if part in kept.PRINTED:
            kept.write_part(part, kept.PRINTED[part]())
    if {"curves.json", "trained.json"} & set(wanted):
        with tempfile.TemporaryDirectory() as folder:
            for part, content in zip(("curves.json", "trained.json"), kept.trained(Path(folder)), strict=True):
                kept.write_part(part, content)
    print(f"written to {kept.NUMBERS}: what differs from before, git diff says; commit it with the reason why")


if __name__ == "__main__":
    main(sys.argv[1:])
