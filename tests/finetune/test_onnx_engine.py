"""The engine without torch against the one with it: draws, inputs, single operations, steps and whole deltas."""

import itertools
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.nn import functional

from conf.compose import compose_conf
from fedofa.evaluation.metrics import evaluate
from fedofa.finetune.draws import TorchDraws, task_seeds
from fedofa.finetune.inputs import prepare_inputs
from fedofa.finetune.numpy_optimisers import build_numpy_optimiser, clip_gradients
from fedofa.finetune.onnx_network import compile_step
from fedofa.finetune.onnx_tape import Tape, Window
from fedofa.finetune.onnx_trainer import CompiledSession, StoredExamples, fine_tune_compiled, score_compiled
from fedofa.finetune.optimisers import AdamW, Sgd
from fedofa.finetune.pixels import prepare_pixels
from fedofa.finetune.plans import build_plan
from fedofa.finetune.recipe import LocalTraining
from fedofa.finetune.trainer import fine_tune, shifted
from fedofa.supernet.elastic import ElasticSupernet
from fedofa.supernet.families import build_supernet
from fedofa.types.errors import ConfigError, DatasetError, WireError
from fedofa.types.plan import FineTunePlan

NORMALISATION = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]}
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 3, 40, 40)).astype(np.uint8)
LABELS = np.arange(8) % 5
SEEDS = task_seeds(0, "client-0001", 3)
TRAINING = LocalTraining(batch_size=3, learning_rate=0.01, max_shift=1, label_smoothing=0.1, weight_decay=1e-3)

# An activation that lies within rounding of a kink has one slope or the other, as each engine rounds it: at 45 pixels
# the last case has one 2e-8 from ReLU's, which alone moves its channel's bias by a tenth of its change.
SPACES = {
    "group norm, h-swish, SE": ("small", "group", ()),
    "batch norm, h-swish, SE": ("small", "batch", ()),
    "MobileNetV2, ReLU6": ("mobilenet_v2", "batch", ("supernet.pretrained=null", "supernet.resolutions=[48]")),
    "ProxylessNAS, ReLU6": ("proxyless", "batch", ("supernet.resolutions=[48]",)),
    "residual, averaged shortcuts": ("resnet50", "batch", ("supernet.resolutions=[48]",)),
    "residual chain, TensorFlow's padding": (
        "mobilenet_v2",
        "batch",
        (
            "supernet.pretrained=null",
            "supernet.resolutions=[47]",
            "+supernet.stem_pool=true",
            "++supernet.padding=tensorflow",
            "supernet.activation=relu",
            "supernet.blocks=[{width: 32, expand: 1.0, kind: residual}, {width: 32, expand: 1.0, kind: residual},"
            "{width: 48, expand: 1.0, stride: 2, kind: residual}]",
        ),
    ),
    "lite branches, group norm": ("small", "group", ("supernet.lite_residual=true",)),
    "lite branches, batch norm": (
        "mobilenet_v2",
        "batch",
        ("supernet.pretrained=null", "supernet.resolutions=[47]", "supernet.lite_residual=true"),
    ),
}
KINDS = ("head", "bias", "last_blocks(2)", "full", "parts", "parts and scales", "lite_residual")


