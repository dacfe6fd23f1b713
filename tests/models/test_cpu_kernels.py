"""Every CPU kernel against PyTorch in float32, at bfloat16's tolerance; and the places where it must stay out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigtrain.config import DecoderConfig
from bigtrain.models import build, cpu_kernels

EPS = 2.0**-8  # two neighbouring bfloat16 numbers differ by at most this, relatively


@pytest.fixture(autouse=True)
def kernels() -> None:
    if cpu_kernels.library() is None:
        pytest.skip("no C compiler with OpenMP here, or BIGTRAIN_CPU_KERNELS=0")


def gradients(function: Callable[..., Tensor], *inputs: Tensor, seed: int = 5) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = function(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)
    y.backward(dy)
    return y.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (64, 1000)])
def test_gelu_tanh(shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 4).bfloat16()
    y, (dx,) = gradients(cpu_kernels.gelu_tanh, x)
    expected, (expected_dx,) = gradients(lambda x: F.gelu(x, approximate="tanh"), x.float())
    torch.testing.assert_close(y.float(), expected, rtol=EPS, atol=1e-6)
    torch.testing.assert_close(dx.float(), expected_dx, rtol=2 * EPS, atol=2e-2)  # its dy is rounded too


def test_gelu_tanh_at_the_edges() -> None:
    x = torch.tensor([0.0, -0.0, 1e30, -1e4, 88.0, -88.0, float("inf"), float("nan")]).bfloat16()
    y, (dx,) = gradients(cpu_kernels.gelu_tanh, x)
    expected = torch.tensor([0.0, 0.0, 1e30, 0.0, 88.0, 0.0, float("inf")]).bfloat16()
    torch.testing.assert_close(y[:7], expected, rtol=0, atol=1e-30)
    assert y[7].isnan()
    assert dx[7].isnan()


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 1e-2)])
@pytest.mark.parametrize("columns", [1, 31, 1000])
def test_cross_entropy(columns: int, smoothing: float, z_loss: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(23, columns, generator=generator) * 5).bfloat16()
    targets = torch.randint(columns, (23,), generator=generator)
    targets[::4] = -100
    x = logits.float().requires_grad_()
    expected = F.cross_entropy(x, targets, reduction="none", label_smoothing=smoothing)
    expected = expected + z_loss * x.logsumexp(-1).square() * (targets != -100)
    expected.sum().backward()
    plain = F.cross_entropy(x.detach(), targets, reduction="none")
    assert x.grad is not None

    loss, nll = cpu_kernels.cross_entropy_(logits, targets, smoothing, z_loss)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nll, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.float(), x.grad, rtol=EPS, atol=1e-6)


def test_cross_entropy_shows_nan_and_infinity() -> None:
    for bad in (float("nan"), float("inf")):
        logits = torch.zeros(2, 40).bfloat16()
        logits[1, 3] = bad
        loss, _ = cpu_kernels.cross_entropy_(logits, torch.tensor([0, 1]), 0.0, 0.0)
        assert loss[0].isfinite()
        assert not loss[1].isfinite()
        assert logits[0].isfinite().all()
        assert not logits[1].isfinite().all()


@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 16), (2, 3, 65, 64), (1, 2, 512, 64), (1, 2, 700, 16), (1, 1, 1030, 64)], ids=str
)
def test_causal_attention(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    batch, heads, length, head_dim = shape
    packed = torch.randn(batch, length, 3 * heads, head_dim, generator=generator).bfloat16() * 2
    q, k, v = (x.transpose(1, 2) for x in packed.split(heads, dim=2))
    assert cpu_kernels.attention_usable(q)
    y, computed = gradients(cpu_kernels.causal_attention, q, k, v)
    expected, exact = gradients(
        lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), q.float(), k.float(), v.float()
    )
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)
    for name, value, reference in zip("qkv", computed, exact, strict=True):
        error = (value.float() - reference).norm() / reference.norm()
        assert error < 0.02, (name, error)


def test_causal_attention_survives_scores_that_overflow_beyond_the_mask() -> None:
    q = torch.full((1, 1, 4, 16), 30.0).bfloat16()
    k = torch.tensor([-30.0, -30.0, -30.0, 30.0]).bfloat16().view(1, 1, 4, 1).expand(1, 1, 4, 16).contiguous()
    _, computed = gradients(cpu_kernels.causal_attention, q, k, torch.randn(1, 1, 4, 16).bfloat16())
    assert all(gradient.isfinite().all() for gradient in computed)


@pytest.mark.parametrize("scale", [30.0, 3000.0])
def test_causal_attention_of_large_scores(scale: float) -> None:
    q, k, v = (torch.randn(1, 2, 300, 64).bfloat16() * factor for factor in (scale, scale, 1))
    y, computed = gradients(cpu_kernels.causal_attention, q, k, v)
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    assert y.abs().max() <= v.abs().max()
    if scale == 30:  # beyond, which of two keys is nearer is below bfloat16's resolution
        assert torch.allclose(y.float(), expected, atol=5e-2, rtol=2e-2)
        assert all(gradient.isfinite().all() for gradient in computed)


def test_kernels_stay_out_of_other_types_and_tracing() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    half = torch.randn(4, 4).bfloat16()
    assert cpu_kernels.usable(half)
    assert not cpu_kernels.usable(half.float())
    assert not cpu_kernels.usable(half.half())
    assert not cpu_kernels.usable(half.to("meta"))
    with FakeTensorMode():
        assert not cpu_kernels.usable(torch.randn(4, 4).bfloat16())
    with torch.no_grad():
        assert not cpu_kernels.attention_usable(torch.randn(1, 1, 4, 16).bfloat16())
    assert not cpu_kernels.attention_usable(torch.randn(1, 1, 4, 128).bfloat16())


def test_the_switch_turns_them_off() -> None:
    code = "from bigtrain.models import cpu_kernels; print(cpu_kernels.library())"
    environment = {**os.environ, "BIGTRAIN_CPU_KERNELS": "0"}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == "None"


def test_without_a_compiler_the_model_still_trains(tmp_path: Path) -> None:
    code = (
        "import torch; from bigtrain.config import DecoderConfig; from bigtrain.models import build, cpu_kernels;"
        "model = build(DecoderConfig(dim=64, n_layers=1, n_heads=1, vocab_size=64, max_seq_len=8)).bfloat16();"
        "tokens = torch.zeros(1, 8, dtype=torch.long); model(tokens, tokens)[0].backward();"
        "print(cpu_kernels.library())"
    )
    environment = {**os.environ, "CC": "/nonexistent/cc", "XDG_CACHE_HOME": str(tmp_path)}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == "None"


@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_a_model_trains_alike_with_and_without(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DecoderConfig(dim=128, n_layers=2, n_heads=2, vocab_size=256, max_seq_len=64)
    if style == "llama":
        config = DecoderConfig(
            dim=128, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=256, max_seq_len=64, positions="rotary",
            norm="rmsnorm", activation="swiglu", bias=False, tie_embeddings=False,
        )  # fmt: skip
    tokens = torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(1))

    def curve(dtype: torch.dtype) -> Tensor:
        torch.manual_seed(0)
        model = build(config).to(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(12):
            loss, nll = model(tokens[:, :-1], tokens[:, 1:])
            (loss / 256).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(nll / 256)
        return torch.stack(losses)

    used, exact = curve(torch.bfloat16), curve(torch.float32)
    monkeypatch.setattr(cpu_kernels, "library", lambda: None)
    unused = curve(torch.bfloat16)
    assert exact[-1] < exact[0] - 0.5  # it learns
    assert not torch.equal(used, unused)  # and the kernels were in it
    # with the kernels the curve is as near to float32's as bfloat16 gets without them
    assert (used - exact).abs().max() < max(2 * (unused - exact).abs().max(), torch.tensor(0.02))


def test_dropout() -> None:
    x = torch.ones(200_000).bfloat16()
    torch.manual_seed(0)
    y, (dx,) = gradients(lambda x: cpu_kernels.dropout(x, 0.1), x)
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(0.9, abs=0.003)
    assert torch.equal(y[kept], (x / 0.9)[kept])
    assert torch.equal(dx != 0, kept), "the backward pass has dropped others"
    pairs = kept[:-1] & kept[1:], kept[:-64] & kept[64:]  # neighbours are independent
    assert [pair.float().mean().item() for pair in pairs] == pytest.approx([0.81, 0.81], abs=0.005)
    again = cpu_kernels.dropout(x, 0.1) != 0
    assert (again & kept).float().mean().item() == pytest.approx(0.81, abs=0.005), "two draws are alike"
    torch.manual_seed(0)
    assert torch.equal(cpu_kernels.dropout(x, 0.1), y)
    assert cpu_kernels.dropout(torch.full((100,), float("nan")).bfloat16(), 0.5).isnan().all()


@pytest.mark.parametrize("masked", [False, True])
def test_short_attention(masked: bool) -> None:
    q, k, v = (torch.randn(2, 3, 19, 32, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3))
    mask = torch.ones(2, 1, 1, 19, dtype=torch.bool)
    mask[1, ..., 7:] = False
    given = mask if masked else None
    y, found = gradients(lambda q, k, v: cpu_kernels.short_attention(q, k, v, given, 0.0), q, k, v)
    wanted_y, wanted = gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, given), q.float(), k.float(), v.float()
    )
    for ours, exact in zip((y, *found), (wanted_y, *wanted), strict=True):
        assert (ours.float() - exact).norm() < 0.02 * exact.norm()


def test_short_attention_drops_probabilities() -> None:
    """Where the values are the identity, the output is the dropped probabilities, and the gradient knows which."""
    q, k = (torch.randn(64, 4, 32, 32, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(2))
    v = torch.eye(32).bfloat16().expand(64, 4, 32, 32).contiguous()
    torch.manual_seed(0)
    y, (_, _, dv) = gradients(lambda q, k, v: cpu_kernels.short_attention(q, k, v, None, 0.25), q, k, v)
    p = (q.float() @ k.float().transpose(-1, -2) / 32**0.5).softmax(-1)
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
    torch.testing.assert_close(y.float()[kept], (p / 0.75)[kept], rtol=0.05, atol=1e-3)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    expected = y.float().transpose(-1, -2) @ dy.bfloat16().float()
    assert (dv.float() - expected).norm() < 0.02 * expected.norm()
