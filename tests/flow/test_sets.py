"""Federations that train parts of weights, or factors of them: what travels, what stays, and one result."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

QUICK = ("evaluation.comparison=false", "evaluation.clients=false")
COMMON = (*QUICK, "data.calibration_examples=60")
SETS = {
    "sparse": ("finetune=sparse",),
    "lora": ("finetune=lora", 'finetune.plans=["lora(2)"]'),
    "lite_residual": ("finetune=lite_residual", "supernet.lite_residual=true"),
}


def bytes_up(summary: dict) -> float:
    return summary["bytes_up"] / summary["rounds"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_a_federation_trains_so_and_sends_less(name, simulate, tmp_path):
    full = simulate(tmp_path / "full", "finetune=full", *COMMON)
    summary = simulate(tmp_path / name, *SETS[name], "runtime.num_workers=2", *COMMON)
    records = [json.loads(line) for line in (tmp_path / name / "rounds.jsonl").read_text().splitlines()]
    assert all(record["folded"] == len(record["cohort"]) > 0 and not record["failures"] for record in records)
    assert bytes_up(summary) < 0.6 * bytes_up(full)
    one = simulate(tmp_path / "one", *SETS[name], "runtime.num_workers=1", *COMMON)
    assert one["shared_digest"] == summary["shared_digest"]
    tensors = load_file(tmp_path / name / "supernet.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    assert summary["untrainable"], "depthwise kernels, or the first layers, stay as they are"


@pytest.mark.slow
def test_a_sparse_plan_without_examples_to_choose_by_is_refused(overrides, tmp_path, run_fedofa):
    with pytest.raises(AssertionError, match=r"data\.calibration_examples: layers of a sparse plan are chosen"):
        run_fedofa(tmp_path / "run", *overrides(tmp_path / "run", "finetune=sparse", *QUICK))
