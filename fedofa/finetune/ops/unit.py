"""Convolution, norm and activation as one differentiable operation that keeps only what its gradients need.

What that is depends on what trains. A convolution's input is needed for its weight's gradient alone; a norm's input for
its weight's gradient, and where it normalises with statistics of that input; an activation's derivative is computed
from the norm's input where that is kept, and otherwise kept as one bit a value. The result itself is not kept for the
next convolution where it can be computed from the norm's input again (see `recipes`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fedofa.finetune.ops.codes import dense, like
from fedofa.finetune.ops.convolution import ConvGeometry
from fedofa.finetune.ops.kept import Keeper, Kept, as_is
from fedofa.finetune.ops.parts import Activation, FrozenBatchNorm, Gradients, Norm, affine
from fedofa.finetune.ops.recipes import Shelf, Ticket, recipe_of, set_recipe, take
from fedofa.finetune.ops.sweeps import channel_sums

Zeros = Callable[[int, int], tuple[int, int, int, int]]
"""The zeros left, right, above and below of a map of that height and width."""

Parameters = tuple[Any, ...]
"""Weight and bias of the convolution, weight and bias of the norm; tensors, or None where there is none."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What one operation is made of, each where it is not None: padding, convolution, norm, activation.

    Args:
        keeper: the form in which it keeps activations.
        codes_swish: a hard swish whose input is not kept anyway keeps one byte a value instead of the input, with which
            its gradient is right to 1/254 of the result's.
        conv, conv_layer: the convolution, and the layer whose parameters it uses.
        norm, norm_layer: the norm likewise.
    """

    keeper: Keeper
    codes_swish: bool
    zeros: Zeros | None = None
    conv: ConvGeometry | None = None
    conv_layer: nn.Conv2d | None = None
    norm: Norm | None = None
    norm_layer: nn.Module | None = None
    act: Activation | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """`(batch, in_channels, h, w)` to `(batch, out_channels, h', w')`."""
        conv, norm = self.conv_layer, self.norm_layer
        weight, bias = (None, None) if conv is None else (conv.weight, conv.bias)
        scale, shift = (None, None) if norm is None else (norm.weight, norm.bias)
        recipes: list[Kept] = []
        if torch.is_grad_enabled():
            y = _Unit.apply(self, recipes, recipe_of(x), x, weight, bias, scale, shift)
            return set_recipe(y, recipes[0]) if recipes else y
        return self.run(x, (weight, bias, scale, shift), _Wants(), None)[0]

    def padded(self, x: Tensor) -> Tensor:
        """The convolution's input with its zeros around it."""
        zeros = (0, 0, 0, 0) if self.zeros is None else self.zeros(*x.shape[2:])
        return functional.pad(x, zeros) if any(zeros) else x

    def folds(self, wants: _Wants) -> FrozenBatchNorm | None:
        """The norm that becomes part of the convolution: batch norm with frozen statistics, where neither the
        convolution's parameters nor the norm's weight train. Its bias may: that is the folded convolution's own.
        """
        trains = wants.weight or wants.bias or wants.scale
        return self.norm if isinstance(self.norm, FrozenBatchNorm) and self.conv is not None and not trains else None

    def keeps_inner(self, wants: _Wants, norm: Norm | None, recipe: Kept | None) -> bool:
        """Whether the norm's input (without a norm: the activation's) is kept."""
        if not wants.any:
            return False
        if norm is not None and norm.keeps_input(input_trains=wants.inner, weight_trains=wants.scale):
            return True
        if self.act is None:
            return False
        return (self.conv is None and recipe is not None) or not (self.act.is_clamp or self.codes_swish)

    def run(self, x: Tensor, parameters: Parameters, wants: _Wants, recipe: Kept | None) -> tuple[Tensor, _Run]:
        """The forward pass; `recipe` is the input's. The result is a new tensor; with it comes what was kept."""
        weight, bias, scale, shift = parameters
        run, norm, folding = _Run(), self.norm, self.folds(wants)
        if folding is not None:
            factor, offset, *_ = folding.coefficients(scale, shift)
            weight, bias, norm = folded(weight, factor), _folded_bias(bias, factor, offset), None
            run.factor = run.shelf.put(as_is(factor)) if wants.inner else None
        inner, own = (dense(x), False) if self.conv is None else (self.conv.forward(self.padded(x), weight, bias), True)
        if wants.weight:
            run.input = run.shelf.put(recipe or self.keeper.keep(x))
        kept = None
        if self.keeps_inner(wants, norm, recipe):
            kept = recipe if self.conv is None and recipe is not None else self.keeper.keep(inner)
            own = own and not (self.keeper.is_exact)
            run.inner = run.shelf.put(kept)
        y, coefficients = inner, None
        coded = wants.any and kept is None and self.act is not None
        if norm is not None:
            act = None if coded else self.act
            (y, coefficients), own = norm.forward(inner, scale, shift, act, in_place=own), True
            run.coefficients = run.shelf.put(Kept(coefficients, tuple, fresh=False)) if wants.any else None
        if self.act is not None and (coded or norm is None):
            code = self.act.pack(y, y) if coded and not self.act.is_clamp else None
            y = self.act.apply(y, own)
            code = self.act.pack(y, y) if coded and self.act.is_clamp else code
            run.code = None if code is None else run.shelf.put(as_is(code))
        run.stride = y.stride()
        if kept is not None:
            run.recipe = self._recipe(kept, () if coefficients is None else coefficients[:2])
        return y, run

    def _recipe(self, kept: Kept, coefficients: tuple[Tensor, ...]) -> Kept:
        """How to compute the result from what is kept of the norm's input."""
        count, act = len(kept.tensors), self.act

        def restore(tensors: tuple[Tensor, ...]) -> Tensor:
            y, fresh = kept_again.restore(tensors[:count]), kept_again.fresh
            if len(tensors) > count:
                return affine(y, tensors[count], tensors[count + 1], act, in_place=fresh)
            return y if act is None else act.apply(y, fresh)

        kept_again = Kept((), kept.restore, kept.fresh)
        return Kept((*kept.tensors, *coefficients), restore, fresh=True)


