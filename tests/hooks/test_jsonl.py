from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bigtrain.config import Config, TextDataConfig
from bigtrain.hooks.jsonl import JsonlHook, read_metrics
from tests.hooks.runs import run_info


def write_steps(run_dir: Path, first: int, last: int, value: float = 1.0) -> None:
    hook = JsonlHook()
    hook.on_start(run_info(run_dir, start_step=first - 1))
    for step in range(first, last + 1):
        hook.on_step(step, {"train/loss": value})
    hook.close()


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_holds_step_time_and_metrics_and_is_there_at_once(tmp_path: Path) -> None:
    hook = JsonlHook()
    config = Config(run_dir=str(tmp_path), data=TextDataConfig(prepared_dir="cache/abc"))
    hook.on_start(run_info(tmp_path, config=config))
    hook.on_step(1, {"train/loss": 8.5, "train/grad_norm": math.inf})
    hook.on_evaluate(1, {"eval/loss": 8.0})
    train, evaluation = rows(tmp_path)  # before close
    assert train.keys() == {"step", "time", "train/loss", "train/grad_norm"}
    assert (train["step"], train["train/loss"], train["train/grad_norm"]) == (1, 8.5, None)
    assert abs(train["time"] - time.time()) < 60
    assert (evaluation["eval/loss"], evaluation["data"]) == (8.0, "abc")
    hook.close()
    hook.close()


def test_resume_drops_the_steps_that_are_done_again(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 10)
    write_steps(tmp_path, 7, 12, value=2.0)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 13))
    assert [row["train/loss"] for row in rows(tmp_path)] == [1.0] * 6 + [2.0] * 6


def test_resume_repairs_a_torn_line(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 5)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 6, "time": 17')
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    write_steps(tmp_path, 6, 7)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_run_from_scratch_starts_an_empty_file(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 5)
    write_steps(tmp_path, 1, 2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_a_killed_process_leaves_whole_lines(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.hooks.runs import run_info\n"
        "from bigtrain.hooks.jsonl import JsonlHook\n"
        "hook = JsonlHook(); hook.on_start(run_info(Path(sys.argv[1]))); step = 0\n"
        "while True:\n    step += 1; hook.on_step(step, {'train/loss': 1.0})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    path, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 10_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    steps = [row["step"] for row in rows(tmp_path)]
    assert len(steps) > 100
    assert steps == list(range(1, len(steps) + 1))


def test_a_rollback_takes_the_lines_after_it_away(tmp_path: Path) -> None:
    hook = JsonlHook()
    hook.on_start(run_info(tmp_path))
    for step in range(1, 6):
        hook.on_step(step, {"train/loss": 1.0})
    hook.on_rollback(2, 5)
    hook.on_step(3, {"train/loss": 2.0})
    hook.close()
    assert [(row["step"], row["train/loss"]) for row in rows(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 2.0)]
