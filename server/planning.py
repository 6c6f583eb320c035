"""Who trains what: the best subnet and plan for every client's device, given the clients' recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from fedofa.device.cost import LocalWork, RoundCost
from fedofa.finetune.budget import BudgetedPlan, BudgetError, plan_for_budget
from fedofa.finetune.inputs import ImageForm
from fedofa.finetune.recipe import LocalTraining
from fedofa.finetune.sparse import Contributions
from fedofa.search.fit import Budgets, Fit, FitSearch
from fedofa.supernet.base import Supernet
from fedofa.supernet.costs import BlockCost
from fedofa.types.errors import ConfigError
from fedofa.types.plan import FineTunePlan
from fedofa.types.space import SubnetConfig
from server.assignment import FleetAssigner
from server.fleet import ClientInfo, FleetPlan, plan_fleet, plan_uniform

PLANNERS = ("cost", "budget")


class BudgetedPlans:
    """Makes plans that keep to a device's memory (`fedofa.finetune.budget`), each once.

    Plans are shared by subnet, kind, memory and a bucket of the number of examples: the next larger one that is a power
    of two of whole batches, and one.

    Args:
        supernet: the structure is enough.
        training: the clients' recipe.
        form: of the clients' images; their resolution is the subnet's.
        statistics: batch norm's mode.
        contributions: of the supernet's layers, for "sparse" kinds.
    """

    def __init__(
        self,
        supernet: Supernet,
        training: LocalTraining,
        form: ImageForm,
        statistics: str,
        contributions: Contributions | None = None,
    ) -> None:
        self._supernet, self._training, self._form = supernet, training, form
        self._statistics, self._contributions = statistics, contributions
        self._known = lru_cache(maxsize=4096)(self._plan)

    def __call__(
        self, subnet: SubnetConfig, kind: str, work: LocalWork, memory_bytes: float
    ) -> tuple[FineTunePlan, int]:
        """The plan and what it takes in bytes.

        Raises:
            BudgetError: when no plan of that kind fits.
        """
        found = self._known(subnet, kind, self._bucket(work.num_examples), int(memory_bytes))
        if isinstance(found, BudgetError):
            raise found
        return found.plan, found.memory.total_bytes

    def _bucket(self, num_examples: int) -> int:
        """As many examples or more, and a last batch that one more example has joined."""
        batch = self._training.batch_size
        if num_examples <= batch:
            return num_examples
        return batch * (1 << max(0, math.ceil(math.log2((num_examples - 1) / batch)))) + 1

    def _plan(
        self, subnet: SubnetConfig, kind: str, num_examples: int, memory_bytes: int
    ) -> BudgetedPlan | BudgetError:
        form = replace(self._form, resolution=self._supernet.resolution(subnet))
        try:
            return plan_for_budget(
                *(self._supernet, subnet, self._training, num_examples, form, memory_bytes),
                kinds=(kind,),
                statistics=self._statistics,
                contributions=self._contributions,
            )
        except BudgetError as error:
            return error


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans a fleet.

    Args:
        search: finds the best subnet for a device.
        training: the clients' recipe, which says how much work a round is.
        round_seconds: a device's budget for download, training and upload.
        float_dtype: of weights on the wire.
        assigner: chooses subnets by search; None for the search's own rule.
    """

    search: FitSearch
    training: LocalTraining
    round_seconds: float
    float_dtype: str
    assigner: FleetAssigner | None = None

    def plan(self, clients: Sequence[ClientInfo], refused: Mapping[str, str], *, uniform: bool) -> FleetPlan:
        """The assignments of all clients, and who sits out and why; `refused` sit out already.

        Args:
            uniform: one subnet for everybody, the weakest client's.

        Raises:
            ConfigError: when no client can train anything.
        """
        if self.assigner is not None:
            plan = self.assigner.plan(clients, self.work, self.round_seconds)
        else:
            plan = plan_fleet(clients, self.search, self.work, self.round_seconds)
        plan = replace(plan, sitting_out={**refused, **plan.sitting_out})
        if not plan.assignments:
            raise ConfigError(f"no client can train any subnet: {next(iter(plan.sitting_out.values()))}")
        if not uniform:
            return plan
        weakest = plan.weakest()
        return plan_uniform(plan, weakest, partial(self.fit_of, weakest.subnet))

    def fit_of(self, subnet: SubnetConfig, client: ClientInfo) -> Fit | None:
        """A given subnet on a client's device; None where no plan fits."""
        budgets = Budgets(client.profile.memory_bytes, self.round_seconds)
        return self.search.fit_of(subnet, client.profile, self.work(client.num_train), budgets)

    def cost(
        self, blocks: Sequence[BlockCost], plan: FineTunePlan, client: ClientInfo, teacher: Sequence[BlockCost]
    ) -> RoundCost | None:
        """What a round with a teacher costs a client; None where it is beyond the client's budgets."""
        work, profile = self.work(client.num_train), client.profile
        cost = self.search.cost_model.cost(blocks, plan, profile, work, teacher)
        return None if Budgets(profile.memory_bytes, self.round_seconds).exceeded(cost) else cost

    def work(self, num_examples: int) -> LocalWork:
        """What a client with that many training examples does in a round."""
        training = self.training
        samples = training.max_steps * training.batch_size if training.max_steps else training.epochs * num_examples
        slots = 2 if training.optimiser == "adamw" else int(training.momentum > 0)
        slots += int(training.proximal_mu > 0)  # the received weights stay beside the trained ones
        wire = 4 if self.float_dtype == "float32" else 2
        return LocalWork(num_examples, samples, training.batch_size, slots, wire)