def build(space: str, *, dropout: float = 0.0) -> tuple[ElasticSupernet, torch.nn.Module, dict[str, np.ndarray]]:
    """A space, its smallest subnet with norms far from the identity, and that subnet's tensors."""
    name, norm, more = SPACES[space]
    settings = dict(compose_conf([f"supernet={name}", *more]).supernet)
    settings.pop("pretrained", None)
    settings |= {"num_classes": 5, "in_channels": 3, "norm": norm, "dropout": dropout}
    supernet = build_supernet(settings, torch.Generator().manual_seed(0))
    assert isinstance(supernet, ElasticSupernet)
    model, generator = supernet.build(supernet.space.smallest()), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("running_var", "norm.weight")):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.dim() == 1:
                tensor.normal_(0, 0.3, generator=generator)
    return supernet, model, {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def stored(count: int = len(LABELS)) -> StoredExamples:
    return StoredExamples(
        IMAGES[:count], LABELS[:count], lambda images, side: prepare_pixels(images, NORMALISATION, side)
    )


def inputs(supernet: ElasticSupernet) -> torch.Tensor:
    side = supernet.resolution(supernet.space.smallest())
    return prepare_inputs(IMAGES, NORMALISATION["mean"], NORMALISATION["std"], side)


def train_only(*names: str) -> FineTunePlan:
    """A plan of these parameters."""
    return FineTunePlan("some", names)


def plan_of(kind: str, supernet: ElasticSupernet) -> FineTunePlan:
    """The smallest subnet's plan: of that name, or "parts": biases and of every weight some of its channels."""
    blocks = supernet.block_costs(supernet.space.smallest())
    if not kind.startswith("parts"):
        return build_plan(kind, blocks, statistics="frozen")
    fractions = itertools.cycle((0.3, 0.5, 1.0, 0.05))
    items = [item for block in blocks for item in block.parameters]
    trained = [item.name for item in items if kind == "parts and scales" or not item.name.endswith("norm.weight")]
    parts = tuple((item.name, next(fractions)) for item in items if item.name in trained and len(item.shape) > 1)
    return FineTunePlan(kind, tuple(trained), statistics="frozen", fractions=parts)


# -- what is drawn and prepared ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 7, 2**63 - 1])
def test_draws_are_torchs(seed):
    draws, generator = TorchDraws(seed), torch.Generator().manual_seed(seed)
    for count in (1, 2, 5, 333):
        assert np.array_equal(draws.permutation(count), torch.randperm(count, generator=generator).numpy())
        expected = torch.randint(-2, 3, (2, count), generator=generator).numpy()
        assert np.array_equal(draws.integers(-2, 3, (2, count)), expected)


@pytest.mark.parametrize("side", [40, 28, 20, 63, 96])
def test_inputs_are_torchs_to_rounding(side):
    expected = prepare_inputs(IMAGES, NORMALISATION["mean"], NORMALISATION["std"], side).numpy()
    found = prepare_pixels(IMAGES, NORMALISATION, side)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_measurements_are_normalised_by_row_as_torch_does():
    values = np.random.default_rng(1).normal(size=(3, 2, 6, 6)).astype(np.float32)
    statistics = {"mean": np.linspace(-1, 1, 12).tolist(), "std": np.linspace(1, 2, 12).tolist()}
    expected = prepare_inputs(values, statistics["mean"], statistics["std"], 6).numpy()
    assert np.array_equal(prepare_pixels(values, statistics, 6), expected)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_optimisers_take_torchs_steps(optimiser, momentum):
    rng = np.random.default_rng(2)
    recipe = LocalTraining(optimiser=optimiser, learning_rate=0.03, momentum=momentum, weight_decay=0.01)
    ours = {name: rng.normal(size=shape).astype(np.float32) for name, shape in (("a", (3, 4)), ("b", (5,)))}
    theirs = [torch.nn.Parameter(torch.from_numpy(values.copy())) for values in ours.values()]
    numpy_optimiser = build_numpy_optimiser(recipe)
    optimiser = AdamW(theirs, 0.03, 0.01) if optimiser == "adamw" else Sgd(theirs, 0.03, momentum, 0.01)
    for _ in range(4):
        gradients = {name: rng.normal(size=values.shape).astype(np.float32) for name, values in ours.items()}
        for parameter, gradient in zip(theirs, gradients.values(), strict=True):
            parameter.grad = torch.from_numpy(gradient.copy())
        torch.nn.utils.clip_grad_norm_(theirs, 2.0)
        clip_gradients(gradients, 2.0)
        optimiser.step()
        numpy_optimiser.step(ours, gradients)
    for values, parameter in zip(ours.values(), theirs, strict=True):
        np.testing.assert_allclose(values, parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


# -- single operations -------------------------------------------------------------------------------------------------


def run_tape(tape: Tape, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    onnx.checker.check_model(onnx.load_from_string(tape.model()), full_check=True)
    return onnxruntime.InferenceSession(tape.model(), providers=["CPUExecutionProvider"]).run(None, feeds)


@pytest.mark.parametrize("name", ["relu", "relu6", "h_swish", "h_sigmoid"])
def test_slopes_are_torchs_also_where_pieces_meet(name):
    edges = np.array([-3, 0, 3, 6], np.float32)
    values = np.concatenate([edges, np.nextafter(edges, 9), np.nextafter(edges, -9), np.linspace(-8, 8, 52)])
    values = values.astype(np.float32).reshape(1, 8, 8, 1)
    tape = Tape()
    x = tape.input("x", values.shape, live=True)
    y = tape.activation(x, name)
    tape.output("y", y.name, y.shape)
    tape.differentiate(y, tape.input("grad", values.shape).name)
    tape.output("gradient", tape.gradient(x), x.shape)
    grad = np.random.default_rng(3).normal(size=values.shape).astype(np.float32)
    result, gradient = run_tape(tape, {"x": values, "grad": grad})
    given = torch.from_numpy(values).requires_grad_()
    kinds = {"relu6": functional.relu6, "h_swish": functional.hardswish, "h_sigmoid": functional.hardsigmoid}
    expected = kinds.get(name, functional.relu)(given)
    expected.backward(torch.from_numpy(grad))
    np.testing.assert_allclose(result, expected.detach().numpy(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, given.grad.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize("shift", [0, 1])
def test_convolutions_have_torchs_gradients(groups, kernel, stride, side, shift):
    half = kernel // 2
    before, after = half - min(shift, half), half
    tape = Tape()
    x = tape.input("x", (1, 6, side, side + 1), live=True)
    weight = tape.input("w", (6, 6 // groups, kernel, kernel), live=True)
    bias = tape.input("b", (6,), live=True)
    y = tape.conv(x, weight, bias, Window(stride, (before, before, after, after), groups))
    tape.output("y", y.name, y.shape)
    tape.differentiate(y, tape.input("grad", y.shape).name)
    for value in (x, weight, bias):
        tape.output(f"gradient {value.name}", tape.gradient(value), value.shape)
    rng = np.random.default_rng(4)
    feeds = {item.name: rng.normal(size=item.shape).astype(np.float32) for item in (x, weight, bias)}
    feeds["grad"] = rng.normal(size=y.shape).astype(np.float32)
    given = [torch.from_numpy(feeds[name]).requires_grad_() for name in ("x", "w", "b")]
    padded = functional.pad(given[0], (before, after, before, after))
    expected = functional.conv2d(padded, given[1], given[2], stride, groups=groups)
    expected.backward(torch.from_numpy(feeds["grad"]))
    found = run_tape(tape, feeds)
    for ours, theirs in zip(found, [expected.detach(), *(item.grad for item in given)], strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", [(6, 2, 3, 3), (4, 1, 3, 3), (1, 6, 3, 3), (5, 6, 1, 1), (6, 5, 1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_of_a_weight_that_trains_in_part_the_gradient_is_that_part_of_the_whole(part, stride):
    out, channels, kernel, _ = part
    groups = 6 if channels == 1 else 1
    window = Window(stride, (kernel // 2,) * 4, groups)
    shape = (6, 6 // groups, kernel, kernel)
    rng = np.random.default_rng(11)
    feeds = {"x": (1, 6, 8, 9), "w": shape, "f": (6, 1, 1, 1)}
    feeds = {name: rng.normal(size=sides).astype(np.float32) for name, sides in feeds.items()}
    gradients = {}
    for scale_trains, trained in itertools.product((False, True), (None, part)):
        tape = Tape()
        x, weight = tape.input("x", feeds["x"].shape, live=True), tape.input("w", shape, live=True, part=trained)
        factor = tape.input("f", feeds["f"].shape, live=scale_trains)
        y = tape.conv(x, tape.multiply(weight, factor), None, window)
        tape.differentiate(y, tape.input("grad", y.shape).name)
        for value in (x, weight, *([factor] if scale_trains else [])):
            tape.output(f"gradient {value.name}", tape.gradient(value), value.trained)
        grad = np.random.default_rng(12).normal(size=y.shape).astype(np.float32)
        gradients[scale_trains, trained] = run_tape(tape, {**feeds, "grad": grad})
    for scale_trains in (False, True):
        whole, found = gradients[scale_trains, None], gradients[scale_trains, part]
        assert found[1].shape == part
        whole[1] = whole[1][:out, :channels]
        for ours, expected in zip(found, whole, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", [(5, 3), (2, 7)])
def test_a_linear_weight_trains_in_part(part):
    tape = Tape()
    x, bias = tape.input("x", (1, 7), live=True), tape.input("b", (5,), live=True)
    weight = tape.input("w", (5, 7), live=True, part=part)
    y = tape.linear(x, weight, bias)
    tape.differentiate(y, tape.input("grad", y.shape).name)
    tape.output("gradient", tape.gradient(weight), weight.trained)
    rng = np.random.default_rng(13)
    feeds = {"x": (1, 7), "b": (5,), "w": (5, 7), "grad": (1, 5)}
    feeds = {name: rng.normal(size=shape).astype(np.float32) for name, shape in feeds.items()}
    expected = np.outer(feeds["grad"], feeds["x"])[: part[0], : part[1]]
    np.testing.assert_allclose(run_tape(tape, feeds)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("sides", [((4, 4), (8, 7)), ((1, 3), (2, 5)), ((3, 1), (3, 1)), ((5, 4), (11, 4))])
def test_upsampling_is_torchs(sides):
    before, after = sides
    tape = Tape()
    x = tape.input("x", (1, 3, *before), live=True)
    y = tape.upsample(x, after)
    tape.output("y", y.name, y.shape)
    tape.differentiate(y, tape.input("grad", y.shape).name)
    tape.output("gradient", tape.gradient(x), x.shape)
    rng = np.random.default_rng(14)
    feeds = {name: rng.normal(size=shape).astype(np.float32) for name, shape in (("x", x.shape), ("grad", y.shape))}
    given = torch.from_numpy(feeds["x"]).requires_grad_()
    expected = functional.interpolate(given, size=after, mode="bilinear", align_corners=False)
    expected.backward(torch.from_numpy(feeds["grad"]))
    result, gradient = run_tape(tape, feeds)
    np.testing.assert_allclose(result, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, given.grad.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize("kind", ["max", "average", "mean"])
def test_pools_have_torchs_gradients_ties_and_cut_windows_included(kind, side):
    values = np.random.default_rng(5).integers(0, 3, (1, 4, side, side)).astype(np.float32)  # many equal ones
    tape = Tape()
    x = tape.input("x", values.shape, live=True)
    y = {"max": tape.max_pool, "average": lambda x: tape.average_pool(x, 2), "mean": tape.mean_pool}[kind](x)
    tape.output("y", y.name, y.shape)
    tape.differentiate(y, tape.input("grad", y.shape).name)
    tape.output("gradient", tape.gradient(x), x.shape)
    grad = np.random.default_rng(6).normal(size=y.shape).astype(np.float32)
    result, gradient = run_tape(tape, {"x": values, "grad": grad})
    given = torch.from_numpy(values).requires_grad_()
    expected = {
        "max": lambda x: functional.max_pool2d(x, 3, 2, 1),
        "average": lambda x: functional.avg_pool2d(x, 2, ceil_mode=True),
        "mean": lambda x: x.mean((2, 3), keepdim=True),
    }[kind](given)
    expected.backward(torch.from_numpy(grad))
    np.testing.assert_allclose(result, expected.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(gradient, given.grad.numpy(), rtol=1e-6, atol=1e-7)


# -- whole steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "kind"),
    [pair for pair in itertools.product(SPACES, KINDS) if pair[1] != "lite_residual" or "lite" in pair[0]],
)
def test_deltas_agree_over_a_local_epoch(space, kind):
    supernet, model, received = build(space)
    subnet, plan = supernet.space.smallest(), plan_of(kind, supernet)
    recipe = replace(TRAINING, proximal_mu=0.1, max_gradient_norm=3.0)
    generator = torch.Generator().manual_seed(SEEDS[1])
    expected = fine_tune(model, plan, received, inputs(supernet), torch.from_numpy(LABELS), recipe, generator)
    step = compile_step(supernet.network_spec(subnet), plan)
    onnx.checker.check_model(onnx.load_from_string(step.graph), full_check=True)
    feed = step.feed(received)
    session = CompiledSession(step.graph, feed)
    assert tuple(session.trained) == plan.trainable
    found = fine_tune_compiled(session, feed, stored(), recipe, SEEDS)
    assert found.num_steps == expected.num_steps == 3
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert {name: values.shape for name, values in found.weights.items()} == {
        name: plan.part_shape(name, received[name].shape) for name in plan.trainable
    }
    size = np.sqrt(sum(np.square(values).sum() for values in expected.weights.values()))
    gap = np.sqrt(sum(np.square(found.weights[name] - values).sum() for name, values in expected.weights.items()))
    assert 0 < gap < 1e-4 * size
    for name, values in expected.weights.items():
        rounding = 4 * np.finfo(np.float32).eps * np.abs(received[name]).max()  # of weights that hardly change
        np.testing.assert_allclose(
            found.weights[name], values, rtol=0, atol=1e-4 * np.abs(values).max() + rounding, err_msg=name
        )


def test_only_what_trains_is_in_the_backward_pass_and_nothing_else_is_sent():
    supernet, _, received = build("MobileNetV2, ReLU6")
    subnet = supernet.space.smallest()
    spec, blocks = supernet.network_spec(subnet), supernet.block_costs(subnet)
    steps = {kind: compile_step(spec, build_plan(kind, blocks)) for kind in ("head", "bias", "full")}
    nodes = {kind: len(onnx.load_from_string(step.graph).graph.node) for kind, step in steps.items()}
    assert nodes["head"] < nodes["bias"] < nodes["full"]
    names = set(steps["head"].tensors)
    assert not any("running" in name or name.endswith("norm.weight") for name in names)
    assert {"stem.folded.weight", "stem.folded.shift", "classifier.weight"} <= names
    assert sum(values.nbytes for values in steps["bias"].feed(received).values()) <= sum(
        values.nbytes for values in received.values()
    )


def kept_values(graph: bytes) -> int:
    """Values that the forward pass leaves for the backward pass; the graph is in order, the loss divides it."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(graph))
    shapes = {
        item.name: [side.dim_value for side in item.type.tensor_type.shape.dim] for item in model.graph.value_info
    }
    middle = next(place for place, node in enumerate(model.graph.node) if node.op_type == "LogSoftmax")
    made = {name for node in model.graph.node[:middle] for name in node.output}
    read = {name for node in model.graph.node[middle + 1 :] for name in node.input}
    return sum(int(np.prod(shapes[name])) for name in made & read)


@pytest.mark.parametrize("layer", ["project", "depthwise"])
def test_a_layer_that_trains_in_part_keeps_those_channels_of_its_input_and_no_others(layer):
    supernet, _, _ = build("MobileNetV2, ReLU6")
    spec = supernet.network_spec(supernet.space.smallest())
    block = spec.blocks[-1]
    name, channels, positions = f"{block.name}.{layer}.conv.weight", block.mid_channels, 2 * 2
    kept = []
    for fraction in (1.0, 0.25):
        plan = FineTunePlan("part", (name, "classifier.bias"), fractions=((name, fraction),))
        kept.append(kept_values(compile_step(spec, plan).graph))
    assert kept[0] - kept[1] == (channels - channels // 4) * positions


def test_dropout_takes_out_what_its_draws_say_and_scales_the_rest():
    supernet, model, received = build("group norm, h-swish, SE", dropout=0.25)
    subnet = supernet.space.smallest()
    step = compile_step(supernet.network_spec(subnet), train_only("classifier.weight"))
    session = CompiledSession(step.graph, step.feed(received))
    uniform = np.random.default_rng(7).random(session.dropout_shape(), np.float32)
    image = inputs(supernet)[:1]
    target = np.eye(5, dtype=np.float32)[2:3]
    found = session.run({"image": image.numpy(), "target": target, "uniform": uniform})
    kept = torch.from_numpy((uniform >= 0.25) / 0.75).float()
    model.eval()
    model.dropout.register_forward_hook(lambda module, given, result: result * kept)
    loss = functional.cross_entropy(model(image), torch.tensor([2]))
    loss.backward()
    assert 0 < (uniform < 0.25).sum() < uniform.size
    assert float(found["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    expected = model.get_parameter("classifier.weight").grad.numpy()
    np.testing.assert_allclose(found["classifier.weight"], expected, rtol=1e-4, atol=1e-6)


def test_training_with_dropout_is_the_same_every_time():
    supernet, _, received = build("group norm, h-swish, SE", dropout=0.25)
    step = compile_step(supernet.network_spec(supernet.space.smallest()), train_only("classifier.weight"))
    feed = step.feed(received)
    runs = [fine_tune_compiled(CompiledSession(step.graph, feed), feed, stored(), TRAINING, SEEDS) for _ in range(2)]
    assert np.array_equal(runs[0].weights["classifier.weight"], runs[1].weights["classifier.weight"])
    assert np.array_equal(feed["classifier.weight"], received["classifier.weight"]), "what came stays as it came"


def test_images_are_shifted_as_the_torch_engine_shifts_them():
    supernet, model, received = build("group norm, h-swish, SE")
    plan = build_plan("head", supernet.block_costs(supernet.space.smallest()))
    recipe = replace(TRAINING, max_shift=3, max_steps=1, batch_size=8)
    step = compile_step(supernet.network_spec(supernet.space.smallest()), plan)
    feed = step.feed(received)
    found = fine_tune_compiled(CompiledSession(step.graph, feed), feed, stored(), recipe, SEEDS)
    generator = torch.Generator().manual_seed(SEEDS[1])
    order = torch.randperm(8, generator=generator)
    moved = shifted(inputs(supernet)[order], 3, generator)
    model.eval()
    smoothing = TRAINING.label_smoothing
    loss = functional.cross_entropy(model(moved), torch.from_numpy(LABELS)[order], label_smoothing=smoothing)
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("space", ["batch norm, h-swish, SE", "ProxylessNAS, ReLU6"])
def test_scores_are_torchs(space):
    supernet, model, received = build(space)
    step = compile_step(supernet.network_spec(supernet.space.smallest()), train_only())
    found = score_compiled(CompiledSession(step.graph, step.feed(received)), stored())
    expected = evaluate(model, inputs(supernet), torch.from_numpy(LABELS))
    assert (found.accuracy, found.num_examples) == (expected.accuracy, expected.num_examples)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)


def test_what_does_not_belong_together_is_refused():
    supernet, _, received = build("group norm, h-swish, SE")
    spec = supernet.network_spec(supernet.space.smallest())
    with pytest.raises(ConfigError, match=r"the plan trains \['stem.kernel'\], which this subnet does not have"):
        compile_step(spec, train_only("stem.kernel"))
    with pytest.raises(ConfigError, match=r"plan 'lora\(2\)' cannot be compiled: it trains .* factors of low rank"):
        compile_step(spec, FineTunePlan("lora(2)", (), low_rank=("classifier.weight",), rank=2))
    step = compile_step(spec, train_only("classifier.bias"))
    feed = step.feed(received)
    with pytest.raises(WireError, match="the task's graph cannot be loaded"):
        CompiledSession(b"no graph", feed)
    with pytest.raises(WireError, match=r"not its graph's: 1 differ, among them \['classifier.bias'\]"):
        CompiledSession(step.graph, {**feed, "classifier.bias": np.zeros(3, np.float32)})
    session = CompiledSession(step.graph, feed)
    with pytest.raises(DatasetError, match="at least 1 training example"):
        fine_tune_compiled(session, feed, stored(0), TRAINING, SEEDS)
    with pytest.raises(DatasetError, match="at least 1 example"):
        score_compiled(session, stored(0))
