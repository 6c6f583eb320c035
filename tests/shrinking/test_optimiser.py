"""The central optimisers: steps as written down, moments that travel, and those of another training refused."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedofa.shrinking.optimiser import CentralOptimiser
from fedofa.shrinking.recipe import CentralTraining
from fedofa.types.errors import CheckpointError, ConfigError, DivergenceError

ADAMW = CentralTraining(0.02, "adamw", momentum=0.8, weight_decay=0.1, max_gradient_norm=0.0)
SGD = replace(ADAMW, optimiser="sgd")
SHAPES = {"conv.weight": (3, 2), "conv.bias": (3,), "block.matrix_5to3": (2, 2)}


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def gradients(step: int) -> dict[str, torch.Tensor]:
    """Of every third step the bias has none, as where no subnet reads it."""
    generator = torch.Generator().manual_seed(100 + step)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: item for name, item in drawn.items() if name != "conv.bias" or step % 3}


def run(optimiser: CentralOptimiser, held: dict[str, nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        optimiser.zero_grad()
        for name, gradient in gradients(step).items():
            held[name].grad = gradient
        optimiser.step(rate=0.02)


def test_adamw_is_its_papers_algorithm_and_leaves_alone_what_has_no_gradient():
    held = parameters()
    run(CentralOptimiser(held, ADAMW), held, 0, 7)
    for name, start in parameters().items():
        weight = start.detach().double()
        first, second, count = torch.zeros_like(weight), torch.zeros_like(weight), 0
        for step in range(7):
            if (gradient := gradients(step).get(name)) is None:
                continue
            count += 1
            first, second = 0.8 * first + 0.2 * gradient, 0.99 * second + 0.01 * gradient.double() ** 2
            decay = 0.1 if name == "conv.weight" else 0.0
            scaled = first / (1 - 0.8**count) / ((second / (1 - 0.99**count)).sqrt() + 1e-8)
            weight = weight - 0.02 * (scaled + decay * weight)
        torch.testing.assert_close(held[name].detach().double(), weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("training", [SGD, ADAMW], ids=lambda training: training.optimiser)
def test_moments_carry_a_training_over(training):
    whole = parameters()
    run(CentralOptimiser(whole, training), whole, 0, 9)
    held = parameters()
    stopped = CentralOptimiser(held, training)
    run(stopped, held, 0, 5)
    moments = stopped.moments()
    resumed = CentralOptimiser(held, training)
    run(resumed, parameters(), 0, 2)  # what it did before does not matter
    resumed.check(moments)
    resumed.restore(moments)
    run(stopped, parameters(), 5, 6)  # what was handed out is a copy
    run(resumed, held, 5, 9)
    assert all(torch.equal(held[name], whole[name]) for name in whole)


def test_gradients_are_scaled_down_together():
    held, free = parameters(), parameters()
    norm = float(torch.stack([item.norm() for item in gradients(1).values()]).norm())
    run(CentralOptimiser(held, replace(SGD, max_gradient_norm=norm / 4)), held, 1, 2)
    run(CentralOptimiser(free, replace(SGD, max_gradient_norm=norm * 4)), free, 1, 2)
    start = parameters()["conv.bias"]
    torch.testing.assert_close(held["conv.bias"] - start, (free["conv.bias"] - start) / 4)


@pytest.mark.parametrize("training", [SGD, ADAMW, replace(SGD, max_gradient_norm=1.0)], ids=lambda item: item.optimiser)
def test_a_gradient_that_is_not_finite_changes_nothing(training):
    held = parameters()
    optimiser = CentralOptimiser(held, training)
    run(optimiser, held, 1, 2)
    before, moments = {name: item.detach().clone() for name, item in held.items()}, optimiser.moments()
    for name, gradient in gradients(2).items():
        held[name].grad = gradient
    held["conv.weight"].grad[0, 0] = float("inf")
    with pytest.raises(DivergenceError, match="gradients are not finite"):
        optimiser.step(rate=0.02)
    assert all(torch.equal(held[name], before[name]) for name in held)
    for kind, arrays in optimiser.moments().items():
        assert all(np.array_equal(value, moments[kind][name]) for name, value in arrays.items())


@pytest.mark.parametrize(("theirs", "own"), [(SGD, ADAMW), (ADAMW, SGD)], ids=["sgd's", "adamw's"])
def test_moments_of_another_optimiser_are_refused(theirs, own):
    held = parameters()
    optimiser = CentralOptimiser(held, theirs)
    run(optimiser, held, 0, 2)
    with pytest.raises(CheckpointError, match=r"not those of this training .* resume with the shrinking.optimiser"):
        CentralOptimiser(parameters(), own).check(optimiser.moments())
    CentralOptimiser(parameters(), own).check(CentralOptimiser(parameters(), theirs).moments())  # before any step


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        ("second", "conv.weight", np.zeros(3), "the checkpoint's second of 1 parameters is not of this training; of"),
        ("second", "conv.weight", None, "the checkpoint's moments (momentum, second, steps) are not those of this"),
        ("steps", "conv.bias", np.zeros(3), "of 'conv.bias': found (3,), expected ();"),
        ("momentum", "conv.weight", np.zeros((2, 3)), "of 'conv.weight': found (2, 3), expected (3, 2);"),
    ],
)
def test_damaged_moments_are_refused(kind, name, value, message):
    held = parameters()
    optimiser = CentralOptimiser(held, ADAMW)
    run(optimiser, held, 0, 2)
    moments = optimiser.moments()
    if value is None:
        del moments[kind][name]
    else:
        moments[kind][name] = value
    with pytest.raises(CheckpointError, match=re.escape(message)):
        optimiser.check(moments)


def test_a_rate_that_adamw_cannot_bear_is_refused():
    with pytest.raises(ConfigError, match=r"shrinking.learning_rate: expected below 0.1 with adamw .*, found 0.1"):
        CentralTraining(0.1, "adamw")
    with pytest.raises(ConfigError, match=r"shrinking.optimiser: expected one of \['sgd', 'adamw'\], found 'adam'"):
        CentralTraining(0.01, "adam")
