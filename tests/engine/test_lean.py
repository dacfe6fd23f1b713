"""What DeepSpeed and torch import for nobody is left out, and is there for who wants it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

SCRIPT = """
import json, sys
from bigtrain.engine import lean

lean.import_deepspeed()
import torch
from deepspeed.runtime import engine  # what a rank trains with
from tests.engine.test_lean import trained

found = [trained(torch.nn.Linear(3, 2))]
loaded = [name in sys.modules for name in ("mlflow", "torch._dynamo", "sympy")]
compiled = torch.compile(torch.nn.Linear(3, 2), backend="eager")
found.append(trained(compiled))
print(json.dumps([loaded, "torch._dynamo" in sys.modules, found]))
"""


def trained(model: torch.nn.Module) -> list[float]:
    """The weights after three steps from ones, by an optimizer that has gone through a state dict on the way."""
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    inputs = torch.arange(6.0).view(2, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
        other = torch.optim.AdamW(model.parameters(), lr=0.5, fused=True)
        other.load_state_dict(optimizer.state_dict())
        optimizer = other
    assert all(not parameter.grad_fn for parameter in model.parameters())
    return [float(value) for parameter in model.parameters() for value in parameter.detach().flatten()]


def test_a_rank_imports_no_tracer_until_something_is_compiled() -> None:
    """And trains the same, before and after, as torch by itself."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=os.environ | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after, found = json.loads(done.stdout.splitlines()[-1])
    assert before == [False, False, False]
    assert after
    assert found == [trained(torch.nn.Linear(3, 2))] * 2
