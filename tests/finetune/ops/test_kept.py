"""Forms in which activations are kept, and the bits and bytes for derivatives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from fedofa.finetune.ops.codes import (
    gradient_inside,
    gradient_swish,
    pack_bits,
    pack_inside,
    pack_swish,
    unpack_bits,
)
from fedofa.finetune.ops.kept import Keeper
from fedofa.types.errors import ConfigError

X = torch.randn(3, 16, 9, 7, generator=torch.Generator().manual_seed(0)) * 3
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.lists(st.booleans(), max_size=40))
def test_bits_round_trip_in_an_eighth_of_the_bytes(values):
    packed = pack_bits(torch.tensor(values, dtype=torch.bool))
    assert packed.numel() == -(-len(values) // 8)
    assert unpack_bits(packed, len(values)).tolist() == values


@pytest.mark.parametrize("upper", [None, 6.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (2, 8, 5, 5), (3, 64, 40, 40)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bit_says_where_a_clamp_has_a_derivative(upper, shape, layout):
    x = (torch.randn(shape, generator=generator()) * 4).contiguous(memory_format=layout)
    grad = torch.randn(shape, generator=generator(1)).contiguous(memory_format=layout)
    result = x.clamp(0.0, upper)
    packed = pack_inside(result, upper)
    assert packed.nbytes == -(-x.numel() // 8)
    inside = (x > 0) & (x < (upper or torch.inf))
    assert torch.equal(gradient_inside(grad, packed, 0.25), grad * inside * 0.25)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_byte_gives_hard_swishs_derivative_to_a_254th(layout):
    x = torch.linspace(-4, 4, 80_000).view(2, 8, 50, 100).contiguous(memory_format=layout).requires_grad_()
    grad = torch.ones_like(x)
    (expected,) = torch.autograd.grad(functional.hardswish(x), x, grad)
    packed = pack_swish(x.detach())
    found = gradient_swish(grad, packed)
    assert packed.nbytes == x.numel()
    assert found.stride() == x.stride()
    assert (found - expected).abs().max() <= 1 / 254 + 1e-6
    assert torch.equal(found[x < -3], torch.zeros_like(found[x < -3]))
    assert torch.equal(found[x >= 3], torch.ones_like(found[x >= 3]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("form", "bits"), [("float32", 32), ("bfloat16", 16), ("int8", 8), ("int4", 4)])
def test_each_form_has_its_bits_layout_and_error(layout, form, bits):
    x = X.contiguous(memory_format=layout)
    kept = Keeper(form, generator=generator()).keep(x)
    found = kept.restore(kept.tensors)
    groups = -(-x.numel() // 256)
    assert sum(item.nbytes for item in kept.tensors) <= groups * (256 * bits // 8 + 8)
    assert (found.shape, found.stride(), found.dtype) == (x.shape, x.stride(), x.dtype)
    steps = {"float32": 0, "bfloat16": 2.0**-8 * x.abs().max()}
    largest_step = (x.max() - x.min()) / (2**bits - 1)
    assert (found - x).abs().max() <= steps.get(form, largest_step) * 1.001
    assert kept.fresh == (form != "float32")


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_rounding_is_right_on_average_and_drawn_from_the_generator(form):
    x = torch.rand(1, 256, generator=generator(5)).repeat(4000, 1)
    kept = Keeper(form, generator=generator()).keep(x)
    found = kept.restore(kept.tensors)
    step = 1 / (255 if form == "int8" else 15)
    assert ((found - x).mean(0)).abs().max() <= 5 * step / 2 / 4000**0.5
    again = Keeper(form, generator=generator()).keep(x)
    other = Keeper(form, generator=generator(1)).keep(x)
    assert all(torch.equal(a, b) for a, b in zip(kept.tensors, again.tensors, strict=True))
    assert not torch.equal(kept.tensors[0], other.tensors[0])


@pytest.mark.parametrize("value", [0.0, -2.5])
def test_constant_groups_come_back(value):
    x = torch.full((3, 100), value)
    kept = Keeper("int4", generator=generator()).keep(x)
    torch.testing.assert_close(kept.restore(kept.tensors), x)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.999])
def test_pruning_keeps_the_largest_values_exactly(fraction):
    kept = Keeper(fraction=fraction).keep(X)
    found = kept.restore(kept.tensors)
    count = int((found != 0).sum())
    assert fraction * X.numel() <= count < fraction * X.numel() + 1
    assert torch.equal(found[found != 0], X[found != 0])
    assert X[found == 0].abs().max() <= X[found != 0].abs().min()
    assert sum(item.nbytes for item in kept.tensors) == 4 * count + -(-X.numel() // 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "int2"}, "expected one of .* found 'int2'"),
        ({"fraction": 0.0}, r"expected a number in \(0, 1\], found 0.0"),
        ({"form": "bfloat16", "fraction": 0.5}, "pruned ones are kept as float32"),
        ({"form": "int8"}, "rounds at random and needs a generator"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Keeper(**settings)


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_pruning_keeps_as_many_as_it_says_among_equal_magnitudes_of_many_chunks(fraction):
    x = torch.ones(200_000)
    x[::2] *= -1
    x[:10] = 3.0
    kept = Keeper(fraction=fraction).keep(x)
    found = kept.restore(kept.tensors)
    assert int((found != 0).sum()) == fraction * x.numel() == len(kept.tensors[0])
    assert torch.equal(found[found != 0], x[found != 0])
    assert torch.equal(found[:10], x[:10])


@pytest.mark.parametrize(
    "settings", [{"form": "int8"}, {"form": "int4"}, {"form": "bfloat16"}, {"fraction": 0.3}], ids=str
)
def test_what_is_kept_of_a_tensor_with_a_history_has_none(settings):
    x = torch.randn(300, generator=generator(), requires_grad=True) * 2
    kept = Keeper(**settings, generator=generator()).keep(x)
    assert not any(item.requires_grad for item in (*kept.tensors, kept.restore(kept.tensors)))
