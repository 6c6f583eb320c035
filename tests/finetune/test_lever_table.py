"""Every set of levers: it trains as it must, or the plan cannot be made, for the stated reason."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from cohorts import build_supernet
from torch.nn import functional

from fedofa.finetune.plans import build_plan, choose_segments
from fedofa.finetune.recipe import LocalTraining
from fedofa.finetune.trainer import fine_tune
from fedofa.types.errors import ConfigError
from fedofa.types.plan import LEVERS

SUPERNETS = {norm: build_supernet(norm=norm) for norm in ("group", "batch")}
SUBNET = SUPERNETS["group"].space.largest()
INPUTS = torch.randn(6, 1, 20, 20, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
LABELS = torch.arange(6) % 5
SGD = LocalTraining(batch_size=6, max_steps=3, learning_rate=0.02, momentum=0.5, weight_decay=0.1)

SETTINGS = {
    "micro_batch": {"micro_batch": 2},
    "lean": {"lean": True},
    "compressed": {"kept": "int8"},
    "pruned": {"kept_fraction": 0.5},
    "fused_step": {"fused_step": True},
    "feature_cache": {"feature_cache": True},
}
SETS = [frozenset(levers) for size in range(len(LEVERS) + 1) for levers in combinations(LEVERS, size)]
_TRAINED = {}


def refusals(levers):
    """The reasons for which a set is refused, from what the levers are; empty where it is to train."""
    found = []
    if levers & {"compressed", "pruned"} and "lean" not in levers:
        found.append("activations need lean operations; set lean")
    if {"compressed", "pruned"} <= levers:
        found.append("pruned activations are kept as float32; choose kept or kept_fraction")
    return found


def plan_of(norm, levers):
    blocks = SUPERNETS[norm].block_costs(SUBNET)
    settings = {name: value for lever in levers & SETTINGS.keys() for name, value in SETTINGS[lever].items()}
    plan = build_plan("last_blocks(2)", blocks, statistics="frozen")
    return replace(plan, **settings, recompute=choose_segments(blocks, plan.trainable) if "recompute" in levers else ())


def trained(norm, levers):
    """The deltas, and the loss before and after."""
    key = norm, levers
    if key not in _TRAINED:
        model = SUPERNETS[norm].build(SUBNET).double()
        model.dropout.p = 0.0
        received = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}

        def loss():
            with torch.no_grad():
                return float(functional.cross_entropy(model.eval()(INPUTS), LABELS))

        before = loss()
        generator = torch.Generator().manual_seed(3)
        result = fine_tune(model, plan_of(norm, levers), received, INPUTS, LABELS, SGD, generator)
        changed = {name: torch.from_numpy(received[name] + change) for name, change in result.weights.items()}
        model.load_state_dict(changed, strict=False, assign=True)
        _TRAINED[key] = result.weights, before, loss()
    return _TRAINED[key]


@pytest.mark.parametrize("levers", SETS, ids=lambda levers: "+".join(sorted(levers)) or "none")
def test_a_set_of_levers_trains_as_it_must_or_is_refused(levers):
    reasons = refusals(levers)
    if reasons:
        with pytest.raises(ConfigError) as refused:
            plan_of("group", levers)
        assert any(reason in str(refused.value) for reason in reasons)
        return
    for norm in SUPERNETS:
        assert plan_of(norm, levers).levers == levers
        plain, *_ = trained(norm, frozenset())
        found, before, after = trained(norm, levers)
        assert after < before
        assert found.keys() == plain.keys()
        if not levers & {"compressed", "pruned"}:
            for name, change in plain.items():
                np.testing.assert_allclose(found[name], change, rtol=1e-6, atol=1e-10, err_msg=f"{norm} {name}")
        else:
            ours, exact = (np.concatenate([item.ravel() for item in deltas.values()]) for deltas in (found, plain))
            assert not np.array_equal(ours, exact)
            cosine = ours @ exact / np.linalg.norm(ours) / np.linalg.norm(exact)
            assert cosine >= (0.99 if "compressed" in levers else 0.7)
