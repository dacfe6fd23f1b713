"""The worst small change of embeddings: of the right size, in the right direction, without touching a parameter."""

from __future__ import annotations

import torch
from torch import nn

from bigtrain.tasks.adversarial import worst_change

WEIGHT = torch.tensor([3.0, 4.0])


class Scores(nn.Module):
    """Sums what it is given, (B, T, 2) with a change, by a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.clone())

    def forward(self, x: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        return ((x + change) @ self.weight).square().sum()


def test_one_step_goes_to_the_edge_along_the_gradient() -> None:
    model, x = Scores(), torch.ones(2, 1, 2)
    change = worst_change(lambda change: model(x, change), torch.zeros_like(x), epsilon=0.5, steps=1)
    torch.testing.assert_close(change, (0.5 * WEIGHT / 5).expand(2, 1, 2))
    assert model.weight.grad is None
    assert not change.requires_grad


def test_several_steps_stay_inside_and_find_more() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(8, 3, 4)

    def loss(change: torch.Tensor) -> torch.Tensor:
        return net(x + change).square().sum()

    found = {}
    for steps in (1, 10):
        change = worst_change(loss, torch.zeros_like(x), epsilon=2.0, steps=steps)
        lengths = change.flatten(1).norm(dim=1)
        assert (lengths <= 2.0 + 1e-5).all()
        assert (lengths > 1.0).all()
        found[steps] = loss(change).item()
    assert found[10] > found[1] > loss(torch.zeros_like(x)).item()


def test_a_text_without_a_gradient_is_left_alone() -> None:
    x = torch.ones(2, 1, 2)
    mask = torch.tensor([1.0, 0.0])[:, None, None]
    model = Scores()
    change = worst_change(lambda change: model(x * mask, change * mask), torch.zeros_like(x), 0.5, steps=2)
    assert change[0].norm() > 0.4
    assert not change[1].any()
