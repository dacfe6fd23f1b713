"""The fused head and loss against F.cross_entropy: value, gradients, smoothing, z-loss, ignored tokens, chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigtrain.models import cross_entropy
from bigtrain.models.cross_entropy import linear_cross_entropy

ROWS, DIM, VOCAB = 37, 24, 101


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, DIM, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, DIM, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    targets[::5] = -100
    return hidden, weight, targets


def reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    scored = targets != -100
    logits = F.linear(hidden.float(), weight.float())[scored]
    loss = F.cross_entropy(logits, targets[scored], reduction="sum", label_smoothing=smoothing)
    loss = loss + z_loss * logits.logsumexp(-1).square().sum()
    return loss, F.cross_entropy(logits, targets[scored], reduction="sum")


def relative_error(value: Tensor | None, expected: Tensor | None) -> float:
    assert value is not None
    assert expected is not None
    return float((value.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("chunk_rows", [1, 10, 1000])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.1, 1e-2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_and_gradients(
    dtype: torch.dtype, smoothing: float, z_loss: float, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", chunk_rows * VOCAB * dtype.itemsize)
    monkeypatch.setattr(cross_entropy, "CACHE_BYTES", 4 * 4 * VOCAB)
    hidden, weight, targets = inputs(dtype)
    loss, nll = linear_cross_entropy(hidden, weight, targets, smoothing, z_loss)
    (loss * 0.3).backward()
    gradients = hidden.grad, weight.grad
    hidden, weight, targets = inputs(dtype)
    expected_loss, expected_nll = reference(hidden, weight, targets, smoothing, z_loss)
    (expected_loss * 0.3).backward()

    half = dtype == torch.bfloat16
    assert relative_error(loss.detach(), expected_loss.detach()) < (1e-3 if half else 1e-6)
    assert relative_error(nll, expected_nll.detach()) < (1e-3 if half else 1e-6)
    assert relative_error(gradients[0], hidden.grad) < (1e-2 if half else 1e-6)
    assert relative_error(gradients[1], weight.grad) < (1e-2 if half else 1e-6)


def test_without_gradients_the_loss_is_the_same() -> None:
    hidden, weight, targets = inputs(torch.float32)
    loss, nll = linear_cross_entropy(hidden, weight, targets, 0.1, 1e-2)
    with torch.no_grad():
        without = linear_cross_entropy(hidden, weight, targets, 0.1, 1e-2)
    assert not without[0].requires_grad
    torch.testing.assert_close(without, (loss.detach(), nll))


def test_nothing_scored_gives_zero_and_no_nan() -> None:
    hidden, weight, targets = inputs(torch.float32)
    loss, _ = linear_cross_entropy(hidden, weight, targets.fill_(-100), 0.1, 1e-2)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert hidden.grad.count_nonzero() == 0


def test_a_second_backward_is_an_error() -> None:
    hidden, weight, targets = inputs(torch.float32)
    loss, _ = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once"):
        loss.backward()


def test_autocast_multiplies_in_bfloat16_and_returns_float32_gradients() -> None:
    hidden, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    gradient = weight.grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    hidden, weight, targets = inputs(torch.float32)
    reference(hidden, weight, targets, 0.0, 0.0)[0].backward()
    assert relative_error(gradient, weight.grad) < 1e-2
