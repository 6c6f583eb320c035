"""Which runs can have clients without torch, and what they are sent."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from clients import onnx_engine
from conf.compose import compose_conf
from fedofa.data.federation import Examples
from fedofa.finetune.onnx_network import compile_step
from fedofa.finetune.plans import build_plan
from fedofa.finetune.recipe import LocalTraining
from fedofa.supernet.families import build_supernet, two_conv_cnn
from fedofa.supernet.fixed import FixedSupernet
from fedofa.types.errors import ConfigError, WireError
from fedofa.types.plan import FineTunePlan
from fedofa.update.exchange import ClientTask, decode_task, encode_task
from server.compiled import compiled, unfit_engines


def small(norm: str = "group", **more):
    settings = {**compose_conf().supernet, "num_classes": 10, "in_channels": 1, "norm": norm, **more}
    return build_supernet(settings, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("norm", "statistics", "schedule", "plans", "why"),
    [
        ("group", "batch", "none", ["full", "sparse(0.25)"], None),
        ("batch", "frozen", "none", ["head"], None),
        ("batch", "batch", "none", ["head"], "one example at a time gives batch norm no statistics; set finetune."),
        ("group", "batch", "sandwich", ["full"], "compiled steps have no teachers and no kernel matrices; set shr"),
        ("group", "batch", "none", ["full", "lora (4)"], "compiled steps train no factors of low rank; leave lora(r)"),
    ],
)
def test_runs_that_compiled_steps_do_not_suit_are_named(norm, statistics, schedule, plans, why):
    found = unfit_engines(small(norm), statistics, schedule, plans)
    assert set(found) == (set() if why is None else {"onnxruntime"})
    assert why is None or found["onnxruntime"].startswith(f"engine onnxruntime: {why}")


def test_a_fixed_network_and_a_server_without_onnx_are_named(monkeypatch):
    fixed = FixedSupernet(two_conv_cnn(1, 5, 8), (1, 8, 8))
    assert "family 'fixed' cannot be compiled" in unfit_engines(fixed, "frozen", "none", ["full"])["onnxruntime"]
    monkeypatch.setattr("server.compiled.find_spec", lambda name: None)
    assert "install the extra `onnx`" in unfit_engines(small(), "batch", "none", ["full"])["onnxruntime"]


def test_a_step_is_compiled_once_for_equal_subnets_and_plans():
    supernet = small()
    subnet = supernet.space.smallest()
    plan = build_plan("head", supernet.block_costs(subnet))
    tensors = {name: item.detach().numpy() for name, item in supernet.build(subnet).state_dict().items()}
    first, feed = compiled(supernet, subnet, plan, tensors)
    again, _ = compiled(supernet, subnet, plan, tensors)
    other, _ = compiled(supernet, subnet, FineTunePlan("none", ()), tensors)
    assert first is again
    assert other != first
    assert np.shares_memory(feed["classifier.weight"], tensors["classifier.weight"])


def test_plans_of_kernel_matrices_and_supernets_without_blocks_are_refused():
    supernet = small()
    with pytest.raises(ConfigError, match="plan 'none' cannot be compiled: it trains kernel matrices or factors"):
        compiled(supernet, supernet.space.smallest(), FineTunePlan("none", (), parametrised=True), {})
    fixed = FixedSupernet(two_conv_cnn(1, 5, 8), (1, 8, 8))
    with pytest.raises(ConfigError, match="plan 'none' on a subnet of 'fixed' cannot be compiled"):
        compiled(fixed, fixed.space.smallest(), FineTunePlan("none", ()), {})


EXAMPLES = Examples(np.random.default_rng(0).integers(0, 256, (6, 1, 28, 28)).astype(np.uint8), np.arange(6))


def sent(plan: FineTunePlan, supernet, graph: bytes | None = None):
    """The task and tensors as such a client receives them."""
    subnet = supernet.space.smallest()
    tensors = {name: item.detach().numpy() for name, item in supernet.build(subnet).state_dict().items()}
    own, feed = compiled(supernet, subnet, plan, tensors)
    training = asdict(LocalTraining(batch_size=3, learning_rate=0.05))
    given = {"normalisation": {"mean": [0.5], "std": [0.25]}, "seed": 0, "graph": graph or own}
    return decode_task(encode_task(ClientTask(1, 0, subnet, plan, supernet.description(), training, **given), feed))


@pytest.mark.parametrize(
    "levers",
    [
        {"feature_cache": True},
        {"lean": True, "micro_batch": 1, "recompute": (("stages.0.0",),)},
        {"lean": True, "kept": "int8"},
        {"lean": True, "kept_fraction": 0.2},
        {"fused_step": True},
    ],
)
def test_levers_change_nothing_for_a_compiled_step(levers):
    supernet = small(lite_residual=True)
    plan = build_plan("head", supernet.block_costs(supernet.space.smallest()), statistics="frozen")
    expected = onnx_engine.train(EXAMPLES, *sent(plan, supernet), "client")
    found = onnx_engine.train(EXAMPLES, *sent(replace(plan, **levers), supernet), "client")
    assert set(found.weights) == set(plan.trainable)
    for name, values in expected.weights.items():
        assert np.array_equal(found.weights[name], values)


def test_a_graph_that_trains_another_part_than_the_plan_is_refused():
    supernet, name = small(), "classifier.weight"
    plan = FineTunePlan("part", (name,), fractions=((name, 0.5),))
    spec = supernet.network_spec(supernet.space.smallest())
    features = spec.features
    task, received = sent(plan, supernet)
    assert onnx_engine.train(EXAMPLES, task, received, "client").weights[name].shape == (10, -(-features // 2))
    other = compile_step(spec, FineTunePlan("whole", (name,))).graph
    with pytest.raises(
        WireError, match=rf"of 'classifier.weight' the task's graph trains \(10, {features}\); expected"
    ):
        onnx_engine.train(EXAMPLES, *sent(plan, supernet, other), "client")
