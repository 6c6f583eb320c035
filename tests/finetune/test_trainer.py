"""Local training against loops written out by hand, on the same order of batches."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cohorts import build_supernet
from torch.nn import functional

from fedofa.finetune.plans import build_plan
from fedofa.finetune.recipe import FineTuneResult, LocalTraining
from fedofa.finetune.trainer import fine_tune, label_objective, run_steps, shifted
from fedofa.supernet.base import Supernet
from fedofa.supernet.families import two_conv_cnn
from fedofa.supernet.fixed import FixedSupernet
from fedofa.types.errors import ConfigError

torch.manual_seed(0)
CNN = FixedSupernet(two_conv_cnn(1, 5, 8), (1, 8, 8))
SUPERNET = build_supernet()
PLANS = ("full", "last_blocks(2)", "bias", "head")
BOUNDS = ((0, 4), (4, 8), (8, 12), (12, 16), (16, 21))  # 21 examples in fours: the last one joins the batch before it


def examples(side: int, num_examples: int = 21) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(num_examples, 1, side, side, generator=generator)
    return inputs, torch.randint(0, 5, (num_examples,), generator=generator)


def run(
    supernet: Supernet, name: str, training: LocalTraining, *, seed: int = 3, num_examples: int = 21, **plan_settings
) -> tuple[FineTuneResult, torch.nn.Module, dict[str, np.ndarray]]:
    """Train the largest subnet; dropout draws from the default generator, which is seeded here."""
    subnet = supernet.space.largest()
    model = supernet.build(subnet)
    received = {key: tensor.detach().numpy().copy() for key, tensor in model.state_dict().items()}
    plan = build_plan(name, supernet.block_costs(subnet), **plan_settings)
    inputs, labels = examples(supernet.resolution(subnet) or 8, num_examples)
    torch.manual_seed(11)
    generator = torch.Generator().manual_seed(seed)
    return fine_tune(model, plan, received, inputs, labels, training, generator), model, received


def batches(epochs: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(21, generator=generator) for _ in range(epochs)]
    return [order[start:end] for order in orders for start, end in BOUNDS]


def hand_written(training: LocalTraining) -> tuple[dict[str, np.ndarray], list[float]]:
    """Plain SGD or AdamW with every term spelled out: the losses' sum is differentiated, then the step is taken."""
    model = CNN.build(CNN.space.largest()).train()
    parameters = dict(model.named_parameters())
    start = {name: tensor.detach().clone() for name, tensor in parameters.items()}
    first = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    inputs, labels = examples(8)
    losses = []
    for number, batch in enumerate(batches(training.epochs), 1):
        log_probabilities = functional.log_softmax(model(inputs[batch]), 1)
        target = functional.one_hot(labels[batch], 5) * (1 - training.label_smoothing) + training.label_smoothing / 5
        loss = -(target * log_probabilities).sum(1).mean()
        losses.append(loss.item())
        distance = sum((tensor - start[name]).square().sum() for name, tensor in parameters.items())
        total = loss + training.proximal_mu / 2 * distance
        gradients = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        scale = min(1.0, training.max_gradient_norm / norm) if training.max_gradient_norm else 1.0
        with torch.no_grad():
            for name, tensor in parameters.items():
                gradient = gradients[name] * scale
                if training.optimiser == "adamw":
                    first[name] = 0.9 * first[name] + 0.1 * gradient
                    second[name] = 0.999 * second[name] + 0.001 * gradient.square()
                    root = (second[name] / (1 - 0.999**number)).sqrt() + 1e-8
                    tensor.mul_(1 - training.learning_rate * training.weight_decay)
                    tensor.sub_(training.learning_rate * first[name] / (1 - 0.9**number) / root)
                else:
                    gradient = gradient + training.weight_decay * tensor
                    first[name] = training.momentum * first[name] + gradient
                    tensor.sub_(training.learning_rate * first[name])
    return {name: (tensor - start[name]).detach().numpy() for name, tensor in parameters.items()}, losses


SGD = LocalTraining(batch_size=4, epochs=2)


