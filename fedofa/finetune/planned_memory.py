"""What training takes thousands of subnets at once: each operator's step is followed once, subnets are put together.

A block's tensors live and die the same way wherever it stands. What `memory.training_memory` finds for a whole subnet
is therefore a running sum, along its places, of what `operator_memory.trace_operator` finds for its operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from fedofa.device.allocator import resident_bytes
from fedofa.device.cost import LocalWork
from fedofa.device.models import MEGABYTE, SubnetCostModel
from fedofa.device.operators import Operator, SubnetBatch
from fedofa.device.training import PlannedBatch, PlannedPlaces
from fedofa.finetune.kept_traces import trace_key
from fedofa.finetune.memory import KERNEL_BYTES, PROCESS_BYTES, RESIZING_BYTES, part_sizes
from fedofa.finetune.operator_memory import (
    BLOCK,
    INNERMOST,
    PLAIN,
    OperatorTrace,
    Treatment,
    parameter_names,
    trace_operator,
)
from fedofa.finetune.recipe import LocalTraining, largest_batch
from fedofa.types.plan import FineTunePlan

_WARM_UP = 2000
_UNKNOWN = -1
_WORD = 64
_REACHED, _RECOMPUTED, _INNERMOST, _GIVEN, _FLAGS = 1, 2, 4, 8, 32


@dataclass(frozen=True, slots=True)
class _Table:
    """What every trace says (see `OperatorTrace`), an entry a trace; the first is that of a place which is absent.

    `gives` is the result's layout, `passes` whether the gradient has channels innermost; `kernels` has one bit a
    distinct convolution, uint64 `(num_traces, num_words)`.
    """

    inner: np.ndarray
    given: np.ndarray
    keeps_input: np.ndarray
    keeps_result: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    gradients: np.ndarray
    weights: np.ndarray
    resizes: np.ndarray
    gives: np.ndarray
    passes: np.ndarray
    kernels: np.ndarray


_ABSENT = OperatorTrace(0, 0, False, False, 0, 0, 0, 0, frozenset(), False, INNERMOST, True)


@final
class PlannedTrainingMemory(SubnetCostModel):
    """Peak bytes of training under a plan above the engine's floor, close to what `memory.training_memory` finds.

    Operators are followed when they are first met, some 40 ms of CPU each.

    Args:
        plans: the plan of every subnet, with its levers; it caches no features.
        work: what the device does in a round.

    Attributes:
        traces: of operators that were followed, by `kept_traces.trace_key`; those that are put there are not followed.
    """

    setting, unit = "training_memory_mb", "MB"

    def __init__(self, plans: PlannedPlaces, work: LocalWork) -> None:
        super().__init__(plans.index)
        self.plans, self.work = plans, work
        plan, training = plans.part_plans[0][1], LocalTraining(batch_size=work.batch_size)
        batch = largest_batch(work.num_examples, work.batch_size)
        self._at_a_time = min(plan.micro_batch or batch, batch)
        self._accumulates = self._at_a_time < batch
        self._num_sizes = len(set(part_sizes(plan, training, work.num_examples)))
        self._dropout = self.index.network(self.index.encoding.space.largest()).dropout
        self._chains = [tuple(_chains(name)) for name in self.index.places]
        self.traces: dict[str, OperatorTrace] = {}
        self._numbers: dict[str, int] = {}  # of traces, by their keys
        self._traces = [_ABSENT]
        self._table = _tabulated(self._traces)
        self._trace_of = np.zeros((0, 1, _FLAGS), np.int64)  # by part of a plan, operator (last: none) and what comes
        self._outer, self._input_elements = np.zeros(1, bool), np.zeros(0, np.int64)  # of operators

    def warm_up(self) -> None:
        """Follow the operators of some thousand random subnets, so that a search meets hardly any that is new."""
        self.predict(SubnetBatch(self.index, self.index.encoding.sample(np.random.default_rng(0), _WARM_UP)))

    def predict(self, batch: SubnetBatch) -> np.ndarray:
        traces = self._look_up(batch, self.plans.of(batch))
        table, slots = self._table, self.work.optimiser_slots
        trained = table.gradients[traces].sum(axis=0)
        step = self._peak(traces) + slots * trained
        kernels = np.bitwise_count(np.bitwise_or.reduce(table.kernels[traces], axis=0)).sum(axis=1, dtype=np.int64)
        resizes = table.resizes[traces].any(axis=0)
        engine = PROCESS_BYTES + kernels * self._num_sizes * KERNEL_BYTES + resizes * RESIZING_BYTES
        return (table.weights[traces].sum(axis=0) + self._inputs(batch) + step + engine) / MEGABYTE

    def _inputs(self, batch: SubnetBatch) -> np.ndarray:
        """Bytes of all examples as pixels of the resolution, `(num_subnets,)`."""
        sides, member = np.unique(self._input_elements[batch.operators[:, 0]], return_inverse=True)
        sizes = [resident_bytes(int(side) * self.work.num_examples) for side in sides]
        return np.array(sizes, np.int64)[member]

    def _peak(self, traces: np.ndarray) -> np.ndarray:
        """The most that a step's tensors take at a time, without the optimiser's, `(num_subnets,)`.

        Args:
            traces: `(num_places, num_subnets)`.
        """
        table = self._table
        gradients = table.gradients[traces]
        there = gradients.sum(axis=0) * self._accumulates  # from the micro-batch before
        kept, peak = np.zeros_like(there), np.zeros_like(there)
        before = []  # each place: what the places before it keep
        holds = _Holds(len(there))
        keeps = np.zeros(len(there), bool)  # whether the place before keeps its result
        for place, here in enumerate(traces):
            present, given, own = here > 0, table.given[here], table.keeps_input[here]
            held = holds.enter(self._chains[place])
            peak = np.maximum(peak, present * (kept + held + there + table.forward[here]))
            before.append(kept + given * (keeps & ~own))
            holds.start(self._chains[place], present, given * ~(own | keeps))
            kept = kept + table.inner[here] + given * (own | keeps)
            keeps = np.where(present, table.keeps_result[here], keeps)
        for place in reversed(range(len(traces))):
            backward = table.backward[traces[place]]
            peak = np.maximum(peak, (backward > 0) * (before[place] + there + backward))
            there = there if self._accumulates else there + gradients[place]
        return peak

    def _look_up(self, batch: SubnetBatch, planned: PlannedBatch) -> np.ndarray:
        """The trace of every place, `(num_places, num_subnets)`, 0 where there is no part.

        Which layout maps have is handed on along the forward pass, that of gradients along the backward pass.
        """
        self._make_room()
        present, parts = np.ascontiguousarray(batch.present.T), np.ascontiguousarray(planned.parts.T)
        operators = np.ascontiguousarray(batch.operators.T)
        may_differ = np.ascontiguousarray(planned.backward.T) & self._outer[operators]  # where layouts may differ
        reached = np.cumsum(planned.trained, axis=1) > planned.trained
        flags = np.ascontiguousarray((_REACHED * reached + _RECOMPUTED * planned.recomputed).T)
        traces = np.zeros_like(operators)
        given = np.full(len(batch), INNERMOST)
        for place in range(len(traces)):
            innermost = (given != PLAIN) | ~may_differ[place]  # mostly as maps lie
            flags[place] += _GIVEN * given + _INNERMOST * innermost
            traces[place] = self._numbers_at(parts[place], operators[place], flags[place])
            given = np.where(present[place], self._table.gives[traces[place]], given)
        innermost = np.ones(len(batch), bool)
        for place in reversed(range(len(traces))):
            layout = flags[place] & ~_INNERMOST | _INNERMOST * (innermost | ~may_differ[place])
            if (layout != flags[place]).any():
                traces[place] = self._numbers_at(parts[place], operators[place], layout)
            innermost = np.where(present[place], self._table.passes[traces[place]], innermost)
        return traces

    def _numbers_at(self, parts: np.ndarray, operators: np.ndarray, flags: np.ndarray) -> np.ndarray:
        """The traces of a place, `(num_subnets,)`; those that there are not yet are made."""
        numbers = self._trace_of[parts, operators, flags]
        unknown = numbers == _UNKNOWN
        if unknown.any():
            for key in np.unique(np.stack([parts, operators, flags])[:, unknown], axis=1).T.tolist():
                self._trace_of[tuple(key)] = self._follow(*key)
            self._table = _tabulated(self._traces)
            numbers = self._trace_of[parts, operators, flags]
        return numbers

    def _make_room(self) -> None:
        """For the parts of plans and the operators that are known by now."""
        operators = self.index.operators
        shape = len(self.plans.part_plans), len(operators) + 1, _FLAGS
        if self._trace_of.shape == shape:
            return
        larger = np.full(shape, _UNKNOWN, np.int64)
        larger[:, -1] = 0
        known_parts, known_operators, _ = self._trace_of.shape
        larger[:known_parts, : known_operators - 1] = self._trace_of[:, :-1]
        self._trace_of = larger
        self._outer = np.array([*(item.out_side > 1 for item in operators), False])  # results of several positions
        self._input_elements = np.array([item.input_elements for item in operators])

    def _follow(self, part: int, number: int, flags: int) -> int:
        """The number of the trace of an operator under a part of a plan."""
        place, plan = self.plans.part_plans[part]
        operator = replace(self.index.operators[number], saved_elements=0)
        own = _renamed(plan, self.index.places[place], operator, recomputed=bool(flags & _RECOMPUTED))
        passes = bool(flags & _REACHED), self._at_a_time, self._accumulates
        treatment = Treatment(own, *passes, flags // _GIVEN, bool(flags & _INNERMOST))
        key = trace_key(operator, treatment, self._dropout)
        if key not in self.traces:
            self.traces[key] = trace_operator(operator, treatment, self._dropout)
        if key not in self._numbers:
            self._numbers[key] = len(self._traces)
            self._traces.append(self.traces[key])
        return self._numbers[key]


class _Holds:
    """What chains of layers hold while they run: their input, which whoever called them still refers to.

    Args:
        num_subnets: of all arrays.
    """

    def __init__(self, num_subnets: int) -> None:
        self._running: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # whether it has begun, what it holds
        self._none = np.zeros(num_subnets, bool), np.zeros(num_subnets, np.int64)

    def enter(self, chains: tuple[str, ...]) -> np.ndarray:
        """Bytes held at a place within these chains, outermost first."""
        self._running = {name: self._running.get(name, self._none) for name in chains}
        return sum((held for _, held in self._running.values()), self._none[1])

    def start(self, chains: tuple[str, ...], present: np.ndarray, given: np.ndarray) -> None:
        """The place's input is that of the chains that begin with it, where it counts for the outermost."""
        counted = np.zeros_like(present)
        for name in chains:
            begun, held = self._running[name]
            fresh = present & ~begun
            self._running[name] = begun | present, np.where(fresh & ~counted, given, held)
            counted |= fresh


