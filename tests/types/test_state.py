"""Shared state and client state as values."""

from dataclasses import replace

import numpy as np
import pytest

from fedofa.types.client import ClientState
from fedofa.types.state import SharedState

STATE = SharedState(
    3,
    {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(0, np.float32)},
    {"group": np.array([1, 0])},
    {"momentum": {"a": np.ones((2, 3))}},
)


def test_the_digest_leaves_version_moments_and_memory_layout_out():
    turned = {name: np.asfortranarray(array) for name, array in reversed(STATE.tensors.items())}
    assert replace(STATE, version=4, moments={}, tensors=turned).digest() == STATE.digest()


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": {**STATE.tensors, "a": STATE.tensors["a"] + np.float32(1e-6)}},
        {"tensors": {**STATE.tensors, "a": STATE.tensors["a"].reshape(3, 2)}},
        {"tensors": {**STATE.tensors, "a": STATE.tensors["a"].view(np.int32)}},
        {"tensors": {"c": STATE.tensors["a"], "b": STATE.tensors["b"]}},
        {"tensors": {"a": STATE.tensors["a"]}},
        {"ordering": {"group": np.array([0, 1])}},
        {"ordering": {}},
    ],
)
def test_the_digest_covers_names_types_shapes_values_and_orderings(change):
    assert replace(STATE, **change).digest() != STATE.digest()


def test_a_client_remembers_its_last_round():
    after = ClientState("c").after_round(4, 0.5).after_round(9, 0.25)
    assert after == ClientState("c", version=9, num_rounds=2, last_loss=0.25)
