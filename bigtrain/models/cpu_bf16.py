"""bfloat16 matmuls at float32's speed on CPUs that have no bfloat16 arithmetic (no AVX-512, no AMX).

There PyTorch multiplies bfloat16 matrices in a plain loop, a hundred times slower than float32 ones. Here the factors
are widened, multiplied in float32 and the product rounded once: what a bfloat16 unit does, which also adds up in
float32. So a config that says bf16 runs on any CPU, with the same meaning.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor


@functools.cache
def enable() -> None:
    """Replace this process's bfloat16 matmuls on the CPU if it would do them in the plain loop."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        replace()


def replace() -> None:
    """Replace them for the rest of this process's life, whatever the CPU has."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():  # replacing is what we are here for
        warnings.simplefilter("ignore")
        for kernel in (_mm, _bmm, _addmm, _baddbmm):
            library.impl(kernel.__name__.removeprefix("_"), kernel, "CPU", allow_override=True)
    _kept.append(library)


_kept: list[torch.library.Library] = []  # a library's kernels go with it


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return _multiply(torch.mm, (a, b), (a.size(0), b.size(1)))


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return _multiply(torch.bmm, (a, b), (a.size(0), a.size(1), b.size(2)))


def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _multiply(torch.addmm, (c, a, b), (a.size(0), b.size(1)), beta=beta, alpha=alpha)


def _baddbmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _multiply(torch.baddbmm, (c, a, b), (a.size(0), a.size(1), b.size(2)), beta=beta, alpha=alpha)


def _multiply(operation: Any, tensors: tuple[Tensor, ...], shape: tuple[int, ...], **scalars: float) -> Tensor:
    """PyTorch's own kernel through its `out=` form, which is not replaced."""
    a = tensors[-1]
    if a.dtype != torch.bfloat16:
        result: Tensor = operation(*tensors, **scalars, out=a.new_empty(shape))
        return result
    wide = operation(*(tensor.float() for tensor in tensors), **scalars, out=a.new_empty(shape, dtype=torch.float32))
    rounded: Tensor = wide.bfloat16()
    return rounded
