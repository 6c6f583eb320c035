"""Distances between a subnet's logits and its teacher's; the teacher gets no gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from fedofa.shrinking.schedule import TeacherLoss

DistanceOf = Callable[[Tensor, Tensor], Tensor]
"""From the subnet's and the teacher's logits, `(batch, num_classes)` both, to the mean over the batch."""

_LIMIT = 1e-4
"""An alpha this near 0 or 1 is taken for the limit, where the general formula divides by it."""
_LARGEST_EXPONENT = 50.0


def build_distance(loss: TeacherLoss) -> DistanceOf:
    """The distance that a `TeacherLoss` describes."""
    if loss.kind == "soft_cross_entropy":
        return partial(soft_cross_entropy, temperature=loss.temperature)
    return partial(
        adaptive_alpha_divergence, alpha_low=loss.alpha_low, alpha_high=loss.alpha_high, max_ratio=loss.max_ratio
    )


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean cross-entropy against the teacher's probabilities, times temperature^2 (arXiv 1503.02531, section 2)."""
    target = functional.softmax(teacher.detach() / temperature, dim=1)
    return functional.cross_entropy(student / temperature, target) * temperature**2


def adaptive_alpha_divergence(
    student: Tensor, teacher: Tensor, alpha_low: float = -1.0, alpha_high: float = 1.0, max_ratio: float = 5.0
) -> Tensor:
    """AlphaNet's loss (arXiv 2102.07954): for each example the larger of two alpha-divergences, then the mean.

    A negative alpha punishes a student that is sure where its teacher is not, a positive one the opposite.
    """
    low = alpha_divergence(student, teacher, alpha_low, max_ratio)
    high = alpha_divergence(student, teacher, alpha_high, max_ratio)
    return torch.where(high > low, high, low).mean()


def alpha_divergence(student: Tensor, teacher: Tensor, alpha: float, max_ratio: float = math.inf) -> Tensor:
    """The divergence D(p | q) of the teacher's probabilities p from the student's q for each example, `(batch,)`.

    D = sum_i q_i ((p_i / q_i)^alpha - 1) / (alpha (alpha - 1)): in the limit KL(p | q) at alpha = 1 and KL(q | p) at 0.
    Its gradient is -1/alpha sum_i q_i (p_i / q_i)^alpha grad log q_i, an expectation over q whose importance weights
    (p_i / q_i)^alpha may be huge. Here they are at most `max_ratio`; with no such bound the gradient is the exact one.
    The value is exact either way (up to weights of e^50, so that it stays finite).
    """
    log_q = functional.log_softmax(student, dim=1)
    log_p = functional.log_softmax(teacher.detach(), dim=1)
    q, log_ratio = log_q.detach().exp(), log_p - log_q.detach()
    exponent = (alpha * log_ratio).clamp(max=_LARGEST_EXPONENT)
    if abs(alpha) < _LIMIT:
        value, weight = -log_ratio, log_ratio
    else:  # the weights less 1 / alpha, which has no gradient since the q_i sum to 1
        weight = exponent.clamp(max=math.log(max_ratio)).expm1() / alpha
        at_one = abs(alpha - 1) < _LIMIT
        value = exponent.exp() * log_ratio if at_one else exponent.expm1() / (alpha * (alpha - 1))
    surrogate = -(q * weight * log_q).sum(1)
    return (q * value).sum(1) + (surrogate - surrogate.detach())
