"""The levers of a plan in whole trainings: they change memory, not what is learned."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from cohorts import build_supernet

from fedofa.device.allocator import resident_bytes
from fedofa.finetune.engine import planned
from fedofa.finetune.memory import LiveBytes
from fedofa.finetune.plans import build_plan
from fedofa.finetune.recipe import LocalTraining
from fedofa.finetune.recompute import recomputed
from fedofa.finetune.trainer import fine_tune, label_objective, run_steps
from fedofa.types.errors import ConfigError

SUPERNET = build_supernet(norm="group")
BATCH_NORM = build_supernet(norm="batch")
SGD = LocalTraining(batch_size=4, epochs=2, learning_rate=0.02)


def trained(supernet, training=SGD, plan="full", **levers):
    subnet = supernet.space.largest()
    model = supernet.build(subnet).double()
    model.dropout.p = 0.0
    received = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    settings = {"statistics": levers.pop("statistics", "frozen")}
    full = replace(build_plan(plan, supernet.block_costs(subnet), **settings), **levers)
    inputs = torch.randn(10, 1, 20, 20, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    return fine_tune(model, full, received, inputs, torch.arange(10) % 5, training, generator)


def chain(supernet):
    names = [block.name for block in supernet.block_costs(supernet.space.largest()) if block.name.startswith("stages.")]
    return (tuple(names[:2]), tuple(names[2:3]), tuple(names[3:]))


@pytest.mark.parametrize("supernet", [SUPERNET, BATCH_NORM], ids=["group", "batch"])
@pytest.mark.parametrize(
    "levers",
    [
        {"lean": True},
        {"micro_batch": 1},
        {"micro_batch": 3},
        {"fused_step": True},
        {"micro_batch": 1, "fused_step": True},
        {"micro_batch": 4, "fused_step": True},
        {"recompute": True},
        {"lean": True, "micro_batch": 2, "recompute": True},
        {"lean": True, "fused_step": True, "recompute": True},
    ],
    ids=str,
)
def test_exact_levers_give_the_same_training(supernet, levers):
    levers = {**levers, "recompute": chain(supernet)} if "recompute" in levers else levers
    plain, found = trained(supernet), trained(supernet, **levers)
    assert found.loss == pytest.approx(plain.loss, rel=1e-6)
    for name, change in plain.weights.items():
        np.testing.assert_allclose(found.weights[name], change, rtol=1e-4, atol=1e-7, err_msg=name)


def test_micro_batches_see_the_images_of_the_whole_batch_moved_alike():
    moving = replace(SGD, max_shift=2)
    plain, found = trained(SUPERNET, moving), trained(SUPERNET, moving, micro_batch=1)
    still = trained(SUPERNET)
    for name, change in plain.weights.items():
        np.testing.assert_allclose(found.weights[name], change, rtol=1e-4, atol=1e-7, err_msg=name)
    assert not np.allclose(plain.weights["classifier.weight"], still.weights["classifier.weight"], rtol=1e-2)


def test_no_copy_of_a_whole_batch_lies_beside_a_micro_batch():
    subnet = SUPERNET.space.largest()
    model, plan = SUPERNET.build(subnet), build_plan("head", SUPERNET.block_costs(subnet), lean=True, micro_batch=1)
    inputs, labels = torch.zeros(64, 1, 40, 40), torch.zeros(64, dtype=torch.int64)
    received = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    with LiveBytes((inputs, labels, *model.parameters(), *model.buffers())) as live:
        fine_tune(model, plan, received, inputs, labels, replace(SGD, batch_size=64, epochs=1), torch.Generator())
    assert live.peak < inputs.nbytes


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_gradients_summed_in_the_momentum_give_the_same_training(momentum, weight_decay):
    recipe = replace(SGD, momentum=momentum, weight_decay=weight_decay)
    plain, found = trained(BATCH_NORM, recipe), trained(BATCH_NORM, recipe, lean=True, micro_batch=1, fused_step=True)
    for name, change in plain.weights.items():
        np.testing.assert_allclose(found.weights[name], change, rtol=1e-6, atol=1e-10, err_msg=name)


def test_gradients_summed_in_the_momentum_take_no_memory_of_their_own():
    """Of five steps of a network with many weights and small maps, by all tensors that are alive at a time."""
    subnet = SUPERNET.space.largest()
    plan = build_plan("full", SUPERNET.block_costs(subnet), lean=True, micro_batch=1)
    recipe = replace(SGD, batch_size=2, epochs=1)
    inputs, labels = torch.zeros(10, 1, 4, 4), torch.zeros(10, dtype=torch.int64)

    def peak(plan):
        model = SUPERNET.build(subnet)
        with LiveBytes((inputs, labels, *model.parameters(), *model.buffers())) as live:
            run_steps(model, plan, inputs, recipe, torch.Generator(), label_objective(labels, 0.0))
        return live.peak

    trained_bytes = sum(resident_bytes(parameter.nbytes) for parameter in SUPERNET.build(subnet).parameters())
    assert trained_bytes <= peak(plan) - peak(replace(plan, fused_step=True)) < 1.25 * trained_bytes


@pytest.mark.parametrize(
    "levers", [{"kept": "bfloat16"}, {"kept": "int8"}, {"kept": "int4"}, {"kept_fraction": 0.5}], ids=str
)
def test_inexact_levers_learn_nearly_the_same_and_repeatably(levers):
    plain = trained(SUPERNET)
    found, again = (trained(SUPERNET, lean=True, **levers) for _ in range(2))
    assert all(np.array_equal(found.weights[name], again.weights[name]) for name in found.weights)
    ours, exact = (np.concatenate([item.ravel() for item in result.weights.values()]) for result in (found, plain))
    assert not np.array_equal(ours, exact)
    cosine = ours @ exact / np.linalg.norm(ours) / np.linalg.norm(exact)
    assert cosine >= (0.7 if levers.get("kept") in ("int4", None) else 0.98)


@pytest.mark.parametrize("plan", ["full", "bias", "head", "last_blocks(1)"])
def test_lean_operations_train_every_kind_of_plan(plan):
    plain, found = trained(SUPERNET, plan=plan), trained(SUPERNET, plan=plan, lean=True)
    for name, change in plain.weights.items():
        np.testing.assert_allclose(found.weights[name], change, rtol=1e-4, atol=1e-7, err_msg=name)


def test_micro_batches_are_refused_where_statistics_are_the_batchs():
    blocks = BATCH_NORM.block_costs(BATCH_NORM.space.largest())
    with pytest.raises(
        ConfigError,
        match=r"micro-batches change what batch norm computes .* finetune.statistics=frozen, use group norm",
    ):
        build_plan("full", blocks, micro_batch=2, statistics="batch")
    plan = replace(build_plan("full", blocks), micro_batch=2)
    with pytest.raises(ConfigError, match=r"plan 'full': micro-batches change what batch norm computes"):
        planned(BATCH_NORM.build(BATCH_NORM.space.largest()), plan).__enter__()
    build_plan("full", SUPERNET.block_costs(SUPERNET.space.largest()), micro_batch=2)


@pytest.mark.parametrize("clash", [{"optimiser": "adamw"}, {"max_gradient_norm": 1.0}, {"proximal_mu": 0.1}], ids=str)
@pytest.mark.parametrize("micro_batch", [0, 2])
def test_a_fused_step_is_refused_where_all_gradients_are_needed_at_once(clash, micro_batch):
    with pytest.raises(ConfigError, match=f"goes with plain SGD only; found finetune.{next(iter(clash))}"):
        trained(SUPERNET, replace(SGD, **clash), fused_step=True, micro_batch=micro_batch)


def test_a_segment_of_unknown_blocks_leaves_everything_as_it_was():
    model = SUPERNET.build(SUPERNET.space.largest())
    blocks = SUPERNET.block_costs(SUPERNET.space.largest())
    plan = replace(build_plan("full", blocks), recompute=(*chain(SUPERNET), ("stages.9.0",)), lean=True)
    with pytest.raises(ConfigError, match=r"recomputes 'stages\.9\.0'"):
        planned(model, plan).__enter__()
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_dropout_drops_the_same_values_when_a_segment_runs_again():
    model = torch.nn.Sequential(torch.nn.Linear(50, 50), torch.nn.Dropout(0.5), torch.nn.Linear(50, 3))
    x = torch.randn(4, 50)

    def gradients():
        torch.manual_seed(1)
        model.zero_grad()
        model(x).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    expected = gradients()
    with recomputed(list(model)):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))


def test_a_segments_gradients_come_one_layer_after_the_other():
    happened = []

    class Watched(torch.nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            if y.requires_grad:
                y.register_hook(lambda _: happened.append("passes"))
            return y

    def took(parameter):
        if parameter.grad is not None:  # the outer pass comes by once more, with none
            happened.append("gradient")
            parameter.grad = None

    model = torch.nn.Sequential(*(Watched(30, 30, bias=False) for _ in range(3)))
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(took)
    with recomputed(list(model)):
        model(torch.randn(4, 30)).square().sum().backward()
    assert happened == ["passes", "gradient"] * 3


def test_training_with_sgd_and_checkpoints_does_not_import_torchs_compiler():
    code = (
        "import sys, torch; from fedofa.finetune.recipe import LocalTraining; "
        "from fedofa.finetune.trainer import fine_tune; "
        "from fedofa.types.plan import FineTunePlan; "
        "model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten()); "
        "received = {name: item.detach().numpy().copy() for name, item in model.named_parameters()}; "
        "plan = FineTunePlan('p', ('0.weight',), (('0', '1'),), lean=True); "
        "fine_tune(model, plan, received, torch.randn(4, 1, 3, 3), torch.tensor([0, 1, 0, 1]), LocalTraining(), "
        "torch.Generator()); "
        "print([name for name in ('torch._dynamo', 'torch._inductor', 'sympy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "[]"
