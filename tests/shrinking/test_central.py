"""The central loop: what trains, what stays, the same bits every time, and going on as if it had never stopped."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cohorts import build_supernet
from torch import nn
from torch.nn import functional

from fedofa.finetune.inputs import prepare_inputs, resized
from fedofa.shrinking.central import CentralShrinking
from fedofa.shrinking.losses import soft_cross_entropy
from fedofa.shrinking.recipe import CentralTraining
from fedofa.shrinking.schedule import ShrinkPhase, ShrinkSchedule, TeacherLoss
from fedofa.supernet.fixed import FixedSupernet
from fedofa.types.errors import CheckpointError, ConfigError, DatasetError, DivergenceError, SpaceError

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 5, 50)
STRIPES = np.sin(np.arange(20) * (LABELS[:, None] + 1) * np.pi / 6)[:, None, None, :].repeat(20, axis=2)
IMAGES = (128 + 70 * STRIPES + RNG.integers(-50, 51, STRIPES.shape)).astype(np.uint8)
SPACE = build_supernet().space
ALL = {axis.name: axis.values for axis in SPACE.axes}
TRAINING = CentralTraining(learning_rate=0.05, batch_size=16, max_shift=1)
ALPHA = TeacherLoss("alpha_divergence")
SCHEDULES = {
    "progressive": ShrinkSchedule.progressive(SPACE, 10),
    "sandwich": ShrinkSchedule.sandwich(SPACE, 6),
    "turns": ShrinkSchedule.turns(SPACE, 6, num_random=1),
    "taught turns": ShrinkSchedule.turns(SPACE, 36, num_random=1, teacher_share=0.5),
    "attentive": ShrinkSchedule.attentive(SPACE, 4, num_random=1, candidates=2, prefer="worst", loss=ALPHA),
}


def fresh_supernet(*, norm: str = "group", dropout: float = 0.0):
    supernet = build_supernet(norm=norm)
    supernet.spec = replace(supernet.spec, dropout=dropout)
    return supernet


def build(schedule, training=TRAINING, *, norm: str = "group", dropout: float = 0.0, seed: int = 3) -> CentralShrinking:
    supernet = fresh_supernet(norm=norm, dropout=dropout)
    return CentralShrinking(supernet, schedule, training, IMAGES, LABELS, [0.5], [0.25], seed=seed)


def one_phase(**settings) -> ShrinkSchedule:
    return ShrinkSchedule((ShrinkPhase(**{"name": "a", "steps": 5, "elastic": ALL, **settings}),))


def run(shrinking: CentralShrinking, steps: int | None = None) -> str:
    for _ in range(shrinking.schedule.num_steps - shrinking.done if steps is None else steps):
        shrinking.advance()
    return shrinking.state().digest()


@pytest.mark.parametrize(("optimiser", "norm"), [("sgd", "group"), ("sgd", "batch"), ("adamw", "batch")])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(name, optimiser, norm):
    schedule, training = SCHEDULES[name], replace(TRAINING, optimiser=optimiser)
    whole = run(build(schedule, training, norm=norm, dropout=0.2))
    assert whole == run(build(schedule, training, norm=norm, dropout=0.2)), "the same seed gives the same bits"
    assert whole != run(build(schedule, training, norm=norm, dropout=0.2, seed=4))
    first = build(schedule, training, norm=norm, dropout=0.2)
    run(first, schedule.num_steps // 2 + 1)
    second = build(schedule, training, norm=norm, dropout=0.2)
    run(second, 1)  # whatever it did before does not matter
    second.restore(first.state())
    assert second.done == first.done
    assert run(second) == whole


@pytest.mark.parametrize("stop", [7, 8, 9])
def test_progressive_shrinking_may_be_stopped_where_channels_are_ordered(stop):
    """From the eighth step on its phases do, which changes the order in which the teacher's sums run."""
    schedule = SCHEDULES["progressive"]
    whole = build(schedule)
    run(whole, stop)
    resumed = build(schedule)
    resumed.restore(whole.state())
    assert run(resumed) == run(whole)


