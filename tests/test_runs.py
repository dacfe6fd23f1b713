"""`bigtrain runs` and `bigtrain watch`: what a directory says of the run in it."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from bigtrain import heartbeat, runs, watch
from bigtrain.cli import command
from bigtrain.config import Config, dump
from bigtrain.errors import ConfigError
from bigtrain.launch.run_dir import LOCK

NOW = 1_000_000.0


def make(
    path: Path, phase: str | None = heartbeat.STEP, ago: float = 1.0, owner: int | None = None,
    result: str | None = None, failure: str | None = None, host: str | None = None,
) -> Path:  # fmt: skip
    """A run directory as a run of two ranks leaves it; `ago`: seconds since its last sign of life."""
    path.mkdir(parents=True)
    config = Config(run_dir=str(path))
    config.train.steps = 100
    (path / "config.yaml").write_text(dump(config))
    (path / "launch.json").write_text("{}")
    (path / LOCK).write_text(f"process {owner or os.getpid()} on {host or os.uname().nodename}\n")
    rows = [{"step": step, "time": NOW - ago - 10 + step, "train/loss": 5.0 - step / 10, "train/lr": 1e-3,
             "perf/step_seconds": 1.0, "perf/tokens_per_second": 12_345.0} for step in range(1, 11)]  # fmt: skip
    rows.append({"step": 10, "time": NOW - ago, "eval/loss": 4.25, "eval/perplexity": 70.1})
    rows.append({"step": 10, "time": NOW - ago, "warning": "straggler: the others wait for rank 1"})  # type: ignore
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if phase is not None:
        (path / heartbeat.FOLDER).mkdir()
        for rank in range(2):
            beat = {"process": 1, "phase": phase, "step": 10, "time": NOW - ago}
            (path / heartbeat.FOLDER / f"rank-{rank}.json").write_text(json.dumps(beat))
    if result is not None:
        (path / "result.json").write_text(json.dumps({"status": result, "train/steps": 100}))
        os.utime(path / "result.json", (NOW - ago, NOW - ago))
    if failure is not None:
        (path / "failures").mkdir()
        (path / "failures" / "rank-1.json").write_text(json.dumps({"rank": 1, "error": failure}))
        os.utime(path / "failures" / "rank-1.json", (NOW - ago, NOW - ago))
    return path


def dead() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_the_states_of_a_run(tmp_path: Path) -> None:
    def status(name: str, **facts: object) -> tuple[str, str]:
        state = runs.state(make(tmp_path / name, **facts), NOW)  # type: ignore[arg-type]
        return state.status, state.why

    assert status("running") == ("running", "")
    assert status("slow", phase=heartbeat.SAVING, ago=1500) == ("running", "")  # a large checkpoint may take long
    assert status("hangs", ago=700) == ("stalled", "rank 0 silent for 0:11:40 while in a step")
    assert status("elsewhere", ago=30, owner=1, host="another") == ("running", "")
    assert status("killed", ago=30, owner=dead()) == ("failed", "killed while in a step, after step 10")
    assert status("finished", result="finished", ago=9999, owner=dead()) == ("finished", "")
    assert status("stopped", result="stopped", ago=9999) == ("stopped", "")
    assert status("broke", failure="boom", owner=dead()) == ("failed", "rank 1: boom")
    assert status("young", phase=None) == ("starting", "")
    assert status("stillborn", phase=None, owner=dead()) == ("failed", "ended before its ranks started")


def test_a_finished_run_that_goes_on_is_running(tmp_path: Path) -> None:
    run = make(tmp_path / "run", result="finished", ago=100)
    assert runs.state(run, NOW).status == "finished"
    beat = {"process": 1, "phase": heartbeat.STEP, "step": 11, "time": NOW - 1}
    (run / heartbeat.FOLDER / "rank-0.json").write_text(json.dumps(beat))
    (run / heartbeat.FOLDER / "rank-1.json").write_text(json.dumps(beat))
    assert runs.state(run, NOW).status == "running"


def test_the_list(tmp_path: Path) -> None:
    now = time.time()
    make(tmp_path / "a" / "1", result="finished", ago=NOW - now + 3600, owner=dead())
    make(tmp_path / "b", ago=NOW - now + 2)
    shutil.copytree(tmp_path / "b", tmp_path / "a" / "1" / "checkpoints" / "inside")  # is no run of its own
    done = CliRunner().invoke(command, ["runs", str(tmp_path)])
    assert done.exit_code == 0
    lines = [line.split() for line in done.output.splitlines()]
    assert lines[0] == ["run", "status", "step", "best", "loss", "age"]
    assert lines[1][:4] == ["a/1", "finished", "100/100", "4.2500"]
    assert lines[2][:4] == ["b", "running", "10/100", "4.2500"]
    assert len(lines) == 3
    assert CliRunner().invoke(command, ["runs", str(tmp_path / "a" / "1" / "heartbeats")]).output.startswith("no runs")


def test_the_view_once(tmp_path: Path) -> None:
    now = time.time()
    out = io.StringIO()
    run = make(tmp_path / "run", ago=NOW - now + 2)
    state = watch.watch(run, True, Console(file=out, width=120))
    text = out.getvalue()
    assert state.status == "running"
    for expected in (
        "running",
        "10/100",
        "loss 4.0000",
        "held-out loss 4.25",
        "12.3k",
        "ETA 0:01:30",
        "straggler",
        "█",
    ):
        assert expected in text, expected


def test_the_live_view_ends_with_the_run(tmp_path: Path) -> None:
    now = time.time()
    run = make(tmp_path / "run", ago=NOW - now + 2)
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        (run / "result.json").write_text(json.dumps({"status": "finished", "train/steps": 100}))

    out = io.StringIO()
    state = watch.watch(run, False, Console(file=out, width=100, force_terminal=True), sleep)
    assert state.status == "finished"
    assert len(looks) == 1
    assert "100/100" in out.getvalue()


def test_a_directory_without_a_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        runs.state(tmp_path)


def test_neither_imports_torch() -> None:
    code = "import sys, bigtrain.runs, bigtrain.watch; sys.exit(any(m in sys.modules for m in ('torch', 'hydra')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_a_sparkline() -> None:
    assert watch.sparkline([4.0, 3.0, 2.0, 1.0], 4) == "█▆▃▁"
    assert len(watch.sparkline([float(n) for n in range(1000)], 40)) == 40
    assert watch.sparkline([4.0, 3.0, 2.0, 1.0], 4, watch.PLAIN_BARS) == "#*-."
