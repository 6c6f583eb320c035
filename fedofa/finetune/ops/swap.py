"""Puts the lean operations into a module without its knowing, and takes them out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from fedofa.finetune.ops.convolution import ConvGeometry
from fedofa.finetune.ops.gate import gated
from fedofa.finetune.ops.kept import Keeper
from fedofa.finetune.ops.parts import ACTIVATIONS, build_norm
from fedofa.finetune.ops.pooling import average_pool, is_plain, max_pool
from fedofa.finetune.ops.unit import Unit
from fedofa.supernet.layers import ConvNormAct, SqueezeExcite

Forward = Callable[[Tensor], Tensor]


@contextmanager
def lean(model: nn.Module, keeper: Keeper | None = None, *, codes_swish: bool = False) -> Iterator[None]:
    """Within the context the model computes with operations that keep only what their gradients need.

    Parameters, their names and the model's results stay as they are. What is needed is decided in every forward pass,
    from which tensors require a gradient. Layers that there is no lean operation for compute as before; so does a batch
    norm whose mode changes within the context, in its old mode.

    Args:
        model: any module; its batch norms are in the mode that they shall have.
        keeper: the form in which activations are kept; None: as they are.
        codes_swish: keep one byte a value for a hard swish (see `Unit`).
    """
    keeper = keeper or Keeper()
    swapped: list[nn.Module] = []
    try:
        _swap(model, keeper, codes_swish, swapped)
        yield
    finally:
        for module in swapped:
            del module.__dict__["forward"]  # the instance's override; the class's forward shows again


def _swap(module: nn.Module, keeper: Keeper, codes_swish: bool, swapped: list[nn.Module]) -> None:
    forward = _lean_forward(module, keeper, codes_swish)
    if forward is not None:
        module.forward = forward
        swapped.append(module)
    if not isinstance(module, ConvNormAct) or forward is None:
        for child in module.children():
            _swap(child, keeper, codes_swish, swapped)


def _lean_forward(module: nn.Module, keeper: Keeper, codes_swish: bool) -> Forward | None:
    """The lean forward pass of a module; None for one that keeps its own."""
    if "forward" in vars(module):
        return None
    match module:
        case ConvNormAct():
            return _conv_norm_act(module, keeper, codes_swish)
        case SqueezeExcite():
            return lambda x: gated(x, module.expand(module.reduce(x.mean((2, 3), keepdim=True))), keeper)
        case nn.AvgPool2d():
            return partial(average_pool, layer=module)
        case nn.MaxPool2d():
            return partial(max_pool, layer=module) if is_plain(module) else None
        case _:
            unit = _leaf(module, keeper, codes_swish)
            return None if unit is None else _on_maps(unit, module)


def _conv_norm_act(module: ConvNormAct, keeper: Keeper, codes_swish: bool) -> Forward | None:
    """The parts as one unit; None where a part is of another kind, so that each is looked at by itself."""
    if not _is_stock(module.conv):
        return None
    norm = None if module.norm is None else build_norm(module.norm)
    act = None if module.act is None else ACTIVATIONS.get(type(module.act))
    if (norm is None) != (module.norm is None) or (act is None) != (module.act is None):
        return None
    unit = Unit(
        keeper,
        codes_swish,
        zeros=None if module.pad is None else module.pad.zeros,
        conv=geometry_of(module.conv),
        conv_layer=module.conv,
        norm=norm,
        norm_layer=module.norm,
        act=act,
    )
    return (lambda x: x + unit(x)) if module.residual else unit.__call__


def _is_stock(conv: nn.Conv2d) -> bool:
    """Whether it computes with its weight as it is (a `ComposedConv2d` does not)."""
    return type(conv).forward is nn.Conv2d.forward


def _leaf(module: nn.Module, keeper: Keeper, codes_swish: bool) -> Unit | None:
    """The operation of a single layer; None where there is none for it."""
    if type(module) in ACTIVATIONS:
        return Unit(keeper, codes_swish, act=ACTIVATIONS[type(module)])
    if isinstance(module, nn.Conv2d) and _is_stock(module):
        plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return Unit(keeper, codes_swish, conv=geometry_of(module), conv_layer=module) if plain else None
    norm = build_norm(module)
    return None if norm is None else Unit(keeper, codes_swish, norm=norm, norm_layer=module)


def _on_maps(unit: Unit, module: nn.Module) -> Forward:
    """The unit on `(batch, channels, h, w)`; the layer's own forward pass on tensors of another shape."""
    own = type(module).forward
    return lambda x: unit(x) if x.dim() == 4 else own(module, x)


def geometry_of(conv: nn.Conv2d) -> ConvGeometry:
    """The geometry of a convolution whose padding is given in numbers."""
    height, width = conv.padding
    stride, dilation = conv.stride, conv.dilation
    return ConvGeometry((stride[0], stride[1]), (int(height), int(width)), (dilation[0], dilation[1]), conv.groups)
