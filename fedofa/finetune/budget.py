"""The most valuable plan that trains a subnet within a memory budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from fedofa.finetune.inputs import ImageForm
from fedofa.finetune.memory import TrainingMemory, training_memory
from fedofa.finetune.plans import build_plan, choose_segments
from fedofa.finetune.recipe import LocalTraining, largest_batch
from fedofa.finetune.sparse import Contributions
from fedofa.supernet.base import Supernet
from fedofa.supernet.costs import BlockCost
from fedofa.types.errors import ConfigError, InfeasibilityError
from fedofa.types.plan import FineTunePlan
from fedofa.types.space import SubnetConfig

KINDS = ("full", "last_blocks(4)", "bias", "head")


@dataclass(frozen=True, slots=True)
class BudgetedPlan:
    """A plan that fits, the memory that training under it takes, and why no better one was taken."""

    plan: FineTunePlan
    memory: TrainingMemory
    reason: str


class BudgetError(InfeasibilityError):
    """No plan fits a memory budget; `smallest_bytes` is the smallest budget that one would fit."""

    def __init__(self, message: str, smallest_bytes: int) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


def plan_for_budget(
    supernet: Supernet,
    subnet: SubnetConfig,
    training: LocalTraining,
    num_examples: int,
    form: ImageForm,
    memory_bytes: int,
    *,
    kinds: Sequence[str] = KINDS,
    statistics: str = "frozen",
    contributions: Contributions | None = None,
) -> BudgetedPlan:
    """The first kind of plan that fits at all, with the levers that cost it the least time.

    Operations are lean in every plan. The largest micro-batch that fits is taken, of the batch and its halves; the
    optimiser's step is fused in all but the whole batch, where the recipe allows it, since that costs nothing there.
    Where the smallest does not fit, the step is fused in any case; then checkpointed segments come to it; then
    activations of 16 and of 8 bits, which are no longer exact.

    Args:
        training: the recipe, whose batch size the gradients are those of.
        num_examples: of the client; all of them lie in memory.
        form: of the examples, resized to what the subnet takes.
        memory_bytes: for training, left after the engine's own floor.
        kinds: what may train, the most valuable first (see `build_plan`).
        statistics: batch norm's mode.
        contributions: of the supernet's layers; only "sparse" kinds need them.

    Raises:
        ConfigError: when there are no kinds, or "sparse" lacks contributions.
        BudgetError: when nothing fits; it names the smallest budget that would do.
    """
    if not kinds:
        raise ConfigError("plan_for_budget, kinds: expected at least one kind of plan, found none")
    search = _Search(supernet.structure(subnet), training, num_examples, form, memory_bytes, [])
    batch = largest_batch(num_examples, training.batch_size)
    blocks = supernet.block_costs(subnet)
    for kind in kinds:
        plan = build_plan(kind, blocks, statistics=statistics, lean=True, contributions=contributions)
        ladder = _Ladder(plan, blocks, training, batch)
        found = search.largest(ladder.batches()) or search.first(ladder.tighter())
        if found is not None:
            return found
    least, name = min(search.refused)
    raise BudgetError(
        f"no plan trains this subnet of {subnet.family!r} in {memory_bytes:,} bytes; plan {name!r} would in "
        f"{least:,}: give it that much, or take a smaller subnet",
        least,
    )


@dataclass(frozen=True, slots=True)
class _Ladder:
    """The plans that train what a lean plan does, for a subnet's blocks, a recipe and a batch."""

    plan: FineTunePlan
    blocks: Sequence[BlockCost]
    training: LocalTraining
    batch: int

    def batches(self) -> list[FineTunePlan]:
        """Plans with ever larger micro-batches, the whole batch last."""
        sizes = [self.batch >> shift for shift in range(1, self.batch.bit_length())] if self._divides else []
        fused = self._fuses
        return [*(replace(self.plan, micro_batch=size, fused_step=fused) for size in reversed(sizes)), self.plan]

    def tighter(self) -> Iterator[FineTunePlan]:
        """What takes less than the smallest micro-batch, at more and more cost."""
        plan = self.batches()[0]
        if self._fuses and not plan.fused_step:
            plan = replace(plan, fused_step=True)
            yield plan
        segments = choose_segments(self.blocks, plan.changes)
        if segments:
            plan = replace(plan, recompute=segments)
            yield plan
        yield replace(plan, kept="bfloat16")
        yield replace(plan, kept="int8")

    @property
    def _fuses(self) -> bool:
        return not self.training.against_fusing

    @property
    def _divides(self) -> bool:
        return self.plan.statistics == "frozen" or not any(block.num_statistics for block in self.blocks)


@dataclass(frozen=True, slots=True)
class _Search:
    """Tries plans of one subnet and client; `refused` are those that did not fit: what they take, and their names."""

    structure: nn.Module
    training: LocalTraining
    num_examples: int
    form: ImageForm
    memory_bytes: int
    refused: list[tuple[int, str]]

    def largest(self, growing: Sequence[FineTunePlan]) -> BudgetedPlan | None:
        """The last of them that fits, where each takes more than the one before; those beyond it are not tried."""
        best = None
        for plan in growing:
            found = self._fit(plan)
            if found is None:
                break
            best = found
        return best if best is None else replace(best, reason=self._reason())

    def first(self, plans: Iterator[FineTunePlan]) -> BudgetedPlan | None:
        """The first of them that fits."""
        found = next((fit for plan in plans if (fit := self._fit(plan)) is not None), None)
        return found if found is None else replace(found, reason=self._reason())

    def _fit(self, plan: FineTunePlan) -> BudgetedPlan | None:
        memory = training_memory(self.structure, plan, self.training, self.num_examples, self.form)
        if memory.total_bytes > self.memory_bytes:
            self.refused.append((memory.total_bytes, _described(plan)))
            return None
        return BudgetedPlan(plan, memory, "")

    def _reason(self) -> str:
        if not self.refused:
            return "nothing better is known"
        size, name = self.refused[-1]
        return f"{name} would take {size:,} of {self.memory_bytes:,} bytes"


def _described(plan: FineTunePlan) -> str:
    """A plan's kind and levers, for people."""
    words = [plan.name]
    if plan.micro_batch:
        words.append(f"micro-batches of {plan.micro_batch}")
    words += ["fused step"] * plan.fused_step + ["segments"] * bool(plan.recompute)
    words += [plan.kept] * (plan.kept != "float32")
    return ", ".join(words)