def test_a_steps_gradient_is_the_sum_over_its_subnets():
    """One step of plain SGD from the weights, against the same loss written down."""
    schedule = one_phase(
        sandwich=True, num_random=1, teacher="in_place", label_weight=0.5, teacher_weight=2.0, warmup_fraction=0.0
    )
    recipe = CentralTraining(learning_rate=0.1, batch_size=50, weight_decay=0.01, max_gradient_norm=0.0)
    shrinking = build(schedule, recipe)
    subnets = list(shrinking.advance().losses)
    assert (subnets[0], subnets[-1], len(subnets)) == (SPACE.largest(), SPACE.smallest(), 3)

    supernet = fresh_supernet().train()
    before = {name: item.detach().clone() for name, item in supernet.network.named_parameters()}
    pixels, labels = prepare_inputs(IMAGES, [0.5], [0.25]), torch.from_numpy(LABELS)
    logits = {subnet: supernet(resized(pixels, supernet.resolution(subnet)), subnet) for subnet in subnets}
    ce = {subnet: functional.cross_entropy(item, labels, label_smoothing=0.1) for subnet, item in logits.items()}
    teacher = logits[subnets[0]].detach()
    loss = ce[subnets[0]] + sum(
        2.0 * soft_cross_entropy(logits[subnet], teacher) + 0.5 * ce[subnet] for subnet in subnets[1:]
    )
    loss.backward()
    for name, parameter in supernet.network.named_parameters():
        if parameter.grad is None:  # no subnet of this step has it
            assert torch.equal(shrinking.supernet.shared()[name], before[name])
            continue
        decays = parameter.dim() > 1 and "matrix" not in name
        gradient = parameter.grad + (0.01 * before[name] if decays else 0.0)
        expected = before[name] - 0.1 * 1.9 * gradient  # Nesterov's first step looks one momentum ahead
        torch.testing.assert_close(shrinking.supernet.shared()[name], expected, atol=2e-5, rtol=1e-3, msg=name)


def test_in_turns_steps_train_one_subnet_each_by_the_count_of_their_phase():
    """A phase before it that does not fill whole turns changes nothing: every phase begins with its largest."""
    (turns,) = ShrinkSchedule.turns(SPACE, 6, num_random=1).phases
    shrinking = build(ShrinkSchedule((*one_phase(elastic={}).phases, turns)))
    steps = [shrinking.advance() for _ in range(11)]
    assert [len(step.losses) for step in steps] == [1] * 11
    trained = [next(iter(step.losses)) for step in steps[5:]]
    assert (trained[0], trained[2], trained[3]) == (SPACE.largest(), SPACE.smallest(), SPACE.largest())


def test_in_taught_turns_a_subnet_learns_from_what_the_largest_answered_rounds_ago():
    """Against the losses written down, with the largest's answers in its own turns."""
    rule = {"sandwich": True, "turns": True, "teacher": "in_place", "label_weight": 0.25, "teacher_weight": 3.0}
    schedule = one_phase(steps=40, num_random=1, **rule)
    (item,) = schedule.phases
    recipe = replace(TRAINING, max_shift=0)
    shrinking = build(schedule, recipe)
    answers: dict[int, torch.Tensor] = {}
    for step in range(40):
        batch, twin = item.batch_of(step), fresh_supernet().train()
        twin.load_state(shrinking.supernet.state())
        (subnet,), (loss,) = zip(*shrinking.advance().losses.items(), strict=True)
        chosen = shrinking._batch(batch)
        pixels, labels = prepare_inputs(IMAGES[chosen], [0.5], [0.25]), torch.from_numpy(LABELS[chosen])
        logits = twin(resized(pixels, twin.resolution(subnet)), subnet).detach()
        expected = functional.cross_entropy(logits, labels, label_smoothing=0.1)
        if step % 3:
            expected = 0.25 * expected + 3.0 * soft_cross_entropy(logits, answers[batch])
        else:
            assert subnet == SPACE.largest()
            answers[batch] = logits
        assert loss == pytest.approx(float(expected), rel=1e-4)
    kept = {int(number): value for number, value in shrinking.state().moments["answers"].items()}
    assert sorted(kept) == sorted(answers)[-item.num_kept :]


