"""A map times one factor a channel, the end of squeeze-excite; the map is kept where it cannot be had otherwise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedofa.finetune.ops.kept import Keeper, Kept, as_is
from fedofa.finetune.ops.recipes import Shelf, recipe_of, set_recipe, take


def gated(x: Tensor, gate: Tensor, keeper: Keeper) -> Tensor:
    """`x * gate`, for `(batch, channels, h, w)` and `(batch, channels, 1, 1)`.

    The map is needed for the gate's gradient alone. Nobody needs to keep the product: where the map is kept or can be
    computed again, so can the product.
    """
    if not (torch.is_grad_enabled() and (x.requires_grad or gate.requires_grad)):
        return x * gate
    kept = recipe_of(x) or (keeper.keep(x) if gate.requires_grad else None)
    product = _Gated.apply(kept, x, gate)
    return product if kept is None else set_recipe(product, _recipe(kept, gate.detach()))


def _recipe(kept: Kept, gate: Tensor) -> Kept:
    restore_x, fresh = kept.restore, kept.fresh

    def restore(tensors: tuple[Tensor, ...]) -> Tensor:
        x = restore_x(tensors[:-1])
        return x.mul_(tensors[-1]) if fresh else x * tensors[-1]

    return Kept((*kept.tensors, gate), restore, fresh=True)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kept: Kept | None, x: Tensor, gate: Tensor):
        shelf = Shelf()
        ctx.gate = shelf.put(as_is(gate))
        ctx.x = shelf.put(kept) if kept is not None and ctx.needs_input_grad[2] else None
        ctx.save_for_backward(*shelf.tensors)
        return x * gate

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = ctx.saved_tensors
        x, for_gate = take(saved, ctx.x), None
        if x is not None:
            for_gate = (x.mul_(grad) if ctx.x[2].fresh else x * grad).sum((2, 3), keepdim=True)
        return None, grad * take(saved, ctx.gate) if ctx.needs_input_grad[1] else None, for_gate
