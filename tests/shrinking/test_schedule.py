"""Schedules: the published stages, learning rates, the way to JSON and back, and what is refused."""

import json
from dataclasses import replace

import pytest
from cohorts import SPEC

from fedofa.shrinking.schedule import ShrinkPhase, ShrinkSchedule, TeacherLoss
from fedofa.types.errors import ConfigError, SpaceError
from fedofa.types.space import SearchSpace
from fedofa.types.spaces import PUBLISHED_SPACES

SPACE = SPEC.search_space()
PUBLISHED = PUBLISHED_SPACES["mobilenet_v3"]


def phase(**changes) -> ShrinkPhase:
    return ShrinkPhase(**{"name": "a", "steps": 10, "elastic": {"kernel": (3, 7)}, **changes})


def test_the_published_stages():
    schedule = ShrinkSchedule.progressive(PUBLISHED, 590)
    assert [item.num_random for item in schedule.phases] == [1, 1, 2, 2, 4, 4]
    assert [item.teacher for item in schedule.phases] == ["none"] + ["trained"] * 5
    assert [item.order_channels for item in schedule.phases] == [False] * 4 + [True] * 2
    for got, epochs in zip(schedule.phases, [180, 120, 25, 120, 25, 120], strict=True):
        assert abs(got.steps - epochs) <= 2
    allowed = [dict(item.elastic) for item in schedule.phases]
    assert all(values.pop("resolution") == PUBLISHED.axis("resolution").values for values in allowed)
    assert allowed == [
        {},
        {"kernel": (3, 5, 7)},
        {"kernel": (3, 5, 7), "depth": (3, 4)},
        {"kernel": (3, 5, 7), "depth": (2, 3, 4)},
        {"kernel": (3, 5, 7), "depth": (2, 3, 4), "expand": (4, 6)},
        {"kernel": (3, 5, 7), "depth": (2, 3, 4), "expand": (3, 4, 6)},
    ]


@pytest.mark.parametrize(
    ("family", "names"),
    [
        (
            "resnet",
            ["largest", "depth, first phase", "depth", "expand, first phase", "expand", "width, first phase", "width"],
        ),
        ("proxyless", ["largest", "kernel", "depth, first phase", "depth", "expand, first phase", "expand"]),
    ],
)
def test_axes_that_a_space_lacks_drop_out(family, names):
    space = PUBLISHED_SPACES[family]
    schedule = ShrinkSchedule.progressive(space, 1000)
    assert [item.name for item in schedule.phases] == names
    schedule.check(space)
    last = schedule.phases[-1].elastic
    assert last == {axis.name: axis.values for axis in space.axes}


def test_an_axis_of_two_values_has_one_phase():
    names = [item.name for item in ShrinkSchedule.progressive(SPACE, 100).phases]
    assert names == ["largest", "kernel", "depth", "expand, first phase", "expand"]


def test_a_space_without_choices_trains_its_only_network():
    schedule = ShrinkSchedule.progressive(SearchSpace("fixed", ()), 7)
    assert [(item.name, item.steps) for item in schedule.phases] == [("largest", 7)]


@pytest.mark.parametrize("num_steps", [5, 6, 99, 590, 12345])
def test_the_phases_share_all_steps(num_steps):
    schedule = ShrinkSchedule.progressive(SPACE, num_steps)
    assert schedule.num_steps == num_steps
    starts = [step for step in range(num_steps) if schedule.phase_at(step)[1] == 0]
    assert len(starts) == len(schedule.phases)
    assert schedule.phase_at(num_steps - 1) == (len(schedule.phases) - 1, schedule.phases[-1].steps - 1)


def test_the_rate_rises_linearly_then_falls_by_a_cosine():
    item = phase(steps=100, warmup_fraction=0.1, learning_rate=0.5)
    rates = [item.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.5 / 11)
    assert rates[10] == max(rates) == 0.5
    assert rates[55] == pytest.approx(0.25)
    assert 0 < rates[-1] < 0.001
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    "schedule",
    [
        ShrinkSchedule.progressive(PUBLISHED, 100, TeacherLoss("alpha_divergence", max_ratio=3.0)),
        ShrinkSchedule.sandwich(SPACE, 10, num_random=3),
        ShrinkSchedule.turns(SPACE, 10, teacher_share=0.3, loss=TeacherLoss(temperature=2.0)),
        ShrinkSchedule.attentive(SPACE, 10, candidates=5, prefer="worst", macs_targets=[1e5, 2e5]),
    ],
)
def test_a_schedule_travels_as_json(schedule):
    assert ShrinkSchedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


def test_the_single_stages():
    (sandwich,) = ShrinkSchedule.sandwich(SPACE, 10).phases
    assert (sandwich.sandwich, sandwich.num_random, sandwich.teacher, sandwich.label_weight) == (True, 2, "in_place", 0)
    assert sandwich.elastic == {axis.name: axis.values for axis in SPACE.axes}
    (attentive,) = ShrinkSchedule.attentive(SPACE, 10, candidates=4).phases
    assert attentive == replace(sandwich, name="attentive", candidates=4)
    (turns,) = ShrinkSchedule.turns(SPACE, 10).phases
    assert turns == ShrinkPhase("turns", 10, sandwich.elastic, num_random=3, sandwich=True, turns=True)
    (taught,) = ShrinkSchedule.turns(SPACE, 10, teacher_share=0.25).phases
    assert taught == replace(turns, teacher="in_place", teacher_weight=0.25, label_weight=0.75)
    with pytest.raises(ConfigError, match=r"shrinking.teacher_share: expected a number in \[0, 1\], found 1.5"):
        ShrinkSchedule.turns(SPACE, 10, teacher_share=1.5)


