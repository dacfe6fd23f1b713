"""What can watch a run: a Hook observes and never changes it; Hooks fans every event out to several."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigtrain.config import Config
from bigtrain.redact import redact

logger = logging.getLogger(__name__)

Metrics = dict[str, float]


@dataclass
class RunInfo:
    """What is known when the first step is about to begin."""

    run_dir: Path
    config: Config
    rank: int
    world_size: int
    device_name: str
    parameters: int
    flops_per_token: float
    peak_flops: float | None  # of all ranks together, per second; None: unknown
    tokens_per_step: int | None  # None: it differs from step to step
    start_step: int  # optimizer steps already done
    resumed: bool
    hosts: list[str] = field(default_factory=list)  # by rank
    planned: dict[str, float] = field(default_factory=dict)  # logged beside what is measured


class Hook:
    """Every method does nothing, so that a hook writes only those it needs. `step` counts optimizer steps done."""

    name = ""  # as the user knows it; "": that of its class
    warn: Callable[[str], None] = staticmethod(logger.warning)  # tells the user, once the hook is one of Hooks

    def on_start(self, info: RunInfo) -> None:
        """Before the first step, after load_state."""

    def on_step(self, step: int, metrics: Metrics) -> None:
        """Every logger.log_every steps, on global rank 0."""

    def on_evaluate(self, step: int, metrics: Metrics) -> None: ...

    def on_checkpoint(self, step: int, path: Path) -> None:
        """After the checkpoint is complete, which may be some steps later."""

    def on_warning(self, step: int, message: str) -> None:
        """Something went wrong that the run goes on from."""

    def on_rollback(self, step: int, left: int) -> None:
        """The run went back from step `left`: what was reported after `step` is void."""

    def on_end(self, result: dict[str, Any]) -> None:
        """The run finished or was stopped; `result` is what result.json holds."""

    def on_failure(self, error: BaseException) -> None: ...

    def close(self) -> None:
        """Always the last call; may come more than once."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON-able data; kept in the checkpoint."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Before on_start, with what state() gave to the checkpoint."""


class Hooks(Hook):
    """Several hooks as one. One that raises is left out from then on, for watching must not end a run; the others are
    told, so that it stands on the terminal and in metrics.jsonl, and `problems` has it for result.json."""

    def __init__(self, hooks: Iterable[Hook] = ()) -> None:
        self.hooks = list(hooks)
        self.problems: list[str] = []
        self.step = 0  # of the last event
        for hook in self.hooks:
            hook.warn = self._problem

    def _problem(self, message: str) -> None:
        """Something that is not seen, or not kept, as the config asks."""
        self.problems.append(redact(" ".join(message.split())))
        self.on_warning(self.step, self.problems[-1])

    def _each(self, event: str, call: Callable[[Hook], None]) -> None:
        for hook in list(self.hooks):
            try:
                call(hook)
            except Exception as error:
                if hook not in self.hooks:  # it failed already in what it was told meanwhile
                    continue
                self.hooks.remove(hook)
                logger.warning("", exc_info=True)
                if event != "close":
                    with suppress(Exception):  # what it has may still be kept
                        hook.close()
                name = hook.name or type(hook).__name__
                self._problem(
                    f"{name} failed in {event} and is switched off for the rest of the run: "
                    f"{type(error).__name__}: {error}"
                )

    def on_start(self, info: RunInfo) -> None:
        self.step = info.start_step
        self._each("on_start", lambda hook: hook.on_start(info))

    def on_step(self, step: int, metrics: Metrics) -> None:
        self.step = step
        self._each("on_step", lambda hook: hook.on_step(step, metrics))

    def on_evaluate(self, step: int, metrics: Metrics) -> None:
        self._each("on_evaluate", lambda hook: hook.on_evaluate(step, metrics))

    def on_checkpoint(self, step: int, path: Path) -> None:
        self._each("on_checkpoint", lambda hook: hook.on_checkpoint(step, path))

    def on_warning(self, step: int, message: str) -> None:
        logger.warning("step %d: %s", step, message)
        self._each("on_warning", lambda hook: hook.on_warning(step, message))

    def on_rollback(self, step: int, left: int) -> None:
        self._each("on_rollback", lambda hook: hook.on_rollback(step, left))

    def on_end(self, result: dict[str, Any]) -> None:
        self._each("on_end", lambda hook: hook.on_end(result))

    def on_failure(self, error: BaseException) -> None:
        self._each("on_failure", lambda hook: hook.on_failure(error))

    def close(self) -> None:
        self._each("close", lambda hook: hook.close())

    def state(self) -> dict[str, Any]:
        """{class name: its state}, of the hooks that have any."""
        states: dict[str, Any] = {}

        def collect(hook: Hook) -> None:
            if state := hook.state():
                states[type(hook).__name__] = state

        self._each("state", collect)
        return states

    def load_state(self, state: dict[str, Any]) -> None:
        self._each("load_state", lambda hook: hook.load_state(state.get(type(hook).__name__, {})))
