from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest

from bigtrain.config import Config
from bigtrain.hooks import Hook, Hooks, RunInfo, build_hooks
from bigtrain.hooks.console import ConsoleHook
from bigtrain.hooks.jsonl import JsonlHook, read_metrics
from tests.hooks.runs import run_info


class Counter(Hook):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.warnings: list[tuple[int, str]] = []

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.append(step)

    def on_warning(self, step: int, message: str) -> None:
        self.warnings.append((step, message))

    def state(self) -> dict[str, list[int]]:
        return {"steps": self.steps}

    def load_state(self, state: dict[str, list[int]]) -> None:
        self.steps = list(state.get("steps", []))


class Broken(Hook):
    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        raise OSError("disk full")


def test_a_hook_that_raises_is_reported_once_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    counter = Counter()
    hooks = Hooks([Broken(), counter])
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            hooks.on_step(step, {})
    assert counter.steps == [1, 2, 3]
    assert hooks.problems == [
        "Broken failed in on_step and is switched off for the rest of the run: OSError: disk full"
    ]  # for result.json
    assert counter.warnings == [(1, hooks.problems[0])]  # the others, a terminal among them, know it
    assert hooks.problems[0] in caplog.text


def test_what_fails_at_its_start_or_at_its_end_is_on_the_terminal_and_in_metrics_jsonl(tmp_path: Path) -> None:
    class Partly(Hook):
        name = "wandb"

        def on_start(self, info: RunInfo) -> None:
            self.warn("wandb cannot be reached, the run is kept offline")

        def close(self) -> None:
            raise OSError("disk full")

    class NeverThere(Hook):
        name = "mlflow"
        closed = False

        def on_start(self, info: RunInfo) -> None:
            raise ValueError("no\nserver")

        def close(self) -> None:
            self.closed = True

    never, screen = NeverThere(), io.StringIO()
    hooks = Hooks([ConsoleHook(False, screen), JsonlHook(), Partly(), never])
    hooks.on_start(run_info(tmp_path, start_step=3))
    hooks.on_end({"status": "finished", "train/steps": 4})
    hooks.close()
    first, second, third = hooks.problems
    assert first == "wandb cannot be reached, the run is kept offline"
    assert second == "mlflow failed in on_start and is switched off for the rest of the run: ValueError: no server"
    assert third.startswith("wandb failed in close")
    assert never.closed  # what it had begun is ended
    assert all(f"warning: {problem}\n" in screen.getvalue() for problem in hooks.problems)
    assert [row["warning"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [first, second]  # then it is closed


def test_each_tracker_fails_for_itself(tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path))
    config.logger.trackers = ["csv", "tensorboard", "csv"]
    hooks = build_hooks(config, 0, io.StringIO())
    (tmp_path / "tensorboard").write_text("in the way")
    hooks.on_start(run_info(tmp_path, config=config))
    assert [hook.name for hook in hooks.hooks] == ["", "metrics.jsonl", "csv"]
    assert [problem.partition(" failed")[0] for problem in hooks.problems] == ["tensorboard"]


def test_an_interrupt_is_not_swallowed() -> None:
    class Interrupted(Hook):
        def on_step(self, step: int, metrics: dict[str, float]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Hooks([Interrupted()]).on_step(1, {})


def test_state_goes_to_the_hook_it_came_from() -> None:
    before = Hooks([Counter(), Broken()])
    before.hooks[0].on_step(7, {})
    assert before.state() == {"Counter": {"steps": [7]}}
    counter = Counter()
    Hooks([Hook(), counter]).load_state(before.state())
    assert counter.steps == [7]
    Hooks([counter]).load_state({})  # a checkpoint from before the hook was switched on
    assert counter.steps == []


def test_hooks_live_on_rank_0_only(tmp_path: Path) -> None:
    config = Config(run_dir=str(tmp_path))
    assert build_hooks(config, 1).hooks == []
    assert [type(hook).__name__ for hook in build_hooks(config, 0).hooks] == ["ConsoleHook", "JsonlHook"]
    config.logger.wandb.enabled = True
    assert [type(hook).__name__ for hook in build_hooks(config, 0).hooks][-1] == "WandbHook"
