"""Import DeepSpeed without what it brings along for features that nobody asked for: two seconds less on every rank."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any


def import_deepspeed() -> None:
    """Before anything else in this process imports it; what it leaves out is there as soon as somebody wants it.

    Its autotuner, which we never call, imports mlflow wherever that is installed (1 s). Its ZeRO optimizers import its
    Muon, whichever optimizer they wrap, and that hands three functions to torch.compile at once, which imports
    TorchInductor for that (0.7 s): let them be compiled when they are first called.
    """
    if "deepspeed" in sys.modules:
        return
    hide = "mlflow" not in sys.modules
    if hide:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # an import of it fails as if it was not installed
    try:
        from deepspeed.runtime import compiler
    finally:
        if hide:
            del sys.modules["mlflow"]
    compiler.compile = lambda: _compiled_when_called


def _compiled_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.cache
    def compiled() -> Callable[..., Any]:
        import torch

        return torch.compile(function)

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return compiled()(*arguments, **named)

    return call