def _chains(name: str) -> Iterator[str]:
    """The chains that a place lies in, outermost first: of "stages.1.0" the network, "stages" and "stages.1"."""
    steps = name.split(".")
    return (".".join(steps[:end]) for end in range(len(steps)))


def _renamed(plan: FineTunePlan, place: str, operator: Operator, *, recomputed: bool) -> FineTunePlan:
    """A place's part of a plan for the operator alone, whose parameters have names of their own."""
    own = parameter_names(operator)
    names = {name: BLOCK + name[len(place) :] for name in plan.changes}
    part = plan.part({name: other for name, other in names.items() if other in own})
    return replace(part, recompute=((BLOCK,),)) if recomputed else part


def _tabulated(traces: list[OperatorTrace]) -> _Table:
    kernels = {kernel: bit for bit, kernel in enumerate({kernel for trace in traces for kernel in trace.kernels})}
    bits = np.zeros((len(traces), len(kernels) // _WORD + 1), np.uint64)
    for row, trace in zip(bits, traces, strict=True):
        for word, bit in (divmod(kernels[kernel], _WORD) for kernel in trace.kernels):
            row[word] |= np.uint64(1 << bit)
    return _Table(
        inner=np.array([trace.inner_bytes for trace in traces]),
        given=np.array([trace.input_bytes for trace in traces]),
        keeps_input=np.array([trace.keeps_input for trace in traces]),
        keeps_result=np.array([trace.keeps_result for trace in traces]),
        forward=np.array([trace.forward_bytes for trace in traces]),
        backward=np.array([trace.backward_bytes for trace in traces]),
        gradients=np.array([trace.gradient_bytes for trace in traces]),
        weights=np.array([trace.weight_bytes for trace in traces]),
        resizes=np.array([trace.resizes for trace in traces]),
        gives=np.array([trace.gives for trace in traces]),
        passes=np.array([trace.passes_innermost for trace in traces]),
        kernels=bits,
    )
