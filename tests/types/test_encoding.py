"""Rows of subnets against the configurations they stand for."""

import numpy as np
import pytest
from cohorts import SPECS
from hypothesis import given
from hypothesis import strategies as st

from fedofa.types.encoding import Encoding
from fedofa.types.errors import SpaceError
from fedofa.types.space import SearchSpace
from fedofa.types.spaces import PUBLISHED_SPACES

SPACES = {**PUBLISHED_SPACES, **{f"small {name}": spec.search_space() for name, spec in SPECS.items()}}
ENCODINGS = {name: Encoding(space) for name, space in SPACES.items()}


@given(st.sampled_from(list(SPACES)), st.integers(0, 2**32 - 1))
def test_rows_and_subnets_are_each_others_inverse(name, seed):
    space, encoding = SPACES[name], ENCODINGS[name]
    rng = np.random.default_rng(seed)
    subnets = [space.sample(rng) for _ in range(3)] + [space.largest(), space.smallest()]
    rows = encoding.rows(subnets)
    assert [encoding.subnet(row) for row in rows] == subnets
    assert np.array_equal(encoding.normalised(rows), rows)
    assert np.array_equal(encoding.one_hot(rows), np.stack([space.encode(subnet) for subnet in subnets]))


@given(st.sampled_from(list(SPACES)), st.integers(0, 2**32 - 1))
def test_sampled_and_varied_rows_are_subnets_of_the_space(name, seed):
    space, encoding = SPACES[name], ENCODINGS[name]
    rng = np.random.default_rng(seed)
    rows = encoding.sample(rng, 4)
    varied = rows.copy()
    column = rng.integers(encoding.num_columns)
    varied[:, column] = rng.integers(encoding.choices[column])
    for row in (*rows, *encoding.normalised(varied)):
        space.check(encoding.subnet(row))


def test_a_position_that_appears_takes_its_smallest_value():
    encoding = ENCODINGS["mobilenet_v3"]
    row = encoding.rows([encoding.space.smallest()])
    deepest = row.copy()
    deepest[:, :5] = 2
    assert encoding.subnet(encoding.normalised(deepest)[0]) == encoding.space.subnet(
        depth=4, kernel=3, expand=3, resolution=128
    )


def test_a_subnet_of_another_space_is_refused():
    with pytest.raises(SpaceError, match="'resnet'"):
        ENCODINGS["mobilenet_v3"].rows([SPACES["resnet"].largest()])


def test_a_space_without_axes_has_one_row():
    encoding = Encoding(SearchSpace("fixed", ()))
    rows = encoding.rows([encoding.space.largest()])
    assert rows.shape == (1, 0) and encoding.one_hot(rows).shape == (1, 0)
