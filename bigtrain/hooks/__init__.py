"""What watches a run."""

from __future__ import annotations

from typing import TextIO

from bigtrain.config import Config
from bigtrain.hooks.base import Hook, Hooks, RunInfo

__all__ = ["Hook", "Hooks", "RunInfo", "build_hooks"]


def build_hooks(config: Config, rank: int, terminal: TextIO | None = None) -> Hooks:
    """The hooks that the config asks for: all of them on global rank 0, none on the others.

    terminal: where progress is shown; None is standard output.
    """
    if rank != 0:
        return Hooks()
    from bigtrain.hooks.console import ConsoleHook
    from bigtrain.hooks.jsonl import JsonlHook

    hooks: list[Hook] = [ConsoleHook(config.logger.progress, terminal), JsonlHook()]
    if config.logger.wandb.enabled:
        from bigtrain.hooks.wandb import WandbHook

        hooks.append(WandbHook())
    if config.logger.trackers:
        from bigtrain.hooks.trackers import TrackersHook

        hooks += [TrackersHook([name]) for name in dict.fromkeys(config.logger.trackers)]  # each fails for itself
    return Hooks(hooks)
