from __future__ import annotations

import logging
from pathlib import Path

import pytest

from bigtrain.config import Config
from bigtrain.hooks import Hook, Hooks, build_hooks


class Counter(Hook):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.append(step)

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
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "Broken failed in on_step" in messages[0]
    assert "disk full" in messages[0]


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
