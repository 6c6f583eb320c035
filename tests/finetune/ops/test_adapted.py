"""Layers that train in part or by factors: gradients of stock autograd, and exactly what is kept for them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedofa.finetune.ops.kept import Keeper
from fedofa.finetune.ops.leading import LeadingLayer
from fedofa.finetune.ops.low_rank import LowRankLayer, kernel

cases = settings(max_examples=25, deadline=None)
layouts = st.sampled_from([torch.channels_last, torch.contiguous_format])
seeds = st.integers(0, 2**16)


def kept_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """What autograd keeps of one forward pass, the layer's own tensors apart."""
    own = {item.untyped_storage().data_ptr() for item in layer.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda item: item):
        y = layer(x)
    del y
    return sum(item.untyped_storage().nbytes() for item in kept.values())


def assert_same(found: torch.Tensor, expected: torch.Tensor):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@cases
@given(
    seeds,
    st.sampled_from(["dense", "pointwise", "depthwise"]),
    st.sampled_from([1, 2]),
    st.sampled_from([3, 5]),
    st.booleans(),
    st.integers(1, 6),
    layouts,
)
def test_a_leading_part_gets_stock_autograds_gradient(seed, kind, stride, size, bias, count, layout):
    generator = torch.Generator().manual_seed(seed)
    groups, size = (6, size) if kind == "depthwise" else (1, 1 if kind == "pointwise" else size)
    conv = nn.Conv2d(6, 6, size, stride, size // 2, groups=groups, bias=bias).double().to(memory_format=layout)
    x = torch.randn(2, 6, 9, 8, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)
    weight = torch.randn(conv.weight.shape, generator=generator, dtype=torch.float64)
    conv.weight.data.copy_(weight)
    shape = (count, 1, size, size) if groups > 1 else (6, count, size, size)
    layer = LeadingLayer(conv, Keeper(), shape)
    reference = weight.clone().requires_grad_()
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = functional.conv2d(theirs, reference, conv.bias, stride, size // 2, 1, groups)
    found = layer(mine)
    assert_same(found, expected)
    spread = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    (expected * spread).sum().backward()
    of_bias = None if conv.bias is None else conv.bias.grad.clone()
    conv.zero_grad()
    (found * spread).sum().backward()
    assert layer.part.shape == shape
    assert_same(layer.part.grad, reference.grad[tuple(map(slice, shape))])
    assert_same(mine.grad, theirs.grad)
    assert conv.weight.grad is None
    if of_bias is not None:
        assert_same(conv.bias.grad, of_bias)


@cases
@given(seeds, st.sampled_from([1, 2]), st.booleans(), st.integers(1, 4), layouts)
def test_factors_get_stock_autograds_gradients(seed, stride, bias, rank, layout):
    generator = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(5, 7, 1, stride, bias=bias).double().to(memory_format=layout)
    layer = LowRankLayer(conv, Keeper(), rank, generator)
    layer.left.data.normal_(generator=generator)
    x = torch.randn(3, 5, 6, 5, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    left, right = (item.detach().clone().requires_grad_() for item in (layer.left, layer.right))
    expected = functional.conv2d(theirs, conv.weight + kernel(left @ right), conv.bias, stride)
    found = layer(mine)
    assert_same(found, expected)
    with torch.no_grad():
        assert_same(layer(x), expected)
    spread = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    (expected * spread).sum().backward()
    (found * spread).sum().backward()
    for own, other in ((layer.left, left), (layer.right, right), (mine, theirs)):
        assert_same(own.grad, other.grad)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_train_in_part_and_by_factors(bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    linear = nn.Linear(6, 3, bias=bias).double()
    reference = linear.weight.detach().clone().requires_grad_()
    expected = functional.linear(x, reference, linear.bias).square().sum()
    expected.backward()
    layer = LeadingLayer(linear, Keeper(), (3, 2))
    layer(x).square().sum().backward()
    assert_same(layer.part.grad, reference.grad[:, :2])
    factors = LowRankLayer(linear, Keeper(), 2, generator)
    factors(x).square().sum().backward()
    assert_same(factors.left.grad, reference.grad @ factors.right.T)


def test_a_leading_part_keeps_so_many_channels_and_nothing_else():
    x = torch.randn(2, 16, 10, 10).contiguous(memory_format=torch.channels_last)
    conv = nn.Conv2d(16, 24, 1, bias=False).to(memory_format=torch.channels_last)
    assert kept_bytes(LeadingLayer(conv, Keeper(), (24, 4, 1, 1)), x) == x.nbytes // 4
    depthwise = nn.Conv2d(16, 16, 5, padding=2, groups=16).to(memory_format=torch.channels_last)
    assert kept_bytes(LeadingLayer(depthwise, Keeper(), (2, 1, 5, 5)), x) == x.nbytes // 8
    half = LeadingLayer(conv, Keeper("bfloat16"), (24, 4, 1, 1))
    assert kept_bytes(half, x) == x.nbytes // 8


def test_what_the_part_learns_shows_in_the_next_result_and_in_the_layers_weight():
    conv = nn.Conv2d(4, 3, 1)
    layer, x = LeadingLayer(conv, Keeper(), (3, 2, 1, 1)), torch.randn(1, 4, 2, 2)
    before = conv.weight.detach().clone()
    layer.part.data += 1.0
    with torch.no_grad():
        torch.testing.assert_close(layer(x), functional.conv2d(x, conv.weight, conv.bias))
    assert torch.equal(conv.weight[:, 2:], before[:, 2:])
    assert torch.equal(conv.weight[:, :2], before[:, :2] + 1.0)
    layer = LowRankLayer(conv, Keeper(), 2, torch.Generator().manual_seed(0))
    before, layer.left.data = conv.weight.detach().clone(), torch.ones(3, 2)
    y = layer(x)
    assert torch.equal(conv.weight, before)
    layer.settle()
    torch.testing.assert_close(functional.conv2d(x, conv.weight, conv.bias), y)