@pytest.mark.parametrize(
    "training",
    [
        SGD,
        replace(SGD, momentum=0.0, learning_rate=0.2),
        replace(SGD, weight_decay=0.1),
        replace(SGD, label_smoothing=0.2),
        replace(SGD, proximal_mu=1.5),
        replace(SGD, max_gradient_norm=0.3),
        replace(SGD, proximal_mu=1.0, max_gradient_norm=0.5, weight_decay=0.01, label_smoothing=0.1),
        replace(SGD, optimiser="adamw", learning_rate=0.003),
        replace(SGD, optimiser="adamw", learning_rate=0.003, weight_decay=0.5, proximal_mu=0.5, label_smoothing=0.1),
    ],
    ids=["sgd", "plain sgd", "decay", "smoothing", "proximal", "clipping", "all", "adamw", "adamw all"],
)
def test_fine_tuning_equals_a_hand_written_loop(training):
    expected, losses = hand_written(training)
    result, _, _ = run(CNN, "full", training)
    assert result.num_steps == training.num_steps(21) == 10
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert result.weights.keys() == expected.keys()
    for name, change in expected.items():
        assert np.abs(change).max() > 1e-4
        np.testing.assert_allclose(result.weights[name], change, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("field", ["momentum", "weight_decay", "label_smoothing", "proximal_mu", "max_gradient_norm"])
def test_every_setting_makes_a_difference(field):
    """Guards the comparison above: with the setting off the result is another one."""
    on = replace(SGD, **{field: 0.3})
    off = replace(SGD, **{field: 0.0})
    a, b = (run(CNN, "full", training)[0].weights for training in (on, off))
    assert max(np.abs(a[name] - b[name]).max() for name in a) > 1e-3


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("recompute", [False, True])
def test_what_a_plan_freezes_stays_bit_identical(name, recompute):
    training = replace(SGD, weight_decay=0.1)
    result, model, received = run(SUPERNET, name, training, recompute=recompute)
    plan = build_plan(name, SUPERNET.block_costs(SUPERNET.space.largest()))
    assert tuple(result.weights) == plan.trainable
    for key, tensor in model.state_dict().items():
        same = tensor.numpy().tobytes() == received[key].tobytes()
        assert same == (key not in result.weights), key


@pytest.mark.parametrize("name", PLANS)
def test_recomputation_changes_no_result(name):
    plain, _, _ = run(SUPERNET, name, SGD)
    again, model, _ = run(SUPERNET, name, SGD, recompute=True)
    assert again.loss == pytest.approx(plain.loss, abs=1e-6)
    for key, change in plain.weights.items():
        np.testing.assert_allclose(again.weights[key], change, atol=1e-6)
    assert not [key for key, module in model.named_modules() if "forward" in module.__dict__]


@pytest.mark.parametrize("statistics", ["batch", "frozen"])
def test_recomputation_changes_no_result_with_batch_norm(statistics):
    supernet = build_supernet(norm="batch")
    plain, model, received = run(supernet, "full", SGD, statistics=statistics)
    again, _, _ = run(supernet, "full", SGD, statistics=statistics, recompute=True)
    for key, change in plain.weights.items():
        np.testing.assert_allclose(again.weights[key], change, atol=1e-6)
    moved = [key for key, buffer in model.named_buffers() if not np.array_equal(buffer.numpy(), received[key])]
    assert not moved, "running statistics are the server's business"


def test_the_delta_is_trained_minus_received():
    result, _, received = run(SUPERNET, "full", SGD)
    subnet = SUPERNET.space.largest()
    inputs, labels = examples(SUPERNET.resolution(subnet) or 8)
    plan = build_plan("full", SUPERNET.block_costs(subnet))
    generator, objective = torch.Generator().manual_seed(3), label_objective(labels, SGD.label_smoothing)
    torch.manual_seed(11)  # of dropout
    trained, _ = run_steps(SUPERNET.build(subnet), plan, inputs, SGD, generator, objective)
    assert result.weights.keys() == set(plan.trainable)
    for name, parameter in zip(plan.trainable, trained, strict=True):
        change = result.weights[name]
        assert change.dtype == np.float32
        assert change.shape == received[name].shape
        np.testing.assert_array_equal(change, parameter.detach().numpy() - received[name])
        assert change.any()


def test_the_delta_takes_the_memory_of_what_trained():
    result, model, _ = run(SUPERNET, "full", SGD)
    for name, parameter in model.named_parameters():
        assert np.shares_memory(result.weights[name], parameter.detach().numpy()), name


def test_the_same_generator_gives_the_same_bits_and_another_does_not():
    first, _, _ = run(SUPERNET, "full", SGD)
    second, _, _ = run(SUPERNET, "full", SGD)
    other, _, _ = run(SUPERNET, "full", SGD, seed=4)
    assert all(first.weights[name].tobytes() == second.weights[name].tobytes() for name in first.weights)
    assert first.loss == second.loss
    assert any(first.weights[name].tobytes() != other.weights[name].tobytes() for name in first.weights)


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "sizes"),
    [(9, 4, [4, 5]), (10, 4, [4, 4, 2]), (8, 4, [4, 4]), (5, 4, [5]), (4, 4, [4]), (3, 4, [3]), (1, 4, [1]),
     (3, 1, [1, 1, 1]), (2, 8, [2])],
)  # fmt: skip
def test_a_last_batch_of_one_joins_the_one_before_it(num_examples, batch_size, sizes):
    supernet = FixedSupernet(two_conv_cnn(1, 5, 8), (1, 8, 8))
    seen = []
    model = supernet.build(supernet.space.largest())
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    inputs, labels = examples(8, num_examples)
    plan = build_plan("head", supernet.block_costs(supernet.space.largest()))
    received = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}
    training = LocalTraining(batch_size=batch_size)
    result = fine_tune(model, plan, received, inputs, labels, training, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in seen] == sizes
    assert result.num_steps == training.num_steps(num_examples) == len(sizes)
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat(seen), inputs[order])