@pytest.mark.parametrize("sandwich", [True, False])
def test_every_turn_learns_once_on_each_batch_that_the_largest_answered(sandwich):
    item = phase(steps=400, num_random=2, turns=True, sandwich=sandwich, teacher="in_place")
    num_turns = 4 if sandwich else 3
    assert item.num_turns == num_turns
    batches = [item.batch_of(step) for step in range(400)]
    answered = batches[::num_turns]
    assert answered == list(range(len(answered)))
    kept = item.num_kept - 1
    for turn in range(1, num_turns):
        own = batches[turn::num_turns][kept:]
        assert own == sorted(set(own)), "each once, in the order of the answers"
        assert own[0] in answered
    for step, batch in enumerate(batches[kept * num_turns :], kept * num_turns):
        assert step // num_turns - kept <= batch <= step // num_turns
        assert batch not in batches[step - 10 : step], "SGD's momentum does not meet the same examples twice"


def test_without_answers_every_step_has_its_own_batch():
    for item in (phase(turns=True, sandwich=True), phase(teacher="in_place"), phase(turns=True, teacher="trained")):
        assert [item.batch_of(step) for step in range(10)] == list(range(10))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "phase 'a', steps: expected at least 1, found 0"),
        ({"candidates": 0}, "phase 'a', candidates: expected at least 1, found 0"),
        ({"num_random": 0}, "phase 'a', num_random: expected at least 1, or 0 with sandwich, found 0"),
        ({"prefer": "median"}, "phase 'a', prefer: expected one of ['best', 'worst'], found 'median'"),
        ({"teacher": "mine"}, "phase 'a', teacher: expected one of ['none', 'trained', 'in_place'], found 'mine'"),
        ({"macs_targets": (-1.0,)}, "phase 'a', macs_targets: expected positive numbers, found (-1.0,)"),
        ({"warmup_fraction": 1.0}, "phase 'a', warmup_fraction: expected a number in [0, 1), found 1.0"),
        ({"teacher": "trained", "label_weight": 0, "teacher_weight": 0}, "nothing to learn"),
    ],
)
def test_a_phase_out_of_range_is_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        phase(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("elastic", "message"),
    [
        ({"kernel": (3, 9)}, "phase 'a', axis 'kernel': expected values out of [3, 5, 7], found [9]"),
        ({"kernel": ()}, "phase 'a', axis 'kernel': expected values out of [3, 5, 7], found none"),
        ({"kernal": (3,)}, "phase 'a': space 'mobilenet_v3' has no axis 'kernal'"),
    ],
)
def test_a_phase_outside_the_space_is_refused(elastic, message):
    with pytest.raises(SpaceError) as caught:
        ShrinkSchedule((phase(elastic=elastic),)).check(SPACE)
    assert message in str(caught.value)


def test_unknown_losses_and_settings_are_refused():
    with pytest.raises(ConfigError, match=r"expected one of \['soft_cross_entropy', 'alpha_divergence'\], found 'mse'"):
        TeacherLoss("mse")
    with pytest.raises(ConfigError, match="alpha_low to be at most alpha_high"):
        TeacherLoss("alpha_divergence", alpha_low=2.0)
    with pytest.raises(ConfigError, match="max_ratio: expected a finite number above 1"):
        TeacherLoss("alpha_divergence", max_ratio=1.0)
    with pytest.raises(ConfigError, match="at least one phase"):
        ShrinkSchedule(())
    with pytest.raises(ConfigError, match=r"shrinking\.steps .*: expected at least 5, one a phase, found 4"):
        ShrinkSchedule.progressive(SPACE, 4)
    with pytest.raises(ConfigError, match="step 10 is beyond"):
        ShrinkSchedule((phase(),)).phase_at(10)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, 'shrinking: expected an object with a list of "phases", found {}'),
        ({"phases": 3}, "a list of \"phases\", found {'phases': 3}"),
        ({"phases": [3]}, "shrinking.phases, phase 1: expected an object with ['elastic', 'name', 'steps'], found 3"),
        ([{"stepz": 3}], "phase 2: unknown settings ['stepz'], missing ones []; known: ['name', 'steps', 'elastic', "),
        ({"phases": [{"name": "a", "steps": 3}]}, "phase 1: unknown settings [], missing ones ['elastic']; known: ["),
        ([{"steps": 2.5}], "phase 2, steps: expected a whole number, found 2.5"),
        ([{"num_random": True}], "phase 2, num_random: expected a whole number, found True"),
        ([{"learning_rate": "fast"}], "phase 2, learning_rate: expected a number, found 'fast'"),
        ([{"turns": 1}], "phase 2, turns: expected true or false, found 1"),
        ([{"teacher": None}], "phase 2, teacher: expected a word, found None"),
        ([{"elastic": {"depth": 3}}], "phase 2, elastic: expected an object of lists: axis -> values, found {'depth'"),
        ([{"macs_targets": "1e6"}], "phase 2, macs_targets: expected a list of numbers, found '1e6'"),
        (
            [{"loss": {"warmth": 3}}],
            "phase 2, loss: expected an object with fields of TeacherLoss, found {'warmth': 3}",
        ),
        ([{"loss": {"kind": "mse"}}], "phase 2, loss: shrinking, loss of the teacher: expected one of ['soft_cross"),
        ([{"loss": {"max_ratio": 1}}], "phase 2, loss: shrinking, max_ratio: expected a finite number above 1, f"),
    ],
)
def test_a_list_of_phases_that_is_not_understood_says_which_and_why(given, message):
    whole = ShrinkSchedule((phase(),)).to_json()["phases"][0]
    listed = {"phases": [whole, *({**whole, **changes} for changes in given)]} if isinstance(given, list) else given
    with pytest.raises(ConfigError) as caught:
        ShrinkSchedule.from_json(listed)
    assert message in str(caught.value)
