"""The fused loss of targets and teacher against the plain formulas and autograd."""

import pytest
import torch
import torch.nn.functional as F

from bigtrain.models import cross_entropy
from bigtrain.models.cross_entropy import linear_cross_entropy
from bigtrain.models.soft_targets import SoftTargets, TopK, WholeLogits, divergence

ROWS, DIM, VOCAB, T, ALPHA, WEIGHT = 37, 8, 50, 2.0, 0.3, 1.5


@pytest.fixture
def parts():
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, DIM, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, DIM, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(VOCAB, (ROWS,))
    targets[::5] = -100
    teacher = WholeLogits(torch.randn(ROWS, 12, dtype=torch.float64), torch.randn(VOCAB, 12, dtype=torch.float64))
    return hidden, weight, targets, teacher


def plain(hidden, weight, targets, log_p):
    """(1 - alpha) * CE + alpha * weight * T^2 KL, summed over the scored rows."""
    logits = hidden @ weight.t()
    task = F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    kl = F.kl_div((logits / T).log_softmax(-1), log_p, log_target=True, reduction="none").sum(-1)
    return (1 - ALPHA) * task + ALPHA * WEIGHT * T**2 * (kl * (targets != -100)).sum(), kl


@pytest.mark.parametrize("small", [False, True])
def test_the_fused_loss_and_its_gradients_are_those_of_the_formula(parts, monkeypatch, small):
    hidden, weight, targets, teacher = parts
    if small:  # several chunks, and several parts of a chunk
        monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 20 * VOCAB * 10)
        monkeypatch.setattr(cross_entropy, "CACHE_BYTES", 4 * VOCAB * 3)
    wanted, kl = plain(hidden, weight, targets, (teacher.make(slice(None)) / T).log_softmax(-1))
    d_hidden, d_weight = torch.autograd.grad(wanted, (hidden, weight))

    soft = SoftTargets(teacher, ALPHA, T, WEIGHT)
    loss, nll = linear_cross_entropy(hidden, weight, targets, soft=soft)
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert nll.item() == pytest.approx(F.cross_entropy(hidden @ weight.t(), targets, reduction="sum").item(), rel=1e-5)
    assert float(soft.total) == pytest.approx(float((T**2 * kl.detach() * (targets != -100)).sum()), rel=1e-5)
    torch.testing.assert_close(hidden.grad, d_hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, d_weight, rtol=1e-4, atol=1e-4)


def test_logits_that_exist_already_give_the_same_divergence_and_gradient(parts):
    hidden, weight, targets, teacher = parts
    logits = (hidden @ weight.t()).detach().requires_grad_()
    kl = F.kl_div((logits / T).log_softmax(-1), (teacher.make(slice(None)) / T).log_softmax(-1), log_target=True,
                  reduction="none").sum(-1)  # fmt: skip
    wanted = T**2 * (kl * (targets != -100)).sum()
    (gradient,) = torch.autograd.grad(wanted, logits)
    found = divergence(logits, targets != -100, SoftTargets(teacher, ALPHA, T))
    found.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [VOCAB - 10, VOCAB + 14])
def test_a_teacher_with_other_rows_of_padding_speaks_of_the_common_tokens(rows):
    torch.manual_seed(1)
    mine, theirs = torch.randn(5, VOCAB), torch.randn(5, rows)
    log_q, log_p = mine.log_softmax(-1), theirs[:, :VOCAB].log_softmax(-1)
    wanted = (log_p.exp() * (log_p - log_q[:, :rows])).sum()
    found = divergence(mine, torch.ones(5, dtype=torch.bool), SoftTargets(WholeLogits(logits=theirs), 1.0, 1.0))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_the_likeliest_tokens_and_the_rest_as_one_are_the_divergence_of_so_many_outcomes(parts):
    hidden, weight, targets, teacher = parts
    kept = TopK.of(teacher, ROWS, 7, T)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    q = (logits / T).softmax(-1)
    p = (teacher.make(slice(None)) / T).softmax(-1)
    columns = p.topk(7, dim=-1).indices

    def outcomes(x):
        chosen = x.gather(-1, columns)
        return torch.cat((chosen, 1 - chosen.sum(-1, keepdim=True)), dim=-1)

    kl = (outcomes(p) * (outcomes(p).log() - outcomes(q).log())).sum(-1)
    wanted = T**2 * (kl * (targets != -100)).sum()
    (gradient,) = torch.autograd.grad(wanted, logits)
    found = divergence(logits, targets != -100, SoftTargets(kept, ALPHA, T))
    found.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-3, atol=1e-4)


def test_of_all_tokens_nothing_is_left_for_the_rest(parts):
    hidden, weight, targets, teacher = parts
    logits, scored = (hidden @ weight.t()).detach(), targets != -100
    whole = divergence(logits, scored, SoftTargets(teacher, ALPHA, T))
    kept = divergence(logits, scored, SoftTargets(TopK.of(teacher, ROWS, VOCAB, T), ALPHA, T))
    assert kept.item() == pytest.approx(whole.item(), rel=1e-4)


def test_a_student_that_says_the_same_has_nothing_to_learn(parts):
    _, _, targets, teacher = parts
    logits = teacher.make(slice(None)).float().requires_grad_()
    found = divergence(logits, targets != -100, SoftTargets(teacher, ALPHA, T))
    found.backward()
    assert abs(found.item()) < 1e-4
    assert logits.grad.abs().max() < 1e-6
