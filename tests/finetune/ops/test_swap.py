"""Lean operations against stock autograd: the same gradients, fewer kept bytes, and nothing left behind."""

import copy

import pytest
import torch
from cohorts import SPEC, build_supernet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedofa.finetune.ops.kept import Keeper
from fedofa.finetune.ops.swap import lean
from fedofa.supernet.layers import ConvNormAct, SqueezeExcite
from fedofa.supernet.network import ConvSpec

ACTIVATIONS = (None, "relu", "relu6", "h_swish", "h_sigmoid")
EXACT = 1e-7
"""Relative: in float64 torch takes the sixth of a hard sigmoid as float32."""
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def filled(module: nn.Module, seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The module with random tensors in place of its meta ones."""
    generator = torch.Generator().manual_seed(seed)
    module = module.to_empty(device="cpu").to(dtype)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        values = torch.randn(tensor.shape, generator=generator, dtype=dtype)
        tensor.data.copy_(values.abs() + 0.3 if "var" in name else values)
    return module


@st.composite
def units(draw):
    depthwise, kernel = draw(st.booleans()), draw(st.sampled_from([1, 3, 5]))
    channels = draw(st.sampled_from([8, 16]))
    spec = ConvSpec(
        "unit",
        channels,
        channels if depthwise else draw(st.sampled_from([8, 16])),
        kernel,
        draw(st.integers(1, 2)),
        depthwise=depthwise,
        bias=draw(st.booleans()),
        norm=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        padding=draw(st.sampled_from(["symmetric", "tensorflow"])),
    )
    return filled(ConvNormAct(spec, draw(st.sampled_from(["group", "batch"])), 1e-3), draw(st.integers(0, 999))), spec


def loss_gradients(module, x, frozen, input_trains):
    """The gradients of everything that is not frozen, by name; the input is used twice."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(input_trains)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen)
        parameter.grad = None
    y = module(x)
    total = (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum() + (2 * x).square().sum()
    if total.requires_grad:
        total.backward()
    return {"input": x.grad, **{name: parameter.grad for name, parameter in module.named_parameters()}}, y.detach()


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            assert (found[name] - value).norm() <= tolerance * (value.norm() + 1), name


@settings(max_examples=40, deadline=None)
@given(units(), st.data())
def test_a_units_gradients_are_stock_autograds_whatever_trains(unit, data):
    module, spec = unit
    names = [name for name, _ in module.named_parameters()]
    frozen = data.draw(st.sets(st.sampled_from(names)))
    module.train(data.draw(st.booleans()))
    side, batch = data.draw(st.integers(3, 8)), data.draw(st.integers(2, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    x = torch.randn(batch, spec.in_channels, side, side, generator=generator, dtype=torch.float64)
    x = x.contiguous(memory_format=data.draw(st.sampled_from(LAYOUTS)))
    input_trains = data.draw(st.booleans())
    if spec.norm and isinstance(module.norm, nn.GroupNorm) and not input_trains:
        x = x.contiguous()  # stock group norm crashes with channels innermost where its input needs no gradient
        module = module.to(memory_format=torch.contiguous_format)
    expected, y = loss_gradients(module, x, frozen, input_trains)
    reference = copy.deepcopy(module)
    with lean(module):
        found, again = loss_gradients(module, x, frozen, input_trains)
    assert_same(found, expected, EXACT)
    assert (again - y).norm() <= 1e-12 * (y.norm() + 1)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), reference.parameters(), strict=True))


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("keep", ["", "bias", "norm", "conv"])
def test_a_networks_gradients_are_stock_autograds(norm, training, keep):
    """All blocks of a subnet, squeeze-excite and residuals among them; `keep` names what trains, empty for all."""
    supernet = build_supernet(norm=norm)
    model = supernet.build(supernet.space.largest()).double().train(training)
    model.dropout.p = 0.0
    frozen = {name for name, _ in model.named_parameters() if keep not in name}
    x = torch.randn(3, 1, 20, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected, _ = loss_gradients(model, x, frozen, input_trains=True)
    with lean(model):
        found, _ = loss_gradients(model, x, frozen, input_trains=True)
    assert_same(found, expected, EXACT)


def test_float32_gradients_are_within_rounding_of_float64_ones():
    spec = ConvSpec("unit", 16, 16, 5, depthwise=True, activation="h_swish")
    module = filled(ConvNormAct(spec, "group", 1e-5), 0)
    x = torch.randn(4, 16, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected, _ = loss_gradients(module, x, set(), input_trains=True)
    single = copy.deepcopy(module).float()
    with lean(single):
        found, _ = loss_gradients(single, x.float().contiguous(memory_format=torch.channels_last), set(), True)
    assert_same({name: value.double() for name, value in found.items()}, expected, 1e-6)


def kept_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes of distinct storages that autograd keeps, parameters, buffers and the input left out."""
    own = {item.untyped_storage().data_ptr() for item in (x, *model.parameters(), *model.buffers())}
    alive, sizes = [], {}

    def pack(tensor):
        alive.append(tensor)
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model(x)
    del kept
    return sum(size for pointer, size in sizes.items() if pointer not in own)


def unit_of(activation, *, norm=True, kind="batch"):
    spec = ConvSpec("unit", 8, 8, 3, norm=norm, activation=activation, bias=not norm)
    return filled(ConvNormAct(spec, kind, 1e-5), 0, torch.float32).eval()


VALUES = 2 * 8 * 16 * 16
SMALL = 600  # coefficients of the norm


@pytest.mark.parametrize(
    ("activation", "trains", "codes", "most"),
    [
        ("relu", "norm.bias", False, VALUES // 8),
        ("relu6", "norm.bias", False, VALUES // 8),
        ("h_sigmoid", "norm.bias", False, VALUES // 8),
        ("h_swish", "norm.bias", True, VALUES),
        ("h_swish", "norm.bias", False, 4 * VALUES),
        (None, "norm.bias", False, 0),
        ("relu6", "norm.weight", False, 4 * VALUES),
        ("h_swish", "norm.weight", False, 4 * VALUES),
        ("relu6", "conv.weight", False, VALUES // 8),
    ],
)
def test_what_a_unit_keeps(activation, trains, codes, most):
    """The input is a leaf that is there anyway: a trainable convolution keeps it, a frozen one does not."""
    module = unit_of(activation)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == trains)
    x = torch.randn(2, 8, 16, 16).contiguous(memory_format=torch.channels_last)
    stock = kept_bytes(module, x)
    with lean(module, codes_swish=codes):
        found = kept_bytes(module, x)
    assert most <= found <= most + SMALL
    assert found < stock


def test_one_tensor_a_unit_is_kept_where_everything_trains():
    """The norm's input: the activation's input and the next convolution's are computed from it."""
    chain = nn.Sequential(*(unit_of("h_swish") for _ in range(3)))
    x = torch.randn(2, 8, 16, 16)
    stock = kept_bytes(chain, x)
    with lean(chain):
        assert kept_bytes(chain, x) <= 3 * (4 * VALUES + SMALL)
    assert stock >= 8 * 4 * VALUES


def test_a_result_that_was_written_to_is_not_computed_again():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = unit_of(None).double(), unit_of("relu").double()

        def forward(self, x):
            return self.second(self.first(x).mul_(0.5))

    model, x = Written(), torch.randn(2, 8, 6, 6, dtype=torch.float64)
    expected, _ = loss_gradients(model, x, set(), True)
    with lean(model):
        found, _ = loss_gradients(model, x, set(), True)
    assert_same(found, expected, EXACT)


def test_nothing_is_kept_without_gradients_and_the_result_is_the_same():
    model, x = unit_of("h_swish"), torch.randn(2, 8, 6, 6)
    expected = model(x)
    with lean(model), torch.no_grad():
        assert kept_bytes(model, x) == 0
        torch.testing.assert_close(model(x), expected)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with lean(model):
        assert kept_bytes(model, x) == 0
        assert not model(x).requires_grad


def plain_network() -> nn.Sequential:
    """Layers of plain torch, no parts of ours."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 8, 5, padding=2, groups=8),
        nn.GroupNorm(2, 8),
        nn.Hardswish(),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.Conv2d(8, 6, 1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(6 * 4, 3),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_plain_layers_are_swapped_too(layout, training):
    torch.manual_seed(0)
    model = plain_network().double().to(memory_format=layout).train(training)
    model[1].momentum = 0.0
    x = torch.randn(2, 3, 15, 15, dtype=torch.float64).contiguous(memory_format=layout)
    expected, _ = loss_gradients(model, x, set(), True)
    stock = kept_bytes(model, x)
    with lean(model):
        found, _ = loss_gradients(model, x, set(), True)
        assert kept_bytes(model, x) < stock
    assert_same(found, expected, EXACT)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("ceil_mode", [True, False])
def test_max_pooling_keeps_a_byte_a_result(dilation, kernel, ceil_mode):
    model = nn.Sequential(nn.MaxPool2d(kernel, 2, 1, dilation=dilation, ceil_mode=ceil_mode))
    x = torch.randn(2, 8, 11, 13, dtype=torch.float64)
    expected, y = loss_gradients(model, x, set(), True)
    with lean(model):
        found, _ = loss_gradients(model, x, set(), True)
        assert kept_bytes(model, x.requires_grad_()) == y.numel()
    assert_same(found, expected, 0.0)


def test_a_squeeze_excite_keeps_its_input_only():
    reduce = ConvSpec("r", 8, 8, bias=True, norm=False, activation="relu")
    expand = ConvSpec("e", 8, 8, bias=True, norm=False, activation="h_sigmoid")
    model = filled(SqueezeExcite(reduce, expand, "batch", 1e-5), 0)
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    expected, _ = loss_gradients(model, x, set(), True)
    with lean(model):
        found, _ = loss_gradients(model, x, set(), True)
    assert_same(found, expected, EXACT)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_every_layer_computes_as_before_afterwards(error):
    supernet = build_supernet()
    model = nn.Sequential(supernet.build(supernet.space.largest()), plain_network())
    with pytest.raises(error), lean(model):
        assert [name for name, module in model.named_modules() if "forward" in vars(module)]
        raise error
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_layers_without_a_lean_operation_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding_mode="circular", padding=1))
    model.append(nn.BatchNorm2d(4, affine=False))
    with lean(model):
        assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize(
    ("form", "share", "error"), [("bfloat16", 0.5, 4e-3), ("int8", 0.27, 0.1), ("int4", 0.15, 0.5)]
)
def test_compressed_activations_are_smaller_and_nearly_right(form, share, error):
    model, x = nn.Sequential(unit_of("relu"), unit_of("relu")), torch.randn(2, 8, 16, 16)
    expected, _ = loss_gradients(model, x, {"0.conv.weight"}, True)
    exact = copy.deepcopy(model)
    with lean(exact):
        full = kept_bytes(exact, x)
    keeper = Keeper(form, generator=torch.Generator().manual_seed(0))
    with lean(model, keeper):
        found, _ = loss_gradients(model, x, {"0.conv.weight"}, True)
        assert kept_bytes(model, x) <= share * full + 2 * SMALL
    for name in ("1.conv.weight", "1.norm.weight", "0.norm.weight", "input"):
        relative = (found[name] - expected[name]).norm() / expected[name].norm()
        assert relative <= error, name
    assert SPEC.norm in ("batch", "group")
