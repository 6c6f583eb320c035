"""Which runs can have clients without torch, and what they are sent."""

import numpy as np
import pytest
import torch

from conf.compose import compose_conf
from fedofa.finetune.plans import build_plan
from fedofa.supernet.families import build_supernet, two_conv_cnn
from fedofa.supernet.fixed import FixedSupernet
from fedofa.types.errors import ConfigError
from fedofa.types.plan import FineTunePlan
from server.compiled import compiled, unfit_engines


def small(norm: str = "group"):
    settings = {**compose_conf().supernet, "num_classes": 10, "in_channels": 1, "norm": norm}
    return build_supernet(settings, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("norm", "statistics", "schedule", "why"),
    [
        ("group", "batch", "none", None),
        ("batch", "frozen", "none", None),
        ("batch", "batch", "none", "one example at a time gives batch norm no statistics; set finetune.statistics="),
        ("group", "batch", "sandwich", "compiled steps have no teachers and no kernel matrices; set shrinking=none"),
    ],
)
def test_runs_that_compiled_steps_do_not_suit_are_named(norm, statistics, schedule, why):
    found = unfit_engines(small(norm), statistics, schedule)
    assert set(found) == (set() if why is None else {"onnxruntime"})
    assert why is None or found["onnxruntime"].startswith(f"engine onnxruntime: {why}")


def test_a_fixed_network_and_a_server_without_onnx_are_named(monkeypatch):
    fixed = FixedSupernet(two_conv_cnn(1, 5, 8), (1, 8, 8))
    assert "family 'fixed' cannot be compiled" in unfit_engines(fixed, "frozen", "none")["onnxruntime"]
    monkeypatch.setattr("server.compiled.find_spec", lambda name: None)
    assert "install the extra `onnx`" in unfit_engines(small(), "batch", "none")["onnxruntime"]


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


def test_parametrised_plans_are_refused():
    supernet = small()
    with pytest.raises(ConfigError, match="plan 'none' on a subnet of 'mobilenet_v3' cannot be compiled"):
        compiled(supernet, supernet.space.smallest(), FineTunePlan("none", (), parametrised=True), {})
