"""Faster bfloat16 training on CPUs: GELU, cross-entropy, dropout and attention.

PyTorch's CPU matmuls are good and these are not: its tanh-GELU takes 5 times as long as memory needs, its
flash attention does a tenth of what matmuls do, cross-entropy goes over the logits three
times, and dropout draws its random numbers one by one, 6 ns each. cpu_kernels.c does the loops; it is compiled at first
use (half a second) into the user's cache.

They are used for plain bfloat16 tensors on a CPU, and nowhere else: not on GPUs, in float32, inside torch.compile or
under FakeTensorMode. Set BIGTRAIN_CPU_KERNELS=0 to go without; without a C compiler PyTorch's own kernels run.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bigtrain.files import user_cache

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


def usable(x: Tensor) -> bool:
    """Whether the kernels take x, which decides for a whole operation."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)  # no FakeTensor, no quantised subclass
        and not torch.compiler.is_compiling()
        and library() is not None
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None if they are switched off or cannot be built here."""
    if os.environ.get("BIGTRAIN_CPU_KERNELS", "1") == "0":
        return None
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    try:  # a home directory may be shared by machines of different kinds, and -march=native is for one of them
        processor = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        processor = platform.processor()
    key = hashlib.sha256(f"{SOURCE.read_text()}{compiler}{FLAGS}{platform.machine()}{processor}".encode())
    cache = user_cache()
    path = cache / f"cpu_kernels-{key.hexdigest()[:16]}.so"
    try:
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as directory:  # ranks build at once: the rename is atomic
                built = Path(directory) / "kernels.so"
                command = [*shlex.split(compiler), *FLAGS, str(SOURCE), "-o", str(built), "-lm"]
                subprocess.run(command, check=True, capture_output=True, timeout=120)
                built.replace(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None


def _call(name: str, *arguments: Tensor | int | float) -> None:
    """Call a kernel on contiguous tensors, 64-bit integers and floats, on as many threads as PyTorch uses."""
    kernels = library()
    assert kernels is not None
    converted: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            assert argument.is_contiguous()
            converted.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, float):
            converted.append(ctypes.c_float(argument))
        else:
            converted.append(ctypes.c_int64(argument))
    getattr(kernels, name)(*converted, ctypes.c_int(torch.get_num_threads()))


class _GeluTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        _call("gelu_tanh", x, y, x.numel())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        _call("gelu_tanh_backward", x, dy.contiguous(), dx, x.numel())
        return dx


def gelu_tanh(x: Tensor) -> Tensor:
    """F.gelu(x, approximate="tanh")."""
    result: Tensor = _GeluTanh.apply(x.contiguous())
    return result


def cross_entropy_(logits: Tensor, targets: Tensor, label_smoothing: float, z_loss: float) -> tuple[Tensor, Tensor]:
    """The loss and the plain cross-entropy of each row, (N,) float32; logits (N, V) become the loss's gradient."""
    rows, columns = logits.shape
    loss, nll = torch.empty(rows), torch.empty(rows)
    scratch = torch.empty(torch.get_num_threads(), columns)
    _call(
        "cross_entropy", logits, targets.contiguous(), loss, nll, scratch, rows, columns,
        float(label_smoothing), float(z_loss),
    )  # fmt: skip
    return loss, nll


def attention_usable(q: Tensor) -> bool:
    """causal_attention needs scores' scale, 1 / sqrt(head_dim), to be exact in bfloat16: head_dim 16, 64, 256."""
    return usable(q) and torch.is_grad_enabled() and q.size(-1) in (16, 64, 256)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """F.scaled_dot_product_attention(q, k, v, is_causal=True) for tensors (B, H, T, head_dim)."""
    result: Tensor = _CausalAttention.apply(q, k, v)
    return result


