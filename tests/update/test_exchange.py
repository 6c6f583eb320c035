"""Tasks and deltas over the wire: round trips in every float dtype, and hostile headers."""

import zlib
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from cohorts import build_supernet, random_delta
from hypothesis import given, settings
from hypothesis import strategies as st

from fedofa.finetune.plans import build_plan
from fedofa.finetune.recipe import LocalTraining
from fedofa.types.delta import LowRank
from fedofa.types.errors import WireError
from fedofa.types.plan import FineTunePlan
from fedofa.update.codec import encode_packed
from fedofa.update.exchange import ClientTask, Teaching, decode_delta, decode_task, encode_delta, encode_task

SUPERNET = build_supernet()
SUBNET = SUPERNET.space.subnet(kernel=[3, 5, 7, 3], depth=[1, 2])
TENSORS = SUPERNET.slice_map(SUBNET).extract(SUPERNET.state().tensors)
TASK = ClientTask(
    round=3,
    version=2,
    subnet=SUBNET,
    plan=build_plan("bias", SUPERNET.block_costs(SUBNET), recompute=True, statistics="frozen"),
    supernet=SUPERNET.description(),
    training=asdict(LocalTraining(proximal_mu=0.1)),
    normalisation={"mean": [0.5], "std": [0.25]},
    seed=9,
)
DELTA = replace(
    random_delta(SUPERNET, SUBNET, np.random.default_rng(0)), client_id="client-1", num_examples=37, num_steps=5
)
DELTA_HEADER = {
    "client_id": "client-1",
    "round": 1,
    "subnet": SUBNET.to_json(),
    "plan_digest": "plan",
    "base_version": 0,
    "num_examples": 37,
    "num_steps": 5,
}
TASK_HEADER = {**asdict(TASK), "subnet": SUBNET.to_json(), "plan": TASK.plan.to_json()}
SPREAD, WIDE = np.ones((24, 48, 1, 1), np.float32), np.ones((5, 32), np.float32)
FLOAT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


