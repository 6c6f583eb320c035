"""Losses of the teacher: limits, gradients against autograd of the formula, the bound, nothing for the teacher."""

import math

import pytest
import torch
from torch.nn import functional

from fedofa.shrinking.losses import adaptive_alpha_divergence, alpha_divergence, build_distance, soft_cross_entropy
from fedofa.shrinking.schedule import TeacherLoss


def logits(seed: int, spread: float = 1.0) -> torch.Tensor:
    return spread * torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl(p_logits, q_logits):
    """KL(p | q) of each example."""
    log_p, log_q = functional.log_softmax(p_logits, 1), functional.log_softmax(q_logits, 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def by_formula(student, teacher, alpha):
    p, q = functional.softmax(teacher, 1), functional.softmax(student, 1)
    return (q * ((p / q) ** alpha - 1)).sum(1) / (alpha * (alpha - 1))


def gradient(function, student):
    leaf = student.clone().requires_grad_()
    function(leaf).sum().backward()
    return leaf.grad


@pytest.mark.parametrize("alpha", [-2.0, -1.0, -0.3, 0.4, 0.9, 1.5, 3.0])
def test_value_and_gradient_are_those_of_the_formula(alpha):
    student, teacher = logits(0), logits(1)
    torch.testing.assert_close(alpha_divergence(student, teacher, alpha), by_formula(student, teacher, alpha))
    got = gradient(lambda x: alpha_divergence(x, teacher, alpha), student)
    torch.testing.assert_close(got, gradient(lambda x: by_formula(x, teacher, alpha), student))


@pytest.mark.parametrize(("alpha", "forward"), [(1.0, True), (1.0 + 1e-3, True), (0.0, False), (1e-3, False)])
def test_the_limits_are_the_two_kl_divergences(alpha, forward):
    student, teacher = logits(2), logits(3)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if alpha not in (0.0, 1.0) else {"rtol": 1e-9, "atol": 1e-12}

    def expected(x):
        return kl(teacher, x) if forward else kl(x, teacher)

    torch.testing.assert_close(alpha_divergence(student, teacher, alpha), expected(student), **tolerance)
    got = gradient(lambda x: alpha_divergence(x, teacher, alpha), student)
    torch.testing.assert_close(got, gradient(expected, student), **tolerance)


def test_it_is_never_negative_and_zero_only_at_the_teacher():
    for alpha in (-1.0, 0.0, 0.5, 1.0, 2.0):
        assert (alpha_divergence(logits(4), logits(5), alpha) > 0).all()
        same = alpha_divergence(logits(4), logits(4), alpha)
        torch.testing.assert_close(same, torch.zeros_like(same))


@pytest.mark.parametrize("alpha", [-1.0, 1.0])
def test_the_bound_limits_the_weights_of_the_gradient(alpha):
    student, teacher = logits(6, 4.0), logits(7, 4.0)
    leaf = student.clone().requires_grad_()
    log_q = functional.log_softmax(leaf, 1)
    ratio = (functional.softmax(teacher, 1) / log_q.exp()).detach() ** alpha
    assert (ratio > 5).any()
    (-(log_q.exp().detach() * ratio.clamp(max=5.0) * log_q).sum() / alpha).backward()
    torch.testing.assert_close(gradient(lambda x: alpha_divergence(x, teacher, alpha, 5.0), student), leaf.grad)
    bounded, exact = (alpha_divergence(student, teacher, alpha, bound) for bound in (5.0, math.inf))
    assert torch.equal(bounded, exact), "the value knows no bound"


@pytest.mark.parametrize("alpha", [-1.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("bound", [1.3, 5.0, math.inf])
def test_value_and_gradient_are_the_papers_sums_term_by_term(alpha, bound):
    """D = 1/(a(a-1)) sum q ((p/q)^a - 1), or KL; dD = -1/a sum q min((p/q)^a, bound) d log q, arXiv 2102.07954."""
    student, teacher = logits(16, 2.0), logits(17, 2.0)
    values, gradients = [], []
    for z, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q = [math.exp(item) / sum(map(math.exp, z)) for item in z]
        p = [math.exp(item) / sum(map(math.exp, t)) for item in t]
        ratios = [(a / b) ** alpha for a, b in zip(p, q, strict=True)]
        if alpha == 1:
            values.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        else:
            values.append(sum(b * (ratio - 1) for b, ratio in zip(q, ratios, strict=True)) / (alpha * (alpha - 1)))
        weights = [b * min(ratio, bound) for b, ratio in zip(q, ratios, strict=True)]
        gradients.append([-sum(w * ((i == k) - q[k]) for i, w in enumerate(weights)) / alpha for k in range(len(z))])
    torch.testing.assert_close(
        alpha_divergence(student, teacher, alpha, bound), torch.tensor(values, dtype=torch.float64)
    )
    got = gradient(lambda x: alpha_divergence(x, teacher, alpha, bound), student)
    torch.testing.assert_close(got, torch.tensor(gradients, dtype=torch.float64))


def test_it_stays_finite_where_a_probability_vanishes():
    student, teacher = torch.tensor([[200.0, 0.0, -200.0]]), torch.tensor([[-200.0, 0.0, 200.0]])
    for alpha in (-1.0, 0.0, 1.0):
        leaf = student.clone().requires_grad_()
        value = alpha_divergence(leaf, teacher, alpha, 5.0)
        value.sum().backward()
        assert torch.isfinite(value).all()
        assert torch.isfinite(leaf.grad).all()


def test_the_adaptive_loss_takes_the_larger_one_example_by_example():
    student, teacher = logits(8), logits(8) + logits(9, 0.5)
    low, high = (alpha_divergence(student, teacher, alpha, 5.0) for alpha in (-1.0, 1.0))
    assert (low > high).any()
    assert (high > low).any()
    torch.testing.assert_close(adaptive_alpha_divergence(student, teacher), torch.maximum(low, high).mean())
    expected = torch.where(
        (high > low)[:, None],
        gradient(lambda x: alpha_divergence(x, teacher, 1.0, 5.0), student),
        gradient(lambda x: alpha_divergence(x, teacher, -1.0, 5.0), student),
    )
    torch.testing.assert_close(gradient(lambda x: 6 * adaptive_alpha_divergence(x, teacher), student), expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_cross_entropy_by_hand(temperature):
    student, teacher = logits(10), logits(11)
    p = functional.softmax(teacher / temperature, 1)
    expected = -(p * functional.log_softmax(student / temperature, 1)).sum(1).mean() * temperature**2
    torch.testing.assert_close(soft_cross_entropy(student, teacher, temperature), expected)
    got = gradient(lambda x: soft_cross_entropy(x, teacher, 1.0), student)
    torch.testing.assert_close(got, gradient(lambda x: kl(teacher, x).mean(), student))


@pytest.mark.parametrize("loss", [TeacherLoss(), TeacherLoss("alpha_divergence")])
def test_the_teacher_gets_no_gradient(loss):
    student, teacher = logits(12).requires_grad_(), logits(13).requires_grad_()
    build_distance(loss)(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_a_described_loss_is_built_with_its_settings():
    student, teacher = logits(14, 3.0), logits(15, 3.0)
    described = TeacherLoss("alpha_divergence", alpha_low=-0.5, alpha_high=0.7, max_ratio=2.0)
    got = gradient(lambda x: build_distance(described)(x, teacher), student)
    assert torch.equal(got, gradient(lambda x: adaptive_alpha_divergence(x, teacher, -0.5, 0.7, 2.0), student))
    assert not torch.equal(got, gradient(lambda x: adaptive_alpha_divergence(x, teacher, -0.5, 0.7, 3.0), student))
    assert build_distance(TeacherLoss(temperature=2.0))(student, teacher) == soft_cross_entropy(student, teacher, 2.0)
