"""Tensors that can be computed again from what is kept anyway carry the recipe, so that nobody keeps them too."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fedofa.finetune.ops.kept import Kept

_RECIPE = "_fedofa_recipe"


def recipe_of(x: Tensor) -> Kept | None:
    """How to compute a tensor again; None where that is not known, or where it was written to since."""
    version, recipe = getattr(x, _RECIPE, (None, None))
    return recipe if version == x._version else None


def set_recipe(x: Tensor, recipe: Kept | None) -> Tensor:
    """Attach a recipe, where there is one, to the tensor as it is now; returns the tensor."""
    if recipe is not None:
        setattr(x, _RECIPE, (x._version, recipe))
    return x


Ticket = tuple[int, int, Kept]


class Shelf:
    """What one operation saves: all tensors in one row, as autograd wants them, and a ticket for each thing."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def put(self, kept: Kept) -> Ticket:
        """Add what is kept. The ticket itself holds no tensor."""
        start = len(self.tensors)
        self.tensors.extend(kept.tensors)
        return start, len(self.tensors), Kept((), kept.restore, kept.fresh)


def take(saved: tuple[Tensor, ...], ticket: Ticket | None) -> Any:
    """What a ticket stands for, restored from what was saved; None without a ticket."""
    return None if ticket is None else ticket[2].restore(saved[ticket[0] : ticket[1]])
