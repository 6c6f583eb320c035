"""Gradient checkpointing: a run of blocks keeps its input only and runs again in the backward pass.

Own, since the first use of `torch.utils.checkpoint` imports torch's compiler: 70 MB on a board that has no use for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Forward = Callable[[Tensor], Tensor]


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context the blocks, each fed with the result of the one before, are one checkpointed segment.

    The first of them computes the whole segment and the others hand on what they get, so that the model that holds them
    need not know. Torch's default generator is put back for the second run: dropout drops the same values.
    """
    forwards = [block.forward for block in blocks]
    parameters = tuple(parameter for block in blocks for parameter in block.parameters())

    def run(x: Tensor) -> Tensor:
        for forward in forwards:
            x = forward(x)
        return x

    previous = [vars(block).get("forward") for block in blocks]
    blocks[0].forward = lambda x: _Segment.apply(run, x, *parameters) if torch.is_grad_enabled() else run(x)
    for block in blocks[1:]:
        block.forward = _hand_on
    try:
        yield
    finally:
        for block, forward in zip(blocks, previous, strict=True):
            if forward is None:
                del block.forward  # the instance's override; the class's forward shows again
            else:
                block.forward = forward


def _hand_on(x: Tensor) -> Tensor:
    return x


class _Segment(torch.autograd.Function):
    """A run of blocks; its backward pass puts gradients where the parameters hold them, one after the other.

    The parameters are arguments so that the result has a gradient where only they do, and must be as they were. Their
    gradients are not handed on: all of a segment's at once are as large as its weights, and a step that is fused into
    the backward pass lets each go at once.
    """

    @staticmethod
    def forward(ctx, run: Forward, x: Tensor, *parameters: Tensor):
        ctx.run, ctx.random_state = run, torch.get_rng_state()
        ctx.save_for_backward(x, *parameters)
        return run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *_ = ctx.saved_tensors
        x = x.detach().requires_grad_(ctx.needs_input_grad[1])
        state = torch.get_rng_state()
        torch.set_rng_state(ctx.random_state)
        with torch.enable_grad():
            seed = _Seed.apply(ctx.run(x), grad)
        torch.set_rng_state(state)
        seed.backward()
        return None, x.grad, *(None for _ in ctx.needs_input_grad[2:])


class _Seed(torch.autograd.Function):
    """A scalar whose gradient with respect to the tensor is the given one.

    Torch 2.13 imports its symbolic shapes and with them sympy, 31 MB, as soon as a backward pass is given a gradient.
    """

    @staticmethod
    def forward(ctx, y: Tensor, grad: Tensor):
        ctx.save_for_backward(grad)
        return y.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, one: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.saved_tensors[0], None
