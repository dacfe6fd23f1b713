"""Checkpoints: whole or not there at all. `store` and `weights` need torch, `find` does not."""

from __future__ import annotations

from bigtrain.checkpoint.find import Checkpoint, checkpoints, newest, resolve_resume

__all__ = ["Checkpoint", "checkpoints", "newest", "resolve_resume"]