def test_answers_end_with_their_phase():
    (turns,) = SCHEDULES["taught turns"].phases
    shrinking = build(ShrinkSchedule((replace(turns, steps=4), one_phase().phases[0])))
    run(shrinking, 4)
    assert len(shrinking.state().moments["answers"]) == 2
    run(shrinking, 1)
    assert not shrinking.state().moments["answers"]


def test_channels_are_ordered_by_the_first_batches_before_the_first_step_and_never_again():
    recipe = replace(TRAINING, order_batches=2, frozen=("stages.1",))
    shrinking = build(SCHEDULES["sandwich"], recipe)
    given = {group: order.tolist() for group, order in shrinking.supernet.ordering.items()}
    shrinking.advance()
    ordering = {group: order.tolist() for group, order in shrinking.supernet.ordering.items()}
    assert set(ordering) == set(shrinking.supernet.channel_groups())
    assert ordering != given
    resumed = build(SCHEDULES["sandwich"], recipe)
    resumed.restore(shrinking.state())
    assert run(resumed) == run(shrinking) == run(build(SCHEDULES["sandwich"], recipe))
    assert {group: order.tolist() for group, order in resumed.supernet.ordering.items()} == ordering
    fixed = FixedSupernet(nn.Linear(4, 2), (4,))
    with pytest.raises(ConfigError, match=r"shrinking.order_batches: .*no channels to order; leave it out"):
        CentralShrinking(fixed, one_phase(), replace(TRAINING, order_batches=1), IMAGES, LABELS, [0], [1], seed=0)
    with pytest.raises(ConfigError, match=r"phase 'a', order_channels: .*no channels to order; leave it out"):
        CentralShrinking(fixed, one_phase(order_channels=True), TRAINING, IMAGES, LABELS, [0], [1], seed=0)


@pytest.mark.parametrize("order_batches", [0, 2])
def test_channels_are_ordered_anew_where_a_phase_says_so_and_earlier_subnets_stay(order_batches):
    wide, narrow = SPACE.axis("expand").values[-2:], SPACE.axis("expand").values
    phases = [
        ShrinkPhase("wide", 2, {"expand": wide}),
        ShrinkPhase("narrow", 3, {"expand": narrow}, order_channels=True),
    ]
    shrinking = build(ShrinkSchedule(tuple(phases)), replace(TRAINING, order_batches=order_batches))
    orders = []
    for _ in range(5):
        before = {expand: shrinking.supernet.cut(SPACE.subnet(expand=expand)) for expand in narrow}
        shared = {name: tensor.clone() for name, tensor in shrinking.supernet.shared().items()}
        shrinking.advance()
        orders.append({group: order.tolist() for group, order in shrinking.supernet.ordering.items()})
        cut = {expand: shrinking.supernet.cut(SPACE.subnet(expand=expand), shared) for expand in narrow}
        if shrinking.done == 3:
            for name in (name for name in before[wide[0]] if name.endswith("project.conv.weight")):
                assert same_columns(before[wide[0]][name], cut[wide[0]][name])
            assert not all(same_columns(before[narrow[0]][name], cut[narrow[0]][name]) for name in before[narrow[0]])
    assert orders[0] == orders[1]
    assert orders[1] != orders[2]
    assert orders[2] == orders[3] == orders[4]