class _CausalAttention(torch.autograd.Function):
    """Attention as batched matmuls, which run on the CPU's matrix units; PyTorch's flash attention does not.

    Forward, for a block of queries, in the queries x keys layout: S = Q K^T, and once more less the largest of each
    row, P = softmax(S), O = P V. Backward, for a block of keys, in the keys x queries layout:
        P  = exp(K Q^T - logsumexp)         dV = P dO
        dS = P * (V dO^T - delta)           dK = dS Q,  dQ = dS^T K
    What is subtracted travels as two more columns of the factors (its leading and its remaining bits, times -1), so
    that the matmul subtracts in float32, before it rounds to bfloat16: log-probabilities near 0 keep all their bits.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, length, head_dim = q.shape
        scale = head_dim**-0.5
        out = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)  # (B, T, H, head_dim) in memory, as backward's
        logsumexp = q.new_empty(batch, heads, length, dtype=torch.float32)
        block = min(length, 256)
        scratch = torch.empty(torch.get_num_threads(), length)
        for b in range(batch):
            left, right = q.new_zeros(heads, length, head_dim + 2), k.new_full((heads, length, head_dim + 2), -1.0)
            torch.mul(q[b], scale, out=left[..., :head_dim])
            right[..., :head_dim] = k[b]
            v_ = v[b].contiguous()
            for start in range(0, length, block):
                stop = min(start + block, length)
                rows, keys = left[:, start:stop], right[:, :stop].transpose(1, 2)
                largest = q.new_empty(heads, stop - start)
                _call("attention_largest", torch.bmm(rows, keys), largest, heads, stop - start, stop)
                rows[..., head_dim] = largest
                p = torch.bmm(rows, keys)
                log_sum = torch.empty(heads, stop - start)
                _call("attention_softmax", p, log_sum, scratch, *p.shape)
                out[b, :, start:stop] = torch.bmm(p, v_[:, :stop])
                logsumexp[b, :, start:stop] = log_sum.add_(largest)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, logsumexp = ctx.saved_tensors
        batch, heads, length, head_dim = q.shape
        scale = head_dim**-0.5
        # (B, T, H, head_dim) in memory, which is how the projection before wants them back
        dq, dk, dv = (torch.empty_like(q.transpose(1, 2)).transpose(1, 2) for _ in range(3))
        delta = (d_out * out).sum(-1, dtype=torch.float32)
        keys = min(length, 256)
        group = max(1, min(heads, 2**22 // (keys * length)))  # heads at a time: the scores should stay in the cache
        for b in range(batch):
            for h in range(0, heads, group):
                part = (b, slice(h, h + group))
                queries, k_, d_out_ = (q[part] * scale), k[part].contiguous(), d_out[part].contiguous()
                minus_one = queries.new_full((len(k_), length, 2), -1.0)
                left_k, left_v = torch.cat((k_, minus_one), -1), torch.cat((v[part], minus_one), -1)
                right_q = torch.cat((queries, *_two_parts(logsumexp[part])), -1).transpose(1, 2)
                right_d = torch.cat((d_out_, *_two_parts(delta[part])), -1).transpose(1, 2)
                for start in range(0, length, keys):
                    block = slice(start, start + keys)
                    p = torch.bmm(left_k[:, block], right_q[:, :, start:])
                    ds = torch.bmm(left_v[:, block], right_d[:, :, start:])
                    _call("attention_probabilities", p, ds, *p.shape)
                    dv[part][:, block] = torch.bmm(p, d_out_[:, start:])
                    dk[part][:, block] = torch.bmm(ds, queries[:, start:])
                    from_block = torch.bmm(ds.transpose(1, 2), k_[:, block]).mul_(scale)
                    if start == 0:
                        total = from_block if keys == length else from_block.float()
                    else:
                        total[:, start:] += from_block
                dq[part] = total
        return dq, dk, dv


def _two_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 (...,) as two bfloat16 columns (..., 1) whose sum has 16 bits of it."""
    leading = x.bfloat16()
    return leading.unsqueeze(-1), (x - leading).bfloat16().unsqueeze(-1)


def dropout(x: Tensor, p: float) -> Tensor:
    """F.dropout(x, p): as random, from one number of PyTorch's generator."""
    result: Tensor = _Dropout.apply(x.contiguous(), p, _new_seed())
    return result


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.p, ctx.seed = p, seed
        return _dropped(x, p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _dropped(dy.contiguous(), ctx.p, ctx.seed), None, None


def _new_seed() -> int:
    return int(torch.randint(2**62, ()))


def _dropped(x: Tensor, p: float, seed: int) -> Tensor:
    if not p:
        return x
    y = torch.empty_like(x)
    _call("dropout", x, y, x.numel(), seed, float(p))
    return y


SHORT = 256  # keys: beyond it, attention that keeps no scores is worth its slow backward pass


def short_attention_usable(q: Tensor, k: Tensor, dropout: float) -> bool:
    """With dropout PyTorch has no attention that does without the scores either, at any length."""
    return usable(q) and torch.is_grad_enabled() and (dropout > 0 or k.size(-2) <= SHORT)


def short_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """F.scaled_dot_product_attention(q, k, v, mask, dropout), not causal, for tensors (B, H, T, head_dim); `mask` is
    boolean, (B or 1, 1, T or 1, S)."""
    result: Tensor = _ShortAttention.apply(q, k, v, mask, dropout, _new_seed() if dropout else 0)
    return result


class _ShortAttention(torch.autograd.Function):
    """The scores as one batch of small matrices; kept are the probabilities before dropout, and its seed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, seed: int) -> Tensor:
        queries = (q * q.size(-1) ** -0.5).flatten(0, 1)
        k_, v_ = k.flatten(0, 1), v.flatten(0, 1)
        scores = torch.bmm(queries, k_.transpose(1, 2))
        if mask is not None:
            shaped = scores.view(*q.shape[:-1], -1)
            shaped += torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
        p = torch.softmax(scores, -1)
        ctx.save_for_backward(queries, k_, v_, p)
        ctx.dropout, ctx.seed, ctx.heads = dropout, seed, q.shape[:2]
        return torch.bmm(_dropped(p, dropout, seed), v_).unflatten(0, ctx.heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Any:
        queries, k, v, p = ctx.saved_tensors
        d_out = d_out.flatten(0, 1)
        dv = torch.bmm(_dropped(p, ctx.dropout, ctx.seed).transpose(1, 2), d_out)
        dp = _dropped(torch.bmm(d_out, v.transpose(1, 2)), ctx.dropout, ctx.seed)
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        dq = torch.bmm(ds, k).mul_(k.size(-1) ** -0.5)
        dk = torch.bmm(ds.transpose(1, 2), queries)
        return *(x.unflatten(0, ctx.heads) for x in (dq, dk, dv)), None, None, None
