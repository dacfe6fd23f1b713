"""What loss a size and an amount of data reach: loss = E + A / N^a + B / D^b (arXiv 2203.15556, equation 2)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Law:
    """N parameters, D tokens; the loss in nats per token."""

    E: float
    A: float
    a: float
    B: float
    b: float

    def loss(self, parameters: float, tokens: float) -> float:
        return float(self.E + self.A / parameters**self.a + self.B / tokens**self.b)

    def best_split(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens of the lowest loss for 6 N D = `flops` (equation 4)."""
        share = (self.a * self.A / (self.b * self.B)) ** (1 / (self.a + self.b))
        parameters = share * (flops / 6) ** (self.b / (self.a + self.b))
        return parameters, flops / 6 / parameters
