"""What a student learns from a teacher's next-token distributions: divergence and its gradient, some rows at a time.

The loss of a head and of its teacher is one: (1 - alpha) * cross-entropy + alpha * T^2 * KL(teacher || student), both
softened by the temperature T (Hinton, Vinyals & Dean, arXiv 1503.02531, section 2). Neither model's logits ever exist
as a whole in float32: `models/cross_entropy.py` makes both for some rows, takes the gradient and forgets them.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 64 * 2**20  # of float32 logits at a time where they are given whole; some five times that are needed


class Teacher(Protocol):
    """What a teacher says of a micro-batch's rows, in the student's order of rows."""

    def divergence(self, log_q: Tensor, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
        """log_q (n, V): the student's log-probabilities of these rows, softened.

        KL(teacher || student) (n,), and the teacher's probabilities (n, V) as the gradient q - p wants them.
        """
        ...

    def row(self, index: Tensor) -> Teacher:
        """The same for some of the rows, in this order."""
        ...


class WholeLogits:
    """Every logit of the teacher. A vocabulary of another size is the same tokens and more or fewer rows of padding."""

    def __init__(
        self, hidden: Tensor | None = None, weight: Tensor | None = None, logits: Tensor | None = None
    ) -> None:
        """hidden (N, D) and weight (V, D), or logits (N, V); nothing: `keep` is to be called."""
        self.hidden, self.weight, self.logits = hidden, weight, logits

    def keep(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Called in the place of a teacher's loss: nothing but its input is wanted, and a loss that nobody reads."""
        sharded = hasattr(weight, "ds_id")  # ZeRO-3 takes it away again as soon as the head has run
        self.hidden, self.weight = hidden.detach(), weight.detach().clone() if sharded else weight.detach()
        nothing = hidden.new_zeros((), dtype=torch.float32)
        return nothing, nothing

    def make(self, rows: slice) -> Tensor:
        """Logits (n, V) of these rows."""
        if self.logits is not None:
            return self.logits[rows]
        assert self.hidden is not None
        assert self.weight is not None
        return self.hidden[rows] @ self.weight.t()

    def row(self, index: Tensor) -> WholeLogits:
        if self.logits is not None:
            return WholeLogits(logits=self.logits[index])
        assert self.hidden is not None
        return WholeLogits(self.hidden[index], self.weight)

    def divergence(self, log_q: Tensor, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
        logits = self.make(rows)[:, : log_q.size(-1)].float()
        log_p = logits.div_(temperature).log_softmax(-1)
        common = log_p.size(-1)
        p = log_p.exp()
        divergence = (p * (log_p - log_q[:, :common])).sum(-1)
        if common < log_q.size(-1):
            p = torch.nn.functional.pad(p, (0, log_q.size(-1) - common))
        return divergence, p


class TopK:
    """The teacher's k likeliest tokens, and all others as one: what fits on a disk.

    The divergence is that of k + 1 outcomes. Its gradient is q - p where the teacher's probability of the rest is
    shared out as the student shares out its own.
    """

    def __init__(self, log_p: Tensor, columns: Tensor) -> None:
        """log_p (N, k): softened log-probabilities; columns (N, k): of which tokens."""
        self.log_p, self.columns = log_p, columns

    @classmethod
    def of(cls, teacher: WholeLogits, rows: int, k: int, temperature: float) -> TopK:
        """The k likeliest of each row; the temperature is a part of what is kept, for the rest depends on it."""
        values, columns = [], []
        for start in range(0, rows, 256):
            logits = teacher.make(slice(start, min(start + 256, rows))).float().div_(temperature)
            best = logits.topk(min(k, logits.size(-1)), dim=-1)
            values.append(best.values - logits.logsumexp(-1, keepdim=True))
            columns.append(best.indices)
        return cls(torch.cat(values), torch.cat(columns))

    def row(self, index: Tensor) -> TopK:
        return TopK(self.log_p[index], self.columns[index])

    def divergence(self, log_q: Tensor, rows: slice, temperature: float) -> tuple[Tensor, Tensor]:
        log_p, columns = self.log_p[rows].float(), self.columns[rows].long()
        p = log_p.exp()
        rest = (1 - p.sum(-1)).clamp_min(0)  # (n,)
        chosen = log_q.gather(-1, columns)
        log_q_rest = torch.log1p(-chosen.exp().sum(-1).clamp_max(1 - 1e-6))
        divergence = (p * (log_p - chosen)).sum(-1) + torch.special.xlogy(rest, rest) - rest * log_q_rest
        whole = log_q.exp() * (rest / log_q_rest.exp()).unsqueeze(-1)
        return divergence, whole.scatter(-1, columns, p)


class SoftTargets:
    """A teacher's word on a micro-batch, how much it counts, and what has come of it (`total`)."""

    def __init__(self, teacher: Teacher, alpha: float, temperature: float, weight: float = 1.0) -> None:
        """The loss is (1 - alpha) * that of the targets + alpha * weight * that of the teacher."""
        self.teacher, self.alpha, self.temperature, self.weight = teacher, alpha, temperature, weight
        self.total: Tensor | None = None  # T^2 * KL, summed over the scored rows; float32, detached

    def gradient(self, logits: Tensor, scored: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """T^2 * KL of each row (n,) of logits (n, V), 0 where not scored, and its gradient (n, V), both float32."""
        t = self.temperature
        log_q = logits.float().div(t).log_softmax(-1)
        divergence, p = self.teacher.divergence(log_q, rows, t)
        found = divergence * scored * t**2
        self.total = found.sum() if self.total is None else self.total + found.sum()
        return found, log_q.exp_().sub_(p).mul_((scored * t).unsqueeze(-1))


def divergence(logits: Tensor, scored: Tensor, soft: SoftTargets) -> Tensor:
    """Sum of T^2 * KL over the scored rows of logits (N, V) that exist already; scored (N,) boolean. Differentiable."""
    found: Tensor = _Divergence.apply(logits, scored, soft)
    return found


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, scored: Tensor, soft: SoftTargets) -> Tensor:
        rows = max(1, CHUNK_BYTES // (4 * logits.size(-1)))
        gradient = torch.empty_like(logits)
        total = logits.new_zeros((), dtype=torch.float32)
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            found, change = soft.gradient(logits[part], scored[part], part)
            total += found.sum()
            gradient[part] = change
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * d_loss.to(gradient.dtype), None, None
