from __future__ import annotations

import io
import shlex
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console

from bigtrain.config import Config, TaskConfig, kinds
from bigtrain.hints import WRITERS, next_commands
from bigtrain.hooks import console as module
from bigtrain.hooks.console import ConsoleHook, count, duration, summary
from tests.hooks.runs import run_info

METRICS = {
    "train/loss": 3.21,
    "train/lr": 3e-4,
    "perf/tokens_per_second": 12_345.0,
    "perf/mfu": 0.412,
    "perf/peak_memory_gib": 1.25,
}


def run(hook: ConsoleHook, run_dir: Path, steps: int) -> None:
    config = Config(run_dir=str(run_dir))
    config.train.steps = steps
    hook.on_start(run_info(run_dir, config=config))
    for step in range(1, steps + 1):
        hook.on_step(step, METRICS)
    hook.on_evaluate(steps, {"eval/loss": 2.5, "eval/perplexity": 12.18, "eval/bits_per_byte": 1.5})
    hook.on_end({"status": "finished", "train/steps": steps, "run": str(run_dir)})


def test_without_a_terminal_there_are_plain_lines(tmp_path: Path) -> None:
    output = io.StringIO()
    run(ConsoleHook(console=Console(file=output, soft_wrap=True)), tmp_path, 50)
    lines = output.getvalue().splitlines()
    assert lines[0].startswith("3.3M parameters on 2 ranks of cpu, 8.19k tokens a step, 50 steps")
    assert lines[1] == "step 1/50  loss 3.2100  lr 3.0e-04  12.3k tokens/s  MFU 41.2%  1.2 GiB"
    assert lines[2].startswith("step 50/50  loss 3.2100")  # the 48 between came within the same seconds
    assert lines[2].endswith("ETA 0:00:00")
    assert lines[3] == "step 50/50  held-out loss 2.5000  perplexity 12.18  bits per byte 1.5"
    assert "\x1b" not in output.getvalue()


def test_plain_lines_come_every_few_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 1000, 2))  # two seconds a step
    monkeypatch.setattr(module.time, "monotonic", lambda: next(seconds))
    output = io.StringIO()
    run(ConsoleHook(console=Console(file=output, soft_wrap=True)), tmp_path, 10)
    steps = [line.split()[1] for line in output.getvalue().splitlines() if "MFU" in line]
    assert steps == ["1/10", "4/10", "7/10", "10/10"]
    assert "ETA 0:00:12" in output.getvalue()  # at step 4, 6 steps of 2 seconds to go


def test_on_a_terminal_there_is_a_bar(tmp_path: Path) -> None:
    output = io.StringIO()
    run(ConsoleHook(console=Console(file=output, force_terminal=True, width=140)), tmp_path, 3)
    assert "3/3" in output.getvalue()
    assert "12.3k tokens/s" in output.getvalue()
    assert "\x1b[?25h" in output.getvalue()  # the cursor is back
    assert not any(line.startswith("step 1/3 ") for line in output.getvalue().splitlines())


def test_progress_false_means_plain_lines_on_a_terminal_too(tmp_path: Path) -> None:
    output = io.StringIO()
    run(ConsoleHook(False, console=Console(file=output, force_terminal=True, width=140)), tmp_path, 3)
    assert any("step 1/3" in line for line in output.getvalue().splitlines())


def test_summary_says_what_came_out_and_what_to_do_next() -> None:
    result = {
        "status": "finished",
        "train/steps": 1000,
        "time/total_seconds": 252.4,
        "eval/loss": 2.7134,
        "eval/bits_per_byte": 1.8312,
        "eval/gzip_bits_per_byte": 2.0501,
    }
    assert summary(result, "runs/a", "causal_lm") == [
        "finished at step 1000 after 0:04:12: held-out loss 2.7134, 1.831 bits per byte (gzip -9: 2.050)",
        'generate:  bigtrain generate runs/a --prompt "..."',
        "report:    bigtrain report runs/a",
    ]
    assert summary({"status": "stopped", "train/steps": 10}, "runs/a", "tagging") == [
        "stopped at step 10", "evaluate:  bigtrain evaluate runs/a", "report:    bigtrain report runs/a"
    ]  # fmt: skip


def test_what_is_proposed_is_what_the_task_can() -> None:
    """Before the prompt is read `generate` refuses what `WRITERS` does not name."""
    for kind in (kind for task in get_args(TaskConfig) for kind in kinds(task)):
        first = next(iter(next_commands(kind, "runs/it's").values()))
        assert first.startswith("bigtrain generate" if kind in WRITERS else "bigtrain evaluate")
        assert shlex.split(first)[2] == "runs/it's"


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5"), (950, "950"), (12_345, "12.3k"), (124_439_808, "124M"), (6.74e9, "6.74B")]
)
def test_count(value: float, text: str) -> None:
    assert count(value) == text


def test_duration() -> None:
    assert duration(192.4) == "0:03:12"
    assert duration(190_000) == "2 days, 4:46:40"
