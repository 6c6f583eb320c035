"""Means and standard deviations against numpy's, whatever the chunks."""

import numpy as np
import pytest

from fedofa.data.statistics import value_statistics

VALUES = np.random.default_rng(0).normal(40.0, 0.3, (30, 2, 3, 7)).astype(np.float32)
SPLIT = (np.arange(30) % 3 == 0).astype(np.uint8)


@pytest.mark.parametrize("chunk", [21, 10**6])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("split", [None, SPLIT])
def test_statistics_of_measurements(monkeypatch, chunk, by_row, split):
    monkeypatch.setattr("fedofa.data.statistics._CHUNK_VALUES", chunk)
    mean, std = value_statistics(VALUES, split, by_row=by_row)
    used = (VALUES if split is None else VALUES[split == 0]).astype(np.float64)
    axes = (0, 3) if by_row else (0, 2, 3)
    assert mean == pytest.approx(used.mean(axis=axes).ravel())
    assert std == pytest.approx(used.std(axis=axes).ravel())


def test_a_constant_has_the_std_one():
    assert value_statistics(np.full((3, 1, 2, 2), 7, np.float32), None, by_row=True) == ((7.0, 7.0), (1.0, 1.0))