def as_sent(array: np.ndarray, float_dtype: str) -> np.ndarray:
    """What torch makes of the values on their way through the dtype."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(FLOAT_DTYPES[float_dtype]).float().numpy()


@pytest.mark.parametrize("float_dtype", FLOAT_DTYPES)
def test_a_task_round_trips(float_dtype):
    task = replace(TASK, float_dtype=float_dtype)
    found, tensors = decode_task(encode_task(task, TENSORS))
    assert found == task
    assert found.subnet.digest() == SUBNET.digest()
    assert found.plan.digest() == task.plan.digest()
    assert LocalTraining(**found.training) == LocalTraining(proximal_mu=0.1)
    assert list(tensors) == list(TENSORS)
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(tensors[name], as_sent(array, float_dtype), strict=True)


def test_a_teacher_travels_with_its_task():
    loss = {"kind": "soft_cross_entropy", "temperature": 2.0, "alpha_low": -1.0, "alpha_high": 1.0, "max_ratio": 5.0}
    largest = SUPERNET.space.largest()
    tensors = SUPERNET.slice_map(largest).extract(SUPERNET.state().tensors)
    task = replace(TASK, teaching=Teaching(largest, tensors, loss, 0.0, 1.0))
    found, weights = decode_task(encode_task(task, TENSORS))
    assert list(weights) == list(TENSORS)
    assert found.teaching is not None
    assert replace(found.teaching, tensors={}) == Teaching(largest, {}, loss, 0.0, 1.0)
    assert list(found.teaching.tensors) == list(tensors)
    assert all(np.array_equal(found.teaching.tensors[name], array) for name, array in tensors.items())
    header = {**TASK_HEADER, "teaching": {"subnet": largest.to_json(), "loss": loss, "label_weight": 0.0}}
    with pytest.raises(WireError, match="teacher"):
        decode_task(encode_packed("task", header, {"weights": TENSORS, "teacher": tensors}))


def test_a_graph_travels_with_its_task_in_few_bytes():
    graph = b"node " * 4000
    buffer = encode_task(replace(TASK, graph=graph), TENSORS)
    assert len(buffer) < len(encode_task(TASK, TENSORS)) + 1000
    found, tensors = decode_task(buffer)
    assert (found.graph, set(tensors)) == (graph, set(TENSORS))
    assert decode_task(encode_task(TASK, TENSORS))[0].graph is None


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (b"no zlib", "its graph is damaged"),
        (zlib.compress(b"node " * 9)[:-3], "its graph is cut off"),
        (zlib.compress(bytes((64 << 20) + 1)), "has more than 67108864 bytes"),
    ],
    ids=["damaged", "cut off", "too large"],
)
def test_a_hostile_graph_is_refused(packed, message):
    streams = {"weights": {}, "graph": {"graph": np.frombuffer(packed, np.uint8)}}
    with pytest.raises(WireError, match=message):
        decode_task(encode_packed("task", TASK_HEADER, streams))


@pytest.mark.parametrize("float_dtype", FLOAT_DTYPES)
def test_a_delta_round_trips(float_dtype):
    found = decode_delta(encode_delta(DELTA, float_dtype=float_dtype))
    assert replace(found, weights={}) == replace(DELTA, weights={})
    assert found.weights.keys() == DELTA.weights.keys()
    for name, array in DELTA.weights.items():
        np.testing.assert_array_equal(found.weights[name], as_sent(array, float_dtype), strict=True)


def test_arrays_in_another_memory_layout_arrive_the_same():
    """Training leaves convolution weights channels-last."""
    turned = {name: array.T.copy().T for name, array in DELTA.weights.items()}
    assert encode_delta(replace(DELTA, weights=turned)) == encode_delta(DELTA)


def test_sixteen_bits_halve_the_payload():
    whole, half = (len(encode_task(replace(TASK, float_dtype=dtype), TENSORS)) for dtype in ("float32", "bfloat16"))
    values = sum(array.size for array in TENSORS.values())
    assert 1.5 * values < whole - half <= 2 * values + 64 * len(TENSORS)


def test_a_task_is_no_delta_and_a_delta_no_task():
    with pytest.raises(WireError, match="kind 'delta'"):
        decode_delta(encode_task(TASK, TENSORS))
    with pytest.raises(WireError, match="kind 'task'"):
        decode_task(encode_delta(DELTA))


@pytest.mark.parametrize("missing", sorted(DELTA_HEADER))
def test_a_delta_header_without_a_field_is_refused(missing):
    header = {name: value for name, value in DELTA_HEADER.items() if name != missing}
    with pytest.raises(WireError, match=rf"header is not understood: .*{missing}"):
        decode_delta(encode_packed("delta", header, {}))


@pytest.mark.parametrize("missing", sorted(set(TASK_HEADER) - {"float_dtype", "teaching", "graph"}))
def test_a_task_header_without_a_field_is_refused(missing):
    header = {name: value for name, value in TASK_HEADER.items() if name != missing}
    with pytest.raises(WireError, match=rf"header is not understood: .*{missing}.*same release"):
        decode_task(encode_packed("task", header, {}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"client_id": 3}, "client_id: expected str, found 3"),
        ({"num_examples": True}, "num_examples: expected int, found True"),
        ({"num_examples": 1.0}, r"num_examples: expected int, found 1\.0"),
        ({"round": "1"}, "round: expected int, found '1'"),
        ({"plan_digest": None}, "plan_digest: expected str, found None"),
        ({"subnet": 3}, "not a subnet configuration"),
        ({"weights": {}}, "weights"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_delta_header_of_other_types_is_refused(change, message):
    with pytest.raises(WireError, match=message):
        decode_delta(encode_packed("delta", {**DELTA_HEADER, **change}, {}))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(DELTA_HEADER)), json_values)
def test_a_hostile_delta_header_gives_a_wire_error_or_a_well_typed_delta(name, value):
    try:
        found = decode_delta(encode_packed("delta", {**DELTA_HEADER, name: value}, {}))
    except WireError:
        return
    kinds = {"client_id": str, "plan_digest": str}
    assert all(type(getattr(found, key)) is kinds.get(key, int) for key in DELTA_HEADER if key != "subnet")
    assert isinstance(SUPERNET.space.contains(found.subnet), bool)
    assert len(found.subnet.digest()) == 16


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(TASK_HEADER)), json_values)
def test_a_hostile_task_header_gives_a_wire_error_or_a_task(name, value):
    buffer = encode_packed("task", {**TASK_HEADER, name: value}, {})
    try:
        decode_task(buffer)
    except WireError:
        return


@pytest.mark.parametrize("plan", ["abc", ["abc"], None, 3, {"name": 1}, {**TASK.plan.to_json(), "trainable": 5}])
def test_a_plan_that_is_none_gives_a_wire_error(plan):
    with pytest.raises(WireError, match="not a fine-tuning plan"):
        decode_task(encode_packed("task", {**TASK_HEADER, "plan": plan}, {}))


@pytest.mark.parametrize(
    "change",
    [{"round": "3"}, {"version": None}, {"seed": 1.5}, {"training": "x"}, {"supernet": 3}, {"float_dtype": "int8"}],
)
def test_a_task_header_of_other_types_is_refused(change):
    with pytest.raises(WireError):
        decode_task(encode_packed("task", {**TASK_HEADER, **change}, {}))


@pytest.mark.parametrize("float_dtype", FLOAT_DTYPES)
def test_parts_and_factors_travel_as_they_are_and_nothing_else_does(float_dtype):
    rng = np.random.default_rng(1)
    pair = LowRank(*(rng.standard_normal(shape).astype(np.float32) for shape in ((5, 2), (2, 32))))
    part = rng.standard_normal((24, 3, 1, 1)).astype(np.float32)
    given = replace(DELTA, weights={"final.conv.weight": part}, low_rank={"classifier.weight": pair})
    buffer = encode_delta(given, float_dtype=float_dtype)
    found = decode_delta(buffer)
    np.testing.assert_array_equal(found.weights["final.conv.weight"], as_sent(part, float_dtype), strict=True)
    own = found.low_rank["classifier.weight"]
    np.testing.assert_array_equal(own.left, as_sent(pair.left, float_dtype), strict=True)
    np.testing.assert_array_equal(own.right, as_sent(pair.right, float_dtype), strict=True)
    assert set(found.low_rank) == {"classifier.weight"}
    dense = replace(DELTA, weights={"final.conv.weight": SPREAD, "classifier.weight": WIDE})
    width = 4 if float_dtype == "float32" else 2
    saved = (SPREAD.size + WIDE.size - part.size - pair.left.size - pair.right.size) * width
    assert len(encode_delta(dense, float_dtype=float_dtype)) - len(buffer) > saved - 512  # names and alignment


def test_factors_of_different_weights_are_refused():
    streams = {"weights": {}, "left": {"a": np.ones((2, 1), np.float32)}, "right": {"b": np.ones((1, 2), np.float32)}}
    header = {**DELTA_HEADER, "parametrised": False}
    with pytest.raises(WireError, match=r"left and right factors are of different weights: \['a', 'b'\]"):
        decode_delta(encode_packed("delta", header, streams))


def test_a_plan_of_parts_and_factors_travels_with_its_task():
    plan = FineTunePlan("p", ("stem.conv.weight",), fractions=(("stem.conv.weight", 0.5),), low_rank=("a",), rank=3)
    found, _ = decode_task(encode_task(replace(TASK, plan=plan), {}))
    assert found.plan == plan
    assert found.plan.digest() == plan.digest() != replace(plan, rank=2).digest()
