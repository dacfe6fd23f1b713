"""Checkpoints: whole or not there at all. `store` and `weights` need torch, `find` and `integrity` do not."""

from __future__ import annotations

from bigtrain.checkpoint.find import Checkpoint, Keep, checkpoints, newest, resolve_resume

__all__ = ["Checkpoint", "Keep", "checkpoints", "newest", "resolve_resume"]
