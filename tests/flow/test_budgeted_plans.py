"""A federation whose clients train under plans made for their memory."""

import json

import pytest

from conf.compose import compose_conf
from fedofa.device.cost import LocalWork
from fedofa.types.errors import ConfigError
from server.federation import build_parts


@pytest.mark.slow
def test_clients_train_under_plans_made_for_their_memory(simulate, tmp_path):
    """The least memory in the fleet is less than any plan takes."""
    settings = ("finetune.planner=budget", "fleet.classes.sensor_board.memory_bytes=1e6")
    summary = simulate(tmp_path / "run", *settings, "evaluation.comparison=false", "runtime.num_workers=1")
    out = summary["sitting_out"]
    assert out
    assert all("in 1,000,000 bytes; plan 'full" in reason for reason in out.values())
    records = [json.loads(line) for line in (tmp_path / "run/rounds.jsonl").read_text().splitlines()]
    assert len(records) == 3
    for record in records:
        assert record["folded"] == len(record["cohort"]) > 0
        assert not {item["client"] for item in record["cohort"]} & set(out)
        assert record["failures"] == []


@pytest.mark.slow
def test_where_memory_is_plenty_such_plans_are_lean_ones(simulate, tmp_path):
    common = ("fleet.num_clients=4", "fleet.clients_per_round=4", "rounds=1", "runtime.num_workers=1")
    common = (*common, "fleet.classes.sensor_board.memory_bytes=1e9", "fleet.round_seconds=1e9")
    common = (*common, "evaluation.comparison=false", "evaluation.clients=false")
    planned = simulate(tmp_path / "planned", "finetune.planner=budget", *common)
    lean = simulate(tmp_path / "lean", "finetune.lean=true", *common)
    weights = [(tmp_path / name / "supernet.safetensors").read_bytes() for name in ("planned", "lean")]
    assert weights[0] == weights[1]
    assert planned["bytes_up"] == lean["bytes_up"]


def test_sparse_kinds_are_planned_for_too(overrides, tmp_path):
    settings = ["finetune.planner=budget", "finetune.plans=['sparse(0.3)']", "data.calibration_examples=50"]
    parts = build_parts(compose_conf(overrides(tmp_path, *settings)))
    assert parts.search.plan_within is not None
    work = LocalWork(num_examples=8, num_samples=8, batch_size=8)
    plan, taken = parts.search.plan_within(parts.supernet.space.smallest(), "sparse(0.3)", work, 1e8)
    assert plan.name == "sparse(0.3)"
    assert plan.lean
    assert 0 < taken < 1e8


def test_levers_that_the_planner_chooses_are_refused(overrides, tmp_path):
    with pytest.raises(ConfigError, match="planner=budget chooses"):
        build_parts(compose_conf(overrides(tmp_path, "finetune.planner=budget", "finetune.lean=true")))
    with pytest.raises(ConfigError, match=r"finetune\.planner"):
        build_parts(compose_conf(overrides(tmp_path, "finetune.planner=best")))