def same_columns(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two weights that read channels have the same ones, in whatever order."""
    return a.dim() < 2 or torch.equal(
        a.flatten(2).sum(dim=2).sort(dim=1).values, b.flatten(2).sum(dim=2).sort(dim=1).values
    )


def test_kernel_matrices_train_and_unused_weights_stay():
    shrinking = build(one_phase(elastic={"kernel": (3,), "depth": (1,), "expand": (1,)}))
    before = {name: tensor.copy() for name, tensor in shrinking.state().tensors.items()}
    run(shrinking, 3)
    after = shrinking.state().tensors
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {"stages.1.0.depthwise.matrix_7to5", "stages.2.0.depthwise.matrix_5to3"} <= changed
    assert not [name for name in changed if name.startswith(("stages.1.1", "stages.2.1"))], "blocks beyond the depth"
    kernel = "stages.1.0.depthwise.conv.weight"
    ring = np.ones((7, 7), bool)
    ring[1:6, 1:6] = False
    free = CentralTraining(learning_rate=0.05, batch_size=16, weight_decay=0.0)
    shrinking = build(one_phase(elastic={"kernel": (3,), "depth": (1,), "expand": (1,)}), free)
    run(shrinking, 3)
    after = shrinking.state().tensors[kernel]
    assert np.array_equal(before[kernel][..., ring], after[..., ring])
    assert not np.array_equal(before[kernel], after)


def test_the_teacher_is_the_network_as_it_was_when_its_first_phase_began():
    largest = ShrinkPhase("largest", 2, {}, num_random=1)
    taught = ShrinkPhase("kernel", 3, {"kernel": (3,)}, teacher="trained", label_weight=0.0)
    shrinking = build(ShrinkSchedule((largest, taught)), replace(TRAINING, max_shift=0, batch_size=50))
    run(shrinking, 2)
    start = shrinking.state()
    assert not start.moments["teacher"]
    run(shrinking, 2)
    kept = shrinking.state().moments["teacher"]
    assert set(kept) == set(start.tensors)
    assert all(np.array_equal(kept[name], start.tensors[name]) for name in kept)
    teacher = fresh_supernet()
    teacher.load_state(start)
    now = fresh_supernet()
    now.load_state(shrinking.state())
    pixels = prepare_inputs(IMAGES, [0.5], [0.25])
    with torch.no_grad():
        (subnet,) = [SPACE.subnet(kernel=3)]
        expected = float(soft_cross_entropy(now(pixels, subnet), teacher(pixels, SPACE.largest())))
    ((trained, loss),) = shrinking.advance().losses.items()
    assert trained == subnet
    assert loss == pytest.approx(expected, rel=1e-4)


def test_every_example_is_seen_once_an_epoch():
    shrinking = build(one_phase(), CentralTraining(batch_size=25))
    seen = [shrinking._batch(step).tolist() for step in range(4)]
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == list(range(50))
    assert seen[:2] != seen[2:]


def test_worst_candidates_have_the_higher_loss():
    losses = {}
    for prefer in ("best", "worst"):
        schedule = ShrinkSchedule((ShrinkPhase("a", 4, ALL, candidates=6, prefer=prefer, macs_tolerance=0.3),))
        shrinking = build(schedule, CentralTraining(learning_rate=1e-6, batch_size=50, label_smoothing=0.0))
        losses[prefer] = np.mean([list(shrinking.advance().losses.values()) for _ in range(4)])
    assert losses["worst"] > losses["best"]


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_training_learns(norm):
    """All subnets of the sandwich end with a lower loss on what they are trained on."""
    shrinking = build(ShrinkSchedule.sandwich(SPACE, 30, num_random=1), CentralTraining(0.3, batch_size=50), norm=norm)
    first = shrinking.advance().losses
    run(shrinking, 28)
    last = shrinking.advance().losses
    for subnet in (SPACE.largest(), SPACE.smallest()):
        assert last[subnet] < 0.8 * first[subnet]


def test_a_diverging_run_stops_with_its_weights_intact():
    shrinking = build(one_phase(num_random=1))
    run(shrinking, 1)
    with torch.no_grad():
        shrinking.supernet.shared()["classifier.bias"].fill_(float("nan"))
    before = shrinking.state().digest()
    with pytest.raises(DivergenceError, match=r"step 2 \(a\): the loss is not finite"):
        shrinking.advance()
    assert (shrinking.done, shrinking.state().digest()) == (1, before)


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(SpaceError, match="axis 'kernel'"):
        build(one_phase(elastic={"kernel": (9,)}))
    with pytest.raises(DatasetError, match="at least 2 training examples"):
        CentralShrinking(build_supernet(), one_phase(), TRAINING, IMAGES[:1], LABELS[:1], [0.5], [0.25], seed=0)
    with pytest.raises(ConfigError, match=r"shrinking\.batch_size: expected at least 2, found 1"):
        CentralTraining(batch_size=1)
    state = build(one_phase()).state()
    with pytest.raises(CheckpointError, match="beyond the schedule's 5"):
        build(one_phase()).restore(replace(state, version=6))


@pytest.mark.parametrize(
    ("frozen", "name", "message"),
    [
        ((), "x", r"of 'x': found \(3,\), expected none, since this training has no such "),
        ((), "stem.norm.weight", r"of 'stem.norm.weight': found \(3,\), expected \(8,\); resume with"),
        (("stem",), "stem.norm.weight", r"of 'stem.norm.weight': found \(3,\), expected none, since .* or freezes it"),
    ],
)
def test_momentum_of_another_training_is_refused_and_nothing_is_changed(frozen, name, message):
    shrinking = build(one_phase(), replace(TRAINING, frozen=frozen))
    before, state = shrinking.state().digest(), build(one_phase(), seed=9).state()
    doubled = {key: 2 * value for key, value in state.tensors.items()}
    with pytest.raises(CheckpointError, match=message):
        shrinking.restore(replace(state, tensors=doubled, moments={"momentum": {name: np.zeros(3)}}))
    assert shrinking.state().digest() == before


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_frozen_parts_stay_and_the_others_train_as_without_them(norm):
    recipe = replace(TRAINING, frozen=("stem", "stages.1"), max_gradient_norm=0.0)
    schedule = one_phase(sandwich=True, teacher="in_place")
    shrinking = build(schedule, recipe, norm=norm)
    before = {name: tensor.copy() for name, tensor in shrinking.state().tensors.items()}
    run(shrinking, 1)
    after = shrinking.state().tensors
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed
    assert not [name for name in changed if name.startswith(("stem.", "stages.1."))]
    free = build(schedule, replace(recipe, frozen=()), norm=norm)
    run(free, 1)
    for name in changed:
        np.testing.assert_allclose(after[name], free.state().tensors[name], atol=1e-6, err_msg=name)


def test_a_stopped_run_with_frozen_parts_goes_on():
    recipe = replace(TRAINING, frozen=("stages.0",))
    whole = run(build(SCHEDULES["sandwich"], recipe))
    first = build(SCHEDULES["sandwich"], recipe)
    run(first, 3)
    second = build(SCHEDULES["sandwich"], recipe)
    second.restore(first.state())
    assert run(second) == whole


@pytest.mark.parametrize(
    ("frozen", "message"),
    [(("stage",), "no parameter lies in 'stage'; the supernet's parts are"), (("stages.9",), "'stages.9'")],
)
def test_frozen_parts_that_are_not_there_are_refused(frozen, message):
    with pytest.raises(ConfigError, match=message):
        build(SCHEDULES["sandwich"], replace(TRAINING, frozen=frozen))


def test_something_must_train():
    parts = tuple({name.split(".")[0] for name, _ in build_supernet().network.named_parameters()})
    with pytest.raises(ConfigError, match="leaves no parameter to train"):
        build(SCHEDULES["sandwich"], replace(TRAINING, frozen=parts))


def test_bfloat16_is_near_float32_and_keeps_float32_weights():
    start = {name: tensor.copy() for name, tensor in build(SCHEDULES["sandwich"]).state().tensors.items()}
    steps = {}
    for precision in ("float32", "bfloat16"):
        shrinking = build(SCHEDULES["sandwich"], replace(TRAINING, precision=precision, max_gradient_norm=0.0))
        run(shrinking, 1)
        after = shrinking.state().tensors
        assert {tensor.dtype for tensor in after.values()} == {np.dtype(np.float32)}
        steps[precision] = np.concatenate([(after[name] - start[name]).ravel() for name in start])
    cosine = steps["float32"] @ steps["bfloat16"] / np.linalg.norm(steps["float32"]) / np.linalg.norm(steps["bfloat16"])
    assert 0.98 < cosine < 0.999999


def test_an_unknown_precision_is_refused():
    with pytest.raises(
        ConfigError, match=r"shrinking.precision: expected one of \['float32', 'bfloat16'\], found 'half'"
    ):
        CentralTraining(precision="half")
