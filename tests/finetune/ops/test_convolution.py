"""The gradients of a convolution against those of stock autograd."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedofa.finetune.ops.convolution import ConvGeometry

KINDS = ("dense", "depthwise", "grouped", "multiplied")


@st.composite
def cases(draw):
    kind = draw(st.sampled_from(KINDS))
    groups = draw(st.integers(1, 4)) if kind != "dense" else 1
    per_group = draw(st.integers(1, 3)) if kind in ("dense", "grouped") else 1
    multiplier = draw(st.integers(1, 3)) if kind != "depthwise" else 1
    kernel = draw(st.tuples(*[st.sampled_from([1, 2, 3, 5, 7])] * 2))
    stride, dilation = draw(st.tuples(*[st.integers(1, 3)] * 2)), draw(st.tuples(*[st.sampled_from([1, 1, 2])] * 2))
    padding = draw(st.tuples(*[st.integers(0, 4)] * 2))
    sides = draw(st.tuples(*[st.integers(1, 11)] * 2))
    spans = [dilation[axis] * (kernel[axis] - 1) + 1 for axis in (0, 1)]
    assume(all(sides[axis] + 2 * padding[axis] >= spans[axis] for axis in (0, 1)))
    batch = draw(st.integers(1, 4))
    x = (batch, groups * per_group, *sides)
    weight = (groups * multiplier, per_group, *kernel)
    layouts = draw(st.tuples(*[st.sampled_from([torch.contiguous_format, torch.channels_last])] * 3))
    return x, weight, ConvGeometry(stride, padding, dilation, groups), layouts, draw(st.integers(0, 2**20))


def gradients(x, weight, geometry, grad):
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    return torch.autograd.grad(geometry.forward(x, weight, None), (x, weight), grad.double())


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([torch.float32, torch.float64]))
def test_both_gradients_are_stock_autograds(case, dtype):
    x_shape, weight_shape, geometry, layouts, seed = case
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(shape, generator=generator, dtype=dtype) for shape in (x_shape, weight_shape))
    grad = torch.randn(geometry.forward(x, weight, None).shape, generator=generator, dtype=dtype)
    x, weight, grad = (
        item.contiguous(memory_format=layout) for item, layout in zip((x, weight, grad), layouts, strict=True)
    )
    for_x, for_weight = gradients(x, weight, geometry, grad)
    found = geometry.input_gradient(grad, weight, x.shape), geometry.weight_gradient(grad, x, weight)
    for value, expected in zip(found, (for_x, for_weight), strict=True):
        assert value.shape == expected.shape
        assert value.dtype == dtype
        tolerance = 1e-6 if dtype == torch.float32 else 1e-13
        assert (value.double() - expected).norm() <= tolerance * max(float(expected.norm()), 1.0)


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("depthwise", [True, False])
def test_channels_stay_innermost(kernel, stride, depthwise):
    """A gradient in another layout would cost every layer before this one a copy."""
    weight = torch.randn(8, 1 if depthwise else 8, kernel, kernel).contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    geometry = ConvGeometry((stride, stride), (kernel // 2, kernel // 2), (1, 1), 8 if depthwise else 1)
    grad = geometry.forward(x, weight, None)
    assert grad.is_contiguous(memory_format=torch.channels_last)
    assert geometry.input_gradient(grad, weight, x.shape).is_contiguous(memory_format=torch.channels_last)


def test_the_weight_gradient_adds_up_the_parts_of_a_large_batch():
    x = torch.randn(5, 64, 128, 128, generator=torch.Generator().manual_seed(0))
    weight, geometry = torch.randn(64, 1, 5, 5), ConvGeometry((1, 1), (2, 2), (1, 1), 64)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    parts = sum(geometry.weight_gradient(grad[i : i + 1], x[i : i + 1], weight) for i in range(5))
    found = geometry.weight_gradient(grad, x, weight)
    assert (found - parts).norm() <= 1e-6 * parts.norm()


@pytest.mark.parametrize("channels", [1, 2, 5, 8])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_pointwise_convolutions_with_strides_take_few_channels(channels, layout):
    """torch 2.13's own gradient ends the process for some of them, on processors without AVX-512."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, channels, 13, 12, generator=generator).contiguous(memory_format=layout)
    weight = torch.randn(48, channels, 1, 1, generator=generator)
    geometry = ConvGeometry((2, 2), (0, 0), (1, 1), 1)
    grad = torch.randn(3, 48, 7, 6, generator=generator).contiguous(memory_format=layout)
    expected = torch.einsum("bohw,bihw->oi", grad.double(), x[:, :, ::2, ::2].double())
    found = geometry.weight_gradient(grad, x, weight)
    torch.testing.assert_close(found[..., 0, 0].double(), expected, rtol=1e-4, atol=1e-4)