@pytest.mark.parametrize("max_steps", [1, 5, 7, 12])
def test_max_steps_counts_steps_instead_of_epochs(max_steps):
    training = replace(SGD, max_steps=max_steps)
    result, _, _ = run(CNN, "full", training)
    assert result.num_steps == training.num_steps(21) == max_steps
    if max_steps == 5:  # one epoch
        whole, _, _ = run(CNN, "full", replace(SGD, epochs=1))
        assert all(np.array_equal(whole.weights[name], change) for name, change in result.weights.items())


def test_shifted_images_are_moved_whole_with_their_edges_repeated():
    """Against a padded crop: every image is one of the 25 of two pixels either way, and all offsets turn up."""
    images = torch.randn(200, 2, 6, 5, generator=torch.Generator().manual_seed(0))
    kept = images.clone()
    found = shifted(images, 2, torch.Generator().manual_seed(1))
    assert found.shape == images.shape
    assert torch.equal(images, kept)
    padded = functional.pad(images, (2, 2, 2, 2), mode="replicate")
    offsets = [(row, column) for row in range(5) for column in range(5)]
    crops = torch.stack([padded[:, :, row : row + 6, column : column + 5] for row, column in offsets])
    hits = (crops == found).flatten(2).all(2)
    assert (hits.sum(0) == 1).all()
    assert hits.any(1).all()
    assert torch.equal(found, shifted(images, 2, torch.Generator().manual_seed(1)))


def test_without_a_shift_images_and_generator_are_left_alone():
    images, generator = torch.randn(3, 1, 4, 4), torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert shifted(images, 0, generator) is images
    assert torch.equal(generator.get_state(), before)


def test_shifts_are_drawn_from_the_generator_and_change_the_result():
    moving = replace(SGD, max_shift=1)
    first, second, still = (run(CNN, "full", training)[0].weights for training in (moving, moving, SGD))
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    assert max(np.abs(first[name] - still[name]).max() for name in first) > 1e-3


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("optimiser", ["adam", ""]),
        ("learning_rate", [-0.1, math.nan, math.inf]),
        ("weight_decay", [-1, math.nan]),
        ("proximal_mu", [-1, math.nan]),
        ("max_gradient_norm", [-1, math.inf]),
        ("epochs", [0, -1]),
        ("max_steps", [-1]),
        ("max_shift", [-1]),
        ("batch_size", [0]),
        ("momentum", [1.0, -0.1, math.nan]),
        ("label_smoothing", [1.0, -0.1, math.nan]),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field, values):
    for value in values:
        with pytest.raises(ConfigError, match=rf"finetune\.{field}: expected .*, found {value!r}"):
            LocalTraining(**{field: value})


def test_training_on_no_examples_is_refused():
    with pytest.raises(Exception, match="training example"):
        run(CNN, "head", SGD, num_examples=0)
