"""The most valuable plan that trains a subnet within a memory budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from fedofa.finetune.memory import TrainingMemory, training_memory
from fedofa.finetune.plans import build_plan, choose_segments
from fedofa.finetune.recipe import LocalTraining
from fedofa.finetune.sparse import Contributions
from fedofa.supernet.base import Supernet
from fedofa.supernet.costs import BlockCost
from fedofa.types.errors import ConfigError, InfeasibilityError
from fedofa.types.plan import FineTunePlan
from fedofa.types.space import SubnetConfig

KINDS = ("full", "last_blocks(4)", "bias", "head")


@dataclass(frozen=True, slots=True)
class BudgetedPlan:
    """A plan that fits, and the memory that training under it takes."""

    plan: FineTunePlan
    memory: TrainingMemory


def plan_for_budget(
    supernet: Supernet,
    subnet: SubnetConfig,
    training: LocalTraining,
    num_examples: int,
    input_shape: tuple[int, int, int],
    memory_bytes: int,
    *,
    kinds: Sequence[str] = KINDS,
    statistics: str = "frozen",
    contributions: Contributions | None = None,
) -> BudgetedPlan:
    """The first kind of plan that fits at all, with the levers that cost it the least time.

    Operations are lean in every plan. The largest micro-batch that fits is taken, halved from the batch; where the
    smallest does not, checkpointed segments come to it; then activations of 8 bits, which are no longer exact.

    Args:
        training: the recipe, whose batch size the gradients are those of.
        num_examples: of the client; all of them lie in memory.
        input_shape: `(channels, height, width)` of one example as the subnet takes it.
        memory_bytes: for training, left after the engine's own floor.
        kinds: what may train, the most valuable first (see `build_plan`).
        statistics: batch norm's mode.
        contributions: of the supernet's layers; only "sparse" kinds need them.

    Raises:
        ConfigError: when there are no kinds, or batch norm would take statistics of micro-batches.
        InfeasibilityError: when nothing fits; it names the smallest budget that would do.
    """
    estimate = _Estimate(supernet.build(subnet), training, num_examples, input_shape)
    blocks = supernet.block_costs(subnet)
    least: tuple[int, str] | None = None
    for kind in kinds:
        lean = build_plan(kind, blocks, statistics=statistics, lean=True, contributions=contributions)
        for ladder in _ladders(blocks, lean, min(training.batch_size, num_examples)):
            smallest = estimate.of(ladder[-1])
            if smallest.total_bytes <= memory_bytes:
                return _first_that_fits(ladder, estimate, memory_bytes)
            least = min(least or (smallest.total_bytes, kind), (smallest.total_bytes, kind))
    if least is None:
        raise ConfigError("plan_for_budget, kinds: expected at least one kind of plan, found none")
    raise InfeasibilityError(
        f"no plan trains this subnet of {subnet.family!r} in {memory_bytes:,} bytes; plan {least[1]!r} would in "
        f"{least[0]:,}: give it that much, or take a smaller subnet"
    )


def _first_that_fits(ladder: Sequence[FineTunePlan], estimate: _Estimate, memory_bytes: int) -> BudgetedPlan:
    """The first plan of a ladder whose last one fits; plans take less and less memory along it."""
    for plan in ladder[:-1]:
        memory = estimate.of(plan)
        if memory.total_bytes <= memory_bytes:
            return BudgetedPlan(plan, memory)
    return BudgetedPlan(ladder[-1], estimate.of(ladder[-1]))


def _ladders(blocks: Sequence[BlockCost], lean: FineTunePlan, batch: int) -> Iterator[list[FineTunePlan]]:
    """Rows of plans like a lean one, each plan smaller than the one before; later rows cost more time or exactness."""
    sizes = [size for size in (batch >> shift for shift in range(1, batch.bit_length())) if size]
    if lean.statistics == "batch" and any(block.num_statistics for block in blocks):
        sizes = []
    halved = [lean, *(replace(lean, micro_batch=size) for size in sizes)]
    yield halved
    segments = choose_segments(blocks, lean.changes)
    if segments:
        yield [replace(halved[-1], recompute=segments)]
    yield [replace(halved[-1], recompute=segments, kept="int8")]


class _Estimate:
    """What plans take for one subnet and client; every plan is tried once."""

    def __init__(
        self, model: nn.Module, training: LocalTraining, num_examples: int, input_shape: tuple[int, int, int]
    ) -> None:
        self._model, self._shape = model, input_shape
        self._training, self._num_examples = training, num_examples
        self._known: dict[FineTunePlan, TrainingMemory] = {}

    def of(self, plan: FineTunePlan) -> TrainingMemory:
        """The memory that the plan takes."""
        if plan not in self._known:
            self._known[plan] = training_memory(self._model, plan, self._training, self._num_examples, self._shape)
        return self._known[plan]
