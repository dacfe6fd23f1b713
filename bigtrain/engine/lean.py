"""Import DeepSpeed without what it brings along for features that nobody asked for: seconds less on every rank."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

DYNAMO = "torch._dynamo"


def import_deepspeed() -> None:
    """Before anything else in this process imports it; what it leaves out is there as soon as somebody wants it.

    Its autotuner, which we never call, imports mlflow wherever that is installed (1 s). Its ZeRO optimizers import its
    Muon, whichever optimizer they wrap, and that hands three functions to torch.compile at once, which imports
    TorchInductor for that (0.7 s): let them be compiled when they are first called.
    """
    if "deepspeed" in sys.modules:
        return
    _leave_out_dynamo()
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


def _leave_out_dynamo() -> None:
    """Let nothing import TorchDynamo, and with it SymPy, only to say that it is not to be traced (1 to 2 s, 70 MB).

    torch marks its optimizers' methods so, DeepSpeed its hooks: at their first call they import the tracer and tell it.
    While nobody else has imported it, there is none to tell, and they run as they are.
    """
    import torch

    library: Any = torch  # of which these are no public names
    marking = library._disable_dynamo

    def mark(function: Any = None, recursive: bool = True) -> Any:
        if function is None:
            return functools.partial(mark, recursive=recursive)
        return _unmarked(function, marking(function, recursive))

    library._disable_dynamo = mark
    optimizer: Any = torch.optim.Optimizer
    for name in ("state_dict", "load_state_dict", "zero_grad", "add_param_group"):
        marked = getattr(optimizer, name)
        setattr(optimizer, name, _unmarked(marked.__wrapped__, marked))

    breaking: Any = torch.optim.Adam.step  # AdamW's too

    @functools.wraps(breaking)
    def step(self: Any, closure: Any = None) -> Any:
        if DYNAMO in sys.modules:
            return breaking(self, closure)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return breaking.__wrapped__(self, closure)

    torch.optim.Adam.step = step  # type: ignore[method-assign]


def _unmarked(plain: Callable[..., Any], marked: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def call(*arguments: Any, **named: Any) -> Any:
        return (marked if DYNAMO in sys.modules else plain)(*arguments, **named)

    return call
