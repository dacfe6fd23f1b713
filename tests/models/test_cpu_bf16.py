"""bfloat16 matmuls through float32: the same numbers as a bfloat16 unit's, and nothing else is touched."""

from __future__ import annotations

import subprocess
import sys

CHECK = """
import torch
from bigtrain.models import cpu_bf16

torch.manual_seed(0)
a, b, c, bias = torch.randn(70, 33), torch.randn(33, 50), torch.randn(70, 50), torch.randn(50)
x, y, z = torch.randn(3, 20, 33), torch.randn(3, 33, 9), torch.randn(3, 20, 9)
cases = [
    (torch.mm, (a, b), {}),
    (torch.addmm, (c, a, b), dict(beta=0.5, alpha=2)),
    (torch.addmm, (bias, a, b), {}),
    (torch.bmm, (x, y), {}),
    (torch.baddbmm, (z, x, y), dict(beta=2, alpha=0.5)),
    (torch.nn.functional.linear, (x, b.T.contiguous(), bias), {}),
    (torch.matmul, (x, b), {}),
]
before = [f(*t, **k) for f, t, k in cases]
cpu_bf16.replace()
for (f, t, k), expected in zip(cases, before, strict=True):
    assert torch.equal(f(*t, **k), expected), f
    assert torch.allclose(f(*(v.double() for v in t), **k).float(), expected, atol=1e-4), f
    halves = [v.bfloat16().requires_grad_() for v in t]
    wide = [v.detach().float().requires_grad_() for v in halves]
    found, exact = f(*halves, **k), f(*wide, **k)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.bfloat16(), rtol=0.01, atol=0.01)
    d_out = torch.randn_like(exact).bfloat16()
    found.backward(d_out)
    exact.backward(d_out.float())
    for half, full in zip(halves, wide, strict=True):
        torch.testing.assert_close(half.grad, full.grad.bfloat16(), rtol=0.02, atol=0.02)
assert torch.mm(a.bfloat16()[:0], b.bfloat16()).shape == (0, 50)
"""


def test_bfloat16_products_are_float32_products_rounded_once() -> None:
    """In a process of its own: the kernels stay replaced."""
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
