"""Depthwise convolutions inside `FastDepthwise`: torch's results and gradients; nothing else is touched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedofa.finetune.ops.depthwise import FastDepthwise


def gradients(x, weight, **how):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    result = functional.conv2d(x, weight, None, how["stride"], how["padding"], 1, x.shape[1])
    generator = torch.Generator().manual_seed(1)
    result.backward(torch.randn(result.shape, generator=generator).to(result.dtype))
    return result.detach(), x.grad, weight.grad


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000), st.integers(1, 3), st.integers(2, 12), st.integers(5, 12), st.sampled_from([3, 5, 7]),
    st.sampled_from([1, 2]), st.sampled_from([0, 1, 2]), st.booleans(),
)  # fmt: skip
def test_results_and_gradients_are_torchs(seed, batch, channels, side, kernel, stride, padding, innermost):
    if side + 2 * padding < kernel:
        return
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, side, side, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last) if innermost else x
    weight = torch.randn(channels, 1, kernel, kernel, generator=generator)
    expected = gradients(x.double(), weight.double(), stride=stride, padding=padding)
    with FastDepthwise():
        found = gradients(x, weight, stride=stride, padding=padding)
    for ours, stock in zip(found, expected, strict=True):
        scale = float(stock.abs().max()) + 1e-12
        torch.testing.assert_close(ours.double() / scale, stock / scale, atol=2e-6, rtol=0)


def test_under_autocast_the_result_is_in_its_precision_and_gradients_are_near():
    layer = nn.Conv2d(16, 16, 5, stride=2, padding=2, groups=16, bias=False)
    x = torch.randn(4, 16, 12, 12).requires_grad_()
    expected = gradients(x.detach(), layer.weight.detach(), stride=2, padding=2)[1:]
    with torch.autocast("cpu", torch.bfloat16), FastDepthwise():
        result = layer(x)
    assert result.dtype == torch.bfloat16
    generator = torch.Generator().manual_seed(1)
    result.backward(torch.randn(result.shape, generator=generator).bfloat16())
    for ours, stock in zip((x.grad, layer.weight.grad), expected, strict=True):
        assert ours is not None
        assert ours.dtype == torch.float32
        assert float((ours - stock).norm() / stock.norm()) < 0.01


@pytest.mark.parametrize("groups", [1, 2])
def test_other_convolutions_are_left_alone(groups):
    layer = nn.Conv2d(4, 4, 3, groups=groups, bias=False)
    x = torch.randn(2, 4, 6, 6)
    expected = layer(x)
    with FastDepthwise():
        found = layer(x)
    assert torch.equal(found, expected)
    assert type(found.grad_fn) is type(expected.grad_fn)


def test_a_frozen_weight_keeps_no_input():
    weight = torch.randn(8, 1, 3, 3)
    x = torch.randn(2, 8, 6, 6).requires_grad_()
    kept = []
    with FastDepthwise(), torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        functional.conv2d(x, weight, None, 1, 1, 1, 8).sum().backward()
    assert x.shape not in kept
    assert x.grad is not None
