"""Search spaces against brute-force enumeration; configurations as canonical values; refusals that name the place."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec
from fedofa.types.errors import SpaceError
from fedofa.types.space import INACTIVE, Axis, Control, SearchSpace, SubnetConfig

SPACE = SearchSpace(
    "toy",
    (
        Axis.free("depth", (1, 2), 1),
        Axis("kernel", (3, 5, 7), (None, Control("depth", 0, 2))),
        Axis.free("resolution", (16, 20), 1, is_input=True),
    ),
)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def spaces(draw) -> SearchSpace:
    """Two or three axes, each position free or controlled by an earlier axis: controls up to two levels deep."""
    axes: list[Axis] = []
    for name in ("a", "b", "c")[: draw(st.integers(2, 3))]:
        values = tuple(range(1, 1 + draw(st.integers(1, 3))))
        sources = [(axis.name, position) for axis in axes for position in range(len(axis.controls))]
        control = st.none()
        if sources:
            control |= st.builds(lambda at, least: Control(*at, least), st.sampled_from(sources), st.integers(1, 4))
        controls = tuple(draw(st.lists(control, min_size=1, max_size=2)))
        limit = st.lists(st.integers(1, len(values)), min_size=len(controls), max_size=len(controls))
        axes.append(Axis(name, values, controls, limits=tuple(draw(st.just([]) | limit))))
    if draw(st.booleans()):
        axes.append(Axis.free("input", (8, 16), 1, is_input=True))
    space = SearchSpace("random", axes)
    assume(np.prod([len(axis.values) ** len(axis.controls) for axis in axes], dtype=float) <= 1500)
    return space


def enumerate_choices(space: SearchSpace) -> set[tuple]:
    """Every distinct subnet as a tuple of rows of values, None where absent: from the definition of a control."""
    keys = [(axis.name, position) for axis in space.axes for position in range(len(axis.controls))]
    found = set()
    for drawn in itertools.product(*(space.axis(name).choices(position) for name, position in keys)):
        values = dict(zip(keys, drawn, strict=True))
        for name, position in keys:
            control = space.axis(name).controls[position]
            if control is not None:
                source = values[control.axis, control.position]
                if source is None or source < control.minimum:
                    values[name, position] = None
        found.add(tuple(tuple(values[a.name, p] for p in range(len(a.controls))) for a in space.axes))
    return found


def rows_of(space: SearchSpace, subnet: SubnetConfig) -> tuple:
    return tuple(space.values(subnet, axis.name) for axis in space.axes)


@settings(max_examples=80, deadline=None)
@given(spaces())
def test_count_is_the_number_of_distinct_subnets_without_input_axes(space):
    distinct = {rows[: len(rows) - any(axis.is_input for axis in space.axes)] for rows in enumerate_choices(space)}
    assert space.count() == len(distinct)


def test_the_published_space_has_7371_to_the_5_subnets():
    assert MobileNetV3Spec().search_space().count() == 7371**5


@settings(max_examples=50, deadline=None)
@given(spaces(), seeds)
def test_samples_are_subnets_of_the_space_and_round_trip_through_json(space, seed):
    everything = enumerate_choices(space)
    subnet = space.sample(np.random.default_rng(seed))
    assert space.contains(subnet)
    assert rows_of(space, subnet) in everything
    again = SubnetConfig.from_json(json.loads(json.dumps(subnet.to_json())))
    assert again == subnet
    assert hash(again) == hash(subnet)
    assert again.digest() == subnet.digest()
    assert space.sample(np.random.default_rng(seed)) == subnet


def test_samples_cover_the_space():
    rng = np.random.default_rng(0)
    assert {rows_of(SPACE, SPACE.sample(rng)) for _ in range(400)} == enumerate_choices(SPACE)


@settings(max_examples=50, deadline=None)
@given(spaces(), seeds)
def test_neighbours_are_exactly_the_subnets_one_step_away(space, seed):
    """One position that both have differs by one step; the others that both have agree; new ones are at the least."""
    rng = np.random.default_rng(seed)
    subnet = space.sample(rng)
    least = [axis.values[0] for axis in space.axes for _ in axis.controls]
    scale = [axis.values for axis in space.axes for _ in axis.controls]
    mine = list(itertools.chain(*rows_of(space, subnet)))
    expected = set()
    for rows in enumerate_choices(space):
        theirs = list(itertools.chain(*rows))
        steps = [
            abs(values.index(a) - values.index(b))
            for a, b, values in zip(mine, theirs, scale, strict=True)
            if a is not None and b is not None
        ]
        new = [b == low for a, b, low in zip(mine, theirs, least, strict=True) if a is None and b is not None]
        if sum(steps) == 1 and all(new):
            expected.add(rows)
    found = [rows_of(space, neighbour) for neighbour in space.neighbours(subnet, rng)]
    assert set(found) == expected
    assert len(found) == len(expected)


@settings(max_examples=30, deadline=None)
@given(spaces())
def test_encode_tells_all_subnets_apart(space):
    codes = set()
    everything = enumerate_choices(space)
    for rows in everything:
        filled = [[v or axis.values[0] for v in row] for axis, row in zip(space.axes, rows, strict=True)]
        subnet = space.subnet(**dict(zip((axis.name for axis in space.axes), filled, strict=True)))
        assert rows_of(space, subnet) == rows
        code = space.encode(subnet)
        assert code.dtype == np.float32
        assert code.shape == (sum(len(axis.values) * len(axis.controls) for axis in space.axes),)
        codes.add(code.tobytes())
    assert len(codes) == len(everything)


def test_encode_is_one_hot_and_zero_where_absent():
    subnet = SPACE.subnet(depth=1, kernel=5, resolution=20)
    assert SPACE.encode(subnet).tolist() == [1, 0] + [0, 1, 0] + [0, 0, 0] + [0, 1]


def test_what_an_absent_position_was_given_makes_no_difference():
    a = SPACE.subnet(depth=1, kernel=[3, 5], resolution=16)
    b = SPACE.subnet(depth=1, kernel=[3, 7], resolution=16)
    assert a == b
    assert hash(a) == hash(b)
    assert a.digest() == b.digest()
    assert a["kernel"] == (0, INACTIVE)
    assert a != SPACE.subnet(depth=2, kernel=[3, 5], resolution=16)


LIMITED = SearchSpace(
    "limited", (Axis("depth", (1, 2, 3), (None, None), limits=(3, 2)), Axis.free("width", (8, 16), 1))
)


def test_positions_may_take_fewer_values_than_their_axis_has():
    assert LIMITED.values(LIMITED.largest(), "depth") == (3, 2)
    assert LIMITED.values(LIMITED.smallest(), "depth") == (1, 1)
    assert LIMITED.values(LIMITED.subnet(depth=3), "depth") == (3, 2)
    assert LIMITED.values(LIMITED.subnet(depth=2), "depth") == (2, 2)
    assert LIMITED.count() == 3 * 2 * 2
    with pytest.raises(SpaceError, match=r"'depth', position 1: 3 is not allowed; allowed values: \[1, 2\]"):
        LIMITED.subnet(depth=[3, 3])
    with pytest.raises(SpaceError, match=r"'depth', position 0: 4 is not allowed"):
        LIMITED.subnet(depth=4)
    with pytest.raises(
        SpaceError, match=r"position 1: index 2 is not allowed; allowed are 0 to 1, the values \[1, 2\]"
    ):
        LIMITED.check(SubnetConfig("limited", (("depth", (2, 2)), ("width", (0,)))))


@pytest.mark.parametrize("limits", [(1,), (0, 1), (1, 4)])
def test_limits_are_one_a_position_and_within_the_values(limits):
    with pytest.raises(SpaceError, match=r"axis 'depth': expected 2 limits from 1 to 3, found"):
        Axis("depth", (1, 2, 3), (None, None), limits=limits)


def test_absence_passes_on_to_what_an_absent_position_controls():
    space = SearchSpace(
        "deep",
        (
            Axis.free("a", (1, 2), 1),
            Axis("b", (1, 2), (Control("a", 0, 2),)),
            Axis("c", (1, 2), (Control("b", 0, 1),)),
        ),
    )
    assert space.smallest().choices == (("a", (0,)), ("b", (INACTIVE,)), ("c", (INACTIVE,)))
    assert space.count() == 1 + 2 * 2


def test_largest_and_smallest():
    assert SPACE.values(SPACE.largest(), "kernel") == (7, 7)
    assert SPACE.values(SPACE.smallest(), "kernel") == (3, None)
    assert SPACE.largest() == SPACE.subnet()
    assert SPACE.largest() == SPACE.subnet(kernel=(7, 7), depth=[2])


def test_digests_are_the_same_on_every_machine_and_release():
    assert SPACE.subnet(depth=1, kernel=5, resolution=16).digest() == "ecbd668ea92aa083"


def test_equal_choices_of_another_family_are_another_subnet():
    subnet = SPACE.largest()
    other = SubnetConfig("other", subnet.choices)
    assert other != subnet
    assert other.digest() != subnet.digest()
    assert not SPACE.contains(other)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"kernel": [3, 4]}, ["'kernel'", "position 1", "4 is not allowed", "[3, 5, 7]"]),
        ({"depth": 3}, ["'depth'", "position 0", "3 is not allowed", "[1, 2]"]),
        ({"kernel": [3, 5, 7]}, ["'kernel'", "expected 2 values", "found 3"]),
        ({"kernal": 3}, ["no axis 'kernal'", "depth, kernel, resolution", "did you mean 'kernel'"]),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_by_name(values, parts):
    with pytest.raises(SpaceError) as caught:
        SPACE.subnet(**values)
    for part in ("'toy'", *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("choices", "parts"),
    [
        ({"kernel": (0, 3)}, ["'kernel'", "position 1", "index 3", "[3, 5, 7]"]),
        ({"kernel": (INACTIVE, 0)}, ["'kernel'", "position 0", "index -1", "[3, 5, 7]"]),
        ({"depth": (0,)}, ["'kernel'", "position 1", "does not have this position", "found 2"]),
        ({"depth": (5,)}, ["'depth'", "position 0", "index 5", "[1, 2]"]),
        ({"kernel": (0,)}, ["'kernel'", "expected 2 positions, found 1"]),
        ({"width": (0,)}, ["['depth', 'kernel', 'resolution']", "width"]),
    ],
)
def test_check_refuses_what_no_space_method_makes(choices, parts):
    subnet = SubnetConfig("toy", tuple({**dict(SPACE.largest().choices), **choices}.items()))
    with pytest.raises(SpaceError) as caught:
        SPACE.check(subnet)
    for part in parts:
        assert part in str(caught.value)
    assert not SPACE.contains(subnet)
    for method in (SPACE.encode, lambda item: list(SPACE.neighbours(item, np.random.default_rng(0)))):
        with pytest.raises(SpaceError):
            method(subnet)


def test_arrays_serve_as_rows_and_numbers():
    expected = SPACE.subnet(depth=2, kernel=[3, 5], resolution=16)
    assert SPACE.subnet(depth=np.array([2]), kernel=np.array([3, 5]), resolution=np.array(16)) == expected
    assert SubnetConfig.from_json(expected.to_json()) == expected
    with pytest.raises(SpaceError, match="'kernel': expected 2 values"):
        SPACE.subnet(kernel=np.array([3, 5, 7]))


def test_a_subnet_says_which_axes_it_has():
    with pytest.raises(SpaceError, match="no axis 'width'; its axes: depth, kernel, resolution"):
        SPACE.largest()["width"]


@pytest.mark.parametrize("values", [(), (5, 3), (3, 3)])
def test_the_values_of_an_axis_are_distinct_and_ascending(values):
    with pytest.raises(SpaceError, match="'kernel'.*distinct and ascending"):
        Axis.free("kernel", values, 1)


@pytest.mark.parametrize(
    "value",
    [None, [], "x", {}, {"family": "toy"}, {"family": "toy", "choices": [1]}, {"family": "toy", "choices": {"a": 1}},
     {"family": "toy", "choices": {"a": ["x"]}}, {"family": "toy", "choices": {"a": [None]}},
     {"family": "toy", "choices": {"a": [1.9, "2"]}}, {"family": "toy", "choices": {"a": "12"}},
     {"family": "toy", "choices": {"a": [True]}}, {"family": "toy", "choices": {"a": {"1": 2}}},
     {"family": None, "choices": {"a": [1]}}, {"family": 3, "choices": {}}, {"family": "toy", "choices": {1: [1]}}],
)  # fmt: skip
def test_from_json_refuses_what_is_not_a_configuration(value):
    with pytest.raises(SpaceError, match="not a subnet configuration"):
        SubnetConfig.from_json(value)


def test_a_row_of_arrays_is_refused():
    with pytest.raises(
        SpaceError, match=r"axis 'kernel', position 1: array\(\[3, 3\]\) is not allowed; allowed values"
    ):
        SPACE.subnet(kernel=[3, np.array([3, 3])])  # type: ignore[list-item]


def test_axes_in_another_order_are_refused_by_their_order():
    value = SPACE.largest().to_json()
    again = SubnetConfig.from_json({**value, "choices": dict(reversed(value["choices"].items()))})
    with pytest.raises(
        SpaceError, match=r"\['depth', 'kernel', 'resolution'\] in this order, found \[resolution, kernel"
    ):
        SPACE.check(again)
