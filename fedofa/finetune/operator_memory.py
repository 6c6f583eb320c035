"""What one operator takes in a training step: it is run alone on the meta device, every tensor's life is followed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedofa.device.allocator import resident_bytes
from fedofa.device.operators import Operator
from fedofa.finetune.engine import planned
from fedofa.finetune.holding import held_bytes
from fedofa.finetune.memory import LiveBytes
from fedofa.finetune.ops.codes import bit_table
from fedofa.finetune.trainer import label_objective
from fedofa.supernet.layers import Linear, build_part
from fedofa.types.plan import FineTunePlan

BLOCK = "block"
"""The name of the operator's layers in a `Treatment`'s plan."""
_NORM_EPS = 1e-5
PLAIN, INNERMOST, LOOSE = 0, 1, 2
"""Layouts of maps: width innermost; channels innermost; so too, of one example, with a stride from one example to the
next that is none of that layout's, by which torch's max pooling takes it for the first."""


@dataclass(frozen=True, slots=True)
class Treatment:
    """What a step does to an operator.

    Args:
        plan: what trains in it, its parameters' names beginning with `BLOCK`, and the levers.
        reached: whether something trains before it, so that its input has a gradient.
        batch: examples that go through at a time.
        accumulates: whether gradients are added to those of an earlier micro-batch.
        layout: of its input, `PLAIN`, `INNERMOST` or `LOOSE`.
        innermost: whether the gradient of its result has channels innermost; behind a mean over the map it has not.
            Both layouts decide what operations compute gradients by.
    """

    plan: FineTunePlan
    reached: bool
    batch: int
    accumulates: bool
    layout: int
    innermost: bool


@dataclass(frozen=True, slots=True)
class OperatorTrace:
    """What an operator takes, in bytes as the allocator counts them.

    Args:
        inner_bytes: kept for the backward pass beside input and result.
        input_bytes: its input.
        keeps_input, keeps_result: whether it keeps them.
        forward_bytes: the most that its forward pass has at a time, its input included.
        backward_bytes: the most that its backward pass has at a time, with what it keeps and, unless they are
            accumulated, the gradients of its parameters; 0 where none comes to it.
        gradient_bytes: of what trains.
        weight_bytes: parameters and statistics as received, and the model's copies of some.
        kernels: its distinct convolutions, each as a text that names it.
        resizes: whether maps are resized.
        gives: the layout of its result.
        passes_innermost: whether the gradient of its input has channels innermost.
    """

    inner_bytes: int
    input_bytes: int
    keeps_input: bool
    keeps_result: bool
    forward_bytes: int
    backward_bytes: int
    gradient_bytes: int
    weight_bytes: int
    kernels: frozenset[str]
    resizes: bool
    gives: int
    passes_innermost: bool


class _Given(torch.autograd.Function):
    """An operator's input, whose gradient comes to nothing: nobody holds on to either."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, shape: tuple[int, int, int, int], layout: int, layouts: list[bool]) -> Tensor:
        ctx.layouts = layouts
        x = torch.empty(shape, device=anchor.device)
        x = x if layout == PLAIN else x.contiguous(memory_format=torch.channels_last)
        _, channels, _, width = shape
        return x.as_strided(shape, (channels, 1, channels * width, channels)) if layout == LOOSE else x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.layouts.append(_is_innermost(gradient))
        return gradient.new_empty(1), None, None, None


class _Taken(torch.autograd.Function):
    """What follows an operator: gives a gradient of its result, and keeps nothing of it."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, innermost: bool) -> Tensor:
        ctx.shape, ctx.innermost = result.shape, innermost and result.dim() == 4
        return result.new_empty(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        layout = torch.channels_last if ctx.innermost else torch.contiguous_format
        return torch.empty(ctx.shape, device=gradient.device, memory_format=layout), None


def trace_operator(
    operator: Operator, treatment: Treatment, dropout: float = 0.0, label_smoothing: float = 0.0
) -> OperatorTrace:
    """Run an operator for one micro-batch; nothing is computed.

    Args:
        operator: a block, or the classifier, whose result is the loss.
        treatment: what the step does to it.
        dropout: probability of the dropout before the classifier; label_smoothing: of its loss.
    """
    block = _layers(operator, dropout)
    batch, plan = treatment.batch, treatment.plan
    weights = held_bytes(block.state_dict(), plan)
    anchor = torch.zeros(1, device="meta", requires_grad=treatment.reached)
    bit_table(anchor.dtype, anchor.device)  # a process makes it once, for whatever needs it first
    labels, order = torch.zeros(batch, dtype=torch.int64, device="meta"), torch.arange(batch)
    shape, layouts = (batch, operator.in_channels, operator.in_side, operator.in_side), []
    objective = label_objective(labels, label_smoothing)
    with planned(block, plan, torch.Generator().manual_seed(0)) as parameters:
        if treatment.accumulates:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        known = [anchor, labels, order, *block.parameters(), *block.buffers(), *parameters]
        known += [parameter.grad for parameter in parameters if parameter.grad is not None]
        with LiveBytes(known) as live:
            x = _Given.apply(anchor, shape, treatment.layout, layouts)
            given = live.live
            live.peak = given
            y = block(x)
            gives = _layout_of(y)
            if operator.is_classifier:
                y = objective(y, order)
            forward, before = live.peak, live.live
            loss = _Taken.apply(y, treatment.innermost)
            held = live.live
            del x
            keeps_input = live.live == held
            without = live.live
            result = y.untyped_storage().nbytes()
            del y
            keeps_result = live.live == without
            inner = live.live - (held - before)
            inner -= given * keeps_input + resident_bytes(result) * keeps_result
            backward = 0
            if loss.requires_grad:
                live.peak = live.live
                loss.backward()
                backward = live.peak
            del loss
        gradients = sum(resident_bytes(item.grad.nbytes) for item in parameters if item.grad is not None)
    return OperatorTrace(
        *(inner, given, keeps_input, keeps_result, forward, backward, gradients, weights),
        frozenset(map(str, live.kernels)),
        live.resizes,
        gives,
        all(layouts),
    )


def _layout_of(x: Tensor) -> int:
    if not _is_innermost(x):
        return PLAIN
    return LOOSE if len(x) == 1 and x.stride(0) < x.numel() else INNERMOST


def _is_innermost(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def parameter_names(operator: Operator) -> frozenset[str]:
    """The names of what can train in the operator's layers."""
    if operator.is_classifier:
        return frozenset({f"{BLOCK}.weight", f"{BLOCK}.bias"})
    named = replace(operator.part, name=BLOCK)
    return frozenset(item.name for item in named.parameters(operator.norm) if item.role != "statistic")


def _layers(operator: Operator, dropout: float) -> nn.Module:
    """The operator's layers under the name `BLOCK`, with tensors of their own."""
    if operator.is_classifier:
        linear = Linear(operator.in_channels, operator.out_channels, device="meta")
        return nn.Sequential(OrderedDict({"flatten": nn.Flatten(), "dropout": nn.Dropout(dropout), BLOCK: linear}))
    part = replace(operator.part, name=BLOCK)
    return nn.Sequential(OrderedDict({BLOCK: copy.deepcopy(build_part(part, operator.norm, _NORM_EPS))}))
