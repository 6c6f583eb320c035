"""What was found of operators comes back from its file as it was, or not at all."""

import json
from functools import partial

import numpy as np
import pytest
from cohorts import SPECS

from fedofa.device.cost import LocalWork
from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.device.training import PlannedPlaces
from fedofa.finetune import kept_traces, planned_memory
from fedofa.finetune.kept_traces import read_traces, write_traces
from fedofa.finetune.planned_memory import PlannedTrainingMemory
from fedofa.finetune.plans import build_plan
from fedofa.supernet.families import build_elastic
from fedofa.types.errors import CheckpointError

INDEX = OperatorIndex.of(build_elastic(SPECS["mobilenet_v3"]))
BATCH = SubnetBatch(INDEX, INDEX.encoding.sample(np.random.default_rng(3), 20))


def model_of(kind="bias"):
    plan_of = partial(build_plan, kind, statistics="frozen", lean=True, micro_batch=1)
    return PlannedTrainingMemory(PlannedPlaces(INDEX, plan_of), LocalWork(30, 30, 7))


@pytest.fixture
def found(tmp_path):
    model = model_of()
    figures = model.predict(BATCH)
    write_traces(tmp_path / "traces.json", model.traces)
    return tmp_path / "traces.json", model.traces, figures


def test_figures_are_the_same_and_nothing_is_followed_again(found, monkeypatch):
    path, traces, figures = found
    assert len(traces) > 20
    assert read_traces(path) == traces
    monkeypatch.setattr(planned_memory, "trace_operator", lambda *_: pytest.fail("followed again"))
    model = model_of()
    model.traces |= read_traces(path)
    assert np.array_equal(model.predict(BATCH), figures)


def test_what_another_plan_does_to_operators_is_followed(found):
    path, _, _ = found
    model = model_of("full")
    model.traces |= read_traces(path)
    assert np.array_equal(model.predict(BATCH), model_of("full").predict(BATCH))


def test_files_of_other_code_and_damaged_ones_are_refused(found, monkeypatch):
    path, traces, _ = found
    whole = path.read_text()
    key = next(iter(traces))
    wrong = json.loads(whole)
    wrong["traces"][key]["forward_bytes"] = "7"
    missing = json.loads(whole)
    del missing["traces"][key]["gives"]
    listed = json.loads(whole)
    listed["traces"][key]["kernels"] = [1]
    bad = (whole[: len(whole) // 2], "[]", "{}", *(json.dumps(item) for item in (wrong, missing, listed)))
    for content in bad:
        path.write_text(content)
        with pytest.raises(CheckpointError, match=r"operator traces .*traces\.json: .*delete the file"):
            read_traces(path)
    path.write_text(whole)
    monkeypatch.setattr(kept_traces, "code_digest", lambda: "0" * 32)
    with pytest.raises(CheckpointError, match="expected .*0000.*, found"):
        read_traces(path)
