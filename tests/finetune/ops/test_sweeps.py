"""Maps of many parts: what is done part by part is what is done at once."""

import pytest
import torch
from torch import nn

from fedofa.finetune.ops.parts import affine
from fedofa.finetune.ops.swap import lean
from fedofa.finetune.ops.sweeps import Sweep, channel_sums

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPES = [(2, 8, 100, 101), (3, 1, 200, 200), (5, 300, 13, 17), (2, 70000, 1, 1), (1, 24, 64, 64)]


def maps(shape, layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).contiguous(memory_format=layout)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("examples_differ", [True, False])
def test_the_parts_cover_every_value_once(shape, layout, examples_differ):
    x = maps(shape, layout)
    count = torch.zeros_like(x)
    sweep = Sweep(x, examples_differ=examples_differ)
    buffer = sweep.buffer(x)
    for _, (part,) in sweep.parts(count):
        assert part.shape[0] <= buffer.shape[0]
        assert part.shape[1] == buffer.shape[1]
        part.add_(1)
    assert torch.equal(count, torch.ones_like(x))
    torch.testing.assert_close(channel_sums(x), x.sum((0, 2, 3)), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("examples", [1, None])
def test_an_affine_map_of_channels(shape, layout, examples):
    x = maps(shape, layout)
    scale, shift = (maps((examples or shape[0], shape[1], 1, 1), LAYOUTS[0], seed) for seed in (1, 2))
    expected = x * scale + shift
    found = affine(x, scale, shift, in_place=False)
    assert found.stride() == x.stride()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert affine(x, scale, shift, in_place=True).data_ptr() == x.data_ptr()
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)


def test_a_view_into_other_memory_is_walked_where_it_lies():
    whole = torch.zeros(4, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    affine(whole[1:3], torch.ones(1, 8, 1, 1), torch.ones(1, 8, 1, 1), in_place=True)
    assert whole.sum((1, 2, 3)).tolist() == [0, 200, 200, 0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_batch_norms_gradients_over_many_parts(training, layout, mean):
    """A mean far from 0 included: sums are taken of the centred input."""
    norm = nn.BatchNorm2d(24, momentum=0.0).double().train(training)
    norm.running_mean.fill_(mean)
    x = (maps((4, 24, 61, 67), layout) + mean).requires_grad_()
    grad = maps((4, 24, 61, 67), layout, 1)
    inputs = (x, norm.weight, norm.bias)
    expected = torch.autograd.grad(norm(x), inputs, grad)
    with lean(norm):
        found = torch.autograd.grad(norm(x), inputs, grad)
    for value, wanted in zip(found, expected, strict=True):
        assert (value - wanted).norm() <= 1e-10 * wanted.norm()
