"""Every lean operation in every type and layout, its tensors used twice, and without gradients."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedofa.finetune.ops.swap import lean
from fedofa.supernet.layers import ConvNormAct, MeanPool, SqueezeExcite
from fedofa.supernet.network import ConvSpec

LAYOUTS = (torch.contiguous_format, torch.channels_last)
TOLERANCES = {torch.float64: 1e-7, torch.float32: 2e-5}
"""Relative, against stock autograd in float64; for float32 the rounding of a chain of operations."""


def unit(norm, activation, **more):
    settings = {"in_channels": 16, "out_channels": 16, "kernel": 3, "activation": activation, **more}
    return ConvNormAct(ConvSpec("unit", **settings), norm, 1e-3)


OPERATIONS = {
    "convolution": lambda: nn.Conv2d(16, 8, 3, 2, 1),
    "grouped convolution": lambda: nn.Conv2d(16, 32, 5, padding=2, groups=4, bias=False),
    "depthwise convolution": lambda: nn.Conv2d(16, 16, 5, 2, 2, groups=16),
    "dilated convolution": lambda: nn.Conv2d(16, 8, 3, dilation=2, padding=2),
    "pointwise convolution": lambda: nn.Conv2d(16, 24, 1, bias=False),
    "linear": lambda: nn.Sequential(MeanPool(), nn.Flatten(), nn.Linear(16, 5)),
    "batch norm": lambda: nn.BatchNorm2d(16, momentum=0.0),
    "frozen batch norm": lambda: nn.BatchNorm2d(16).eval(),
    "group norm": lambda: nn.GroupNorm(2, 16),
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "h-swish": nn.Hardswish,
    "h-sigmoid": nn.Hardsigmoid,
    "squeeze-excite": lambda: SqueezeExcite(
        ConvSpec("r", 16, 8, bias=True, norm=False, activation="relu"),
        ConvSpec("e", 8, 16, bias=True, norm=False, activation="h_sigmoid"),
        "group",
        1e-5,
    ),
    "average pool": lambda: nn.AvgPool2d(3, 2, 1),
    "max pool": lambda: nn.MaxPool2d(3, 2, 1),
    "mean pool": MeanPool,
    "folded unit": lambda: unit("batch", "relu6").eval(),
    "folded unit with a bias": lambda: unit("batch", "h_swish", bias=True).eval(),
    "padded unit": lambda: unit("batch", "relu6", stride=2, padding="tensorflow").eval(),
    "depthwise unit": lambda: unit("batch", "h_swish", kernel=5, depthwise=True),
    "group norm unit": lambda: unit("group", "relu"),
}


def filled(module, seed):
    """The module with random tensors, in float64."""
    generator = torch.Generator().manual_seed(seed)
    if any(item.is_meta for item in module.parameters()):
        module = module.to_empty(device="cpu")
    module = module.double()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data.copy_(values.abs() + 0.3 if "var" in name else values)
    return module


def gradients(module, x):
    """The module runs twice on the tensor, which is used by itself too."""
    module.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = module(x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    ((y * weights).sum() + module(x * 0.5).square().mean() + x.sum()).backward()
    return {"input": x.grad, **{name: item.grad for name, item in module.named_parameters()}}, y.detach()


@pytest.mark.parametrize("name", OPERATIONS)
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_gradients_are_stock_autograds(name, data):
    dtype, layout = data.draw(st.sampled_from(list(TOLERANCES))), data.draw(st.sampled_from(LAYOUTS))
    seed, sides = data.draw(st.integers(0, 99)), data.draw(st.tuples(st.integers(4, 9), st.integers(4, 9)))
    stock = filled(OPERATIONS[name](), seed)
    for parameter in stock.parameters():
        parameter.requires_grad_(data.draw(st.booleans()))
    x = torch.randn(3, 16, *sides, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x.to(dtype).contiguous(memory_format=layout)
    stock, module = stock.to(dtype).double(), copy.deepcopy(stock).to(dtype, memory_format=layout)
    expected, y = gradients(stock, x.double())
    with lean(module):
        found, result = gradients(module, x)
        with torch.no_grad():
            again = module(x)
    tolerance = TOLERANCES[dtype]
    assert result.dtype == again.dtype == dtype
    for value in (result, again):
        assert (value.double() - y).norm() <= tolerance * (y.norm() + 1)
    for key, value in expected.items():
        assert (found[key] is None) == (value is None), key
        if value is not None:
            assert found[key].dtype == dtype
            assert (found[key].double() - value).norm() <= tolerance * (value.norm() + 1), key


@pytest.mark.parametrize("trains", [(), ("norm.bias",)], ids=["nothing", "the norm's bias"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_norm_is_folded_and_its_result_stays(trains, bias):
    module = filled(unit("batch", None, bias=bias), 0).eval()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trains)
    x = torch.randn(3, 16, 7, 7, dtype=torch.float64).requires_grad_()
    expected, y = gradients(module, x)
    with lean(module):
        found, result = gradients(module, x)
    assert (result - y).norm() <= 1e-12 * y.norm()
    for name, value in expected.items():
        if value is not None:
            assert (found[name] - value).norm() <= 1e-12 * value.norm(), name


def test_weights_that_change_between_passes_are_folded_anew():
    module = filled(unit("batch", "relu"), 0).eval().requires_grad_(False)
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    with lean(module):
        module(x)
        module.norm.running_var.mul_(2)
        module.conv.weight.mul_(-1)
        found = module(x)
    torch.testing.assert_close(found, module(x))


def test_a_second_backward_pass_is_refused_and_not_wrong():
    """The norm's input is written over; torch says so."""
    module = filled(unit("batch", "relu6"), 0).train()
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64, requires_grad=True)
    with lean(module):
        total = module(x).sum()
        total.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()