@dataclass(frozen=True, slots=True)
class _Wants:
    """Whose gradients are wanted: the input's, and the parameters' (`Parameters`)."""

    input: bool = False
    weight: bool = False
    bias: bool = False
    scale: bool = False
    shift: bool = False

    @property
    def inner(self) -> bool:
        """Whether the gradient of the convolution's result is needed."""
        return self.input or self.weight or self.bias

    @property
    def any(self) -> bool:
        """Whether there is a backward pass at all."""
        return self.inner or self.scale or self.shift


class _Run:
    """One forward pass: what it put on its shelf, and the tickets of it."""

    __slots__ = ("code", "coefficients", "factor", "inner", "input", "recipe", "shelf", "stride")

    def __init__(self) -> None:
        self.shelf = Shelf()
        self.stride: tuple[int, ...] = ()
        self.input: Ticket | None = None
        self.inner: Ticket | None = None
        self.coefficients: Ticket | None = None
        self.factor: Ticket | None = None
        self.code: Ticket | None = None
        self.recipe: Kept | None = None


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, unit: Unit, recipes: list[Kept], recipe: Kept | None, x: Tensor, *parameters: Tensor | None):
        ctx.wants = _Wants(*ctx.needs_input_grad[3:])
        result, run = unit.run(x, parameters, ctx.wants, recipe)
        if run.recipe is not None:
            recipes.append(run.recipe)
        ctx.unit, ctx.run, ctx.shape = unit, run, x.shape
        weight, _, scale, _ = parameters
        ctx.weight = None if not ctx.wants.inner or weight is None else run.shelf.put(as_is(weight))
        ctx.scale = None if scale is None else run.shelf.put(as_is(scale))
        ctx.save_for_backward(*run.shelf.tensors)
        run.recipe, run.shelf = None, Shelf()  # the context holds tickets, autograd the tensors
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        unit, run, wants, saved = ctx.unit, ctx.run, ctx.wants, ctx.saved_tensors
        grad = like(grad, run.stride)  # torch gives the gradient of a mean spread out with strides 0
        grad, scale, shift = _inner_gradient(ctx, saved, grad)
        weight = bias = None
        if unit.conv is None:
            return None, None, None, grad if wants.input else None, None, None, scale, shift
        bias = channel_sums(grad) if wants.bias else None
        kernel = take(saved, ctx.weight)
        if wants.weight:
            weight = unit.conv.weight_gradient(grad, unit.padded(take(saved, run.input)), kernel)
        if wants.input:
            kernel = kernel if run.factor is None else folded(kernel, take(saved, run.factor))
            grad = _input_gradient(unit, unit.conv, grad, kernel, ctx.shape)
        return None, None, None, grad if wants.input else None, weight, bias, scale, shift


def _inner_gradient(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> Gradients:
    """The gradients of the convolution's result, and of the norm's weight and bias, from that of the unit's result."""
    unit, run, wants = ctx.unit, ctx.run, ctx.wants
    inner, coefficients = take(saved, run.inner), take(saved, run.coefficients)
    normed = coefficients is not None
    if normed and unit.norm.keeps_input(input_trains=wants.inner, weight_trains=wants.scale):
        wanted = (wants.inner, wants.scale, wants.shift)
        free = run.inner[2].fresh or unit.conv is not None  # nobody reads the convolution's result after this
        return unit.norm.gradients(grad, inner, take(saved, ctx.scale), coefficients, unit.act, wanted, in_place=free)
    if unit.act is not None and inner is None:
        grad = unit.act.coded_gradient(grad, take(saved, run.code))
    elif unit.act is not None:
        y = affine(inner, *coefficients[:2], in_place=False) if normed else inner
        grad = unit.act.gradient(grad, y, None)
    shift = channel_sums(grad) if wants.shift else None
    if normed and wants.inner:
        grad = grad * coefficients[0] if unit.act is None else grad.mul_(coefficients[0])
    return grad, None, shift


def folded(weight: Tensor, factor: Tensor) -> Tensor:
    """A convolution's weight with every output channel times the norm's factor `(1, out_channels, 1, 1)`."""
    return weight * factor.view(-1, 1, 1, 1)


def _folded_bias(bias: Tensor | None, factor: Tensor, offset: Tensor) -> Tensor:
    """The bias of the folded convolution, `(out_channels,)`."""
    return (offset if bias is None else torch.addcmul(offset, factor, bias.view(factor.shape))).view(-1)


def _input_gradient(unit: Unit, conv: ConvGeometry, grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of the input of that shape, without the zeros around it."""
    if unit.zeros is None:
        return conv.input_gradient(grad, weight, shape)
    left, right, top, bottom = unit.zeros(*shape[2:])
    height, width = shape[2:]
    padded = torch.Size((*shape[:2], height + top + bottom, width + left + right))
    return conv.input_gradient(grad, weight, padded)[:, :, top : top + height, left : left + width]
