"""FedOFA, the strategy: unlike clients fine-tune subnets, the server folds what they trained into one supernet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from clients.records import message_metrics, packed_buffer, packed_content
from fedofa.aggregation.fold import FoldSums
from fedofa.aggregation.server_optimisers import ServerOptimiser
from fedofa.evaluation.metrics import Score
from fedofa.search.fit import capacity
from fedofa.supernet.base import Supernet
from fedofa.types.errors import CheckpointError, DeltaError, FoldError, QuorumError, WireError
from fedofa.types.space import SubnetConfig
from fedofa.types.state import SharedState
from fedofa.update.exchange import decode_delta
from fedofa.update.verification import Expectation, verify_delta
from server.calibration import FleetCalibration
from server.checkpoint import Checkpoint, CheckpointStore, Totals
from server.client_scores import accuracy_by_class, scoring_messages
from server.devices import DeviceFolder
from server.fleet import Assignment, ClientInfo, FleetPlan, draw_cohort
from server.introductions import enrolled
from server.pairs import FILE as PAIRS
from server.pairs import PairGathering, PairLog
from server.payloads import Payloads, Prepared
from server.phases import Cohort, FederatedShrinking
from server.planning import Planner
from server.resources import Stopwatch
from server.rounds import Attempt, RoundLog, RoundRecord
from server.scoring import Scorer, SumsOf
from server.settings import FederationSettings
from server.stream import await_nodes, stream_replies

_COHORT_STREAM, _CALIBRATION_STREAM, _PAIRS_STREAM = 2, 4, 5
"""Tell the random numbers of the cohort, of the clients that calibrate, and of the subnets and clients of pairs from
others drawn from the same seed."""

_MAX_LOSS = 1e6


@runtime_checkable
class KeepsClientStates(Protocol):
    """A runtime that keeps simulated clients' states on this machine; real devices keep their own."""

    def commit_states(self, message_ids: Iterable[str]) -> None: ...
    def export_states(self) -> dict[int, bytes]: ...
    def import_states(self, states: Mapping[int, bytes]) -> None: ...


class Observer(Protocol):
    """Somebody who watches a run: the progress display."""

    def fleet_planned(self, plan: FleetPlan) -> None: ...
    def round_finished(self, record: RoundRecord) -> None: ...


@dataclass
class FedOFA(Strategy):
    """Federated fine-tuning of one supernet by clients that each train the subnet that suits their device.

    Args:
        supernet: for structure and slice maps; the weights are in the state.
        state: the shared state to start from; afterwards the current one.
        planner: decides who trains what.
        optimiser: the server's step after the fold.
        scorer: measures subnets on the server.
        settings: how the federation runs.
        checkpoints, log: where the run is kept.
        run: what identifies the run; a checkpoint of another run is refused.
        observers: told of the plan and of every round.
        shrinking: decides instead of the planner, by a schedule; None for ordinary fine-tuning.
        devices: what keeps the clients' devices, where subnets are assigned by them; else None.

    Attributes:
        pairs: what clients say of random subnets, beside the diary.
    """

    supernet: Supernet
    state: SharedState
    planner: Planner
    optimiser: ServerOptimiser
    scorer: Scorer
    settings: FederationSettings
    checkpoints: CheckpointStore
    log: RoundLog
    run: Mapping[str, Any]
    observers: list[Observer] = field(default_factory=list)
    shrinking: FederatedShrinking | None = None
    devices: DeviceFolder | None = None

    plan: FleetPlan = field(init=False)
    pairs: PairLog = field(init=False)
    totals: Totals = field(init=False, default_factory=Totals)
    done: int = field(init=False, default=0)
    fleet: str = field(init=False, default="")  # digest of the clients that take part
    scores: dict[str, Score] = field(init=False, default_factory=dict)
    _payloads: Payloads = field(init=False)
    _restored: Checkpoint | None = field(init=False, default=None)
    _is_prepared: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.pairs = PairLog(self.log.path.with_name(PAIRS))
        self._payloads = Payloads(self.scorer, self.planner.training, self.settings, self.shrinking)

    # -- the run -----------------------------------------------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Any = None,
    ) -> Result:
        """Run rounds until `num_rounds` are done, from wherever `restore` left the run.

        Flower's other arguments have no effect: the state, the recipe and the evaluation are this strategy's own.
        """
        result = Result()
        if not self._is_prepared:
            self.prepare(grid)
        if self.devices is not None:
            self.devices.save()
        self.summary()
        lost = 0
        for server_round in range(self.done + 1, num_rounds + 1):
            watch = Stopwatch()
            metrics = self._run_round(server_round, grid)
            if server_round % self.settings.evaluate_every == 0 or server_round == num_rounds:
                self._record.scores = self.scores = self._score(grid, self._record)
                result.evaluate_metrics_serverapp[server_round] = _accuracies(self.scores)
            self._gather_pairs(grid)
            self._finish_round(grid, watch)
            result.train_metrics_clientapp[server_round] = metrics or MetricRecord()
            lost = 0 if self._record.complete else lost + 1
            if lost == self.settings.max_lost_rounds:
                raise QuorumError(self._record.lament(lost))
        if not self.scores:  # a run that was complete when it was resumed
            self.scores = self._score(grid, RoundRecord(self.done))
        return result

    def prepare(self, grid: Grid) -> None:
        """Enrol the clients and plan for them; until that has succeeded, nothing of an earlier run is touched.

        Raises:
            ConfigError: nobody joined, or nobody can train anything (in some phase of the schedule).
            CheckpointError: the fleet is not the checkpoint's, or the diary is shorter than then.
        """
        self.plan = self.planner.plan(*self.enrol(grid), uniform=self.settings.uniform)
        if self.shrinking is not None:
            self.shrinking.plan([item.client for item in self.plan.assignments.values()])
        self._check_fleet()
        if self._restored is not None:
            self.log.cut(self._restored.log_bytes)
            self.checkpoints.drop_after(self._restored.round)
            self.pairs.cut(self._restored.round)
        if isinstance(grid, KeepsClientStates):
            grid.import_states(self._restored.client_states if self._restored is not None else {})
        self._is_prepared = True

    def enrol(self, grid: Grid) -> tuple[list[ClientInfo], dict[str, str]]:
        """The clients that introduce themselves, by id, and of the others why they take no part."""
        nodes = await_nodes(grid, self.settings.num_clients, self.settings.join_seconds)
        questions = (Message(RecordDict(), node, MessageType.QUERY) for node in nodes)
        everybody, refused = enrolled(self._exchange(grid, questions))
        unfit = self.settings.unfit_engines
        refused |= {item.client_id: unfit[item.profile.engine] for item in everybody if item.profile.engine in unfit}
        clients = [item for item in everybody if item.client_id not in refused]
        if self.devices is not None and self.planner.assigner is not None:
            one_by_one = partial(stream_replies, grid, max_in_flight=1, reply_seconds=self.settings.reply_seconds)
            clients, unmeasured, latencies = self.devices.collect(clients, partial(self._exchange, grid), one_by_one)
            refused |= unmeasured
            self.planner.assigner.latencies |= latencies
        missing = self.settings.num_clients - len(nodes)
        if missing > 0:
            refused[f"{missing} of {self.settings.num_clients} clients"] = (
                f"did not join within {self.settings.join_seconds:g} s"
            )
        return clients, refused

    def _exchange(self, grid: Grid, messages: Iterable[Message]) -> Iterator[Message]:
        limits = {"max_in_flight": self.settings.max_in_flight, "reply_seconds": self.settings.reply_seconds}
        return stream_replies(grid, messages, **limits)

    def _check_fleet(self) -> None:
        """Refuse to go on with another fleet: every later cohort, and so the result, would differ."""
        found = self.plan.digest()
        if self.fleet and self.fleet != found:
            raise CheckpointError(
                f"the fleet is not the one that the checkpoint was made with: its digest was {self.fleet}, now it is "
                f"{found}, with {len(self.plan.assignments)} clients that take part and {len(self.plan.sitting_out)} "
                "that do not; resume when the same clients answer, with the same devices and data"
            )
        self.fleet = found

    # -- one round ---------------------------------------------------------------------------------------------------

    def _run_round(self, server_round: int, grid: Grid) -> MetricRecord | None:
        """Try the round until its quorum answers or it is given up; then the shared weights stay as they were."""
        self._record = RoundRecord(server_round)
        while True:
            messages = self.configure_train(server_round, ArrayRecord(), ConfigRecord(), grid)
            _, metrics = self.aggregate_train(server_round, self._exchange(grid, messages))
            if self._record.complete or len(self._record.attempts) >= self.settings.round_attempts:
                return metrics

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterator[Message]:
        """Draw the cohort and make its messages, one at a time; clients with the same subnet share one payload.

        A repeated round asks other clients than those that failed in it, where there are others.
        """
        failed, repeats = {name for _, name, _ in self._record.failures}, len(self._record.attempts)
        entropy = [self.settings.seed, _COHORT_STREAM, server_round, *([repeats] if repeats else [])]
        drawn = self._draw(server_round, failed, np.random.default_rng(entropy))
        quorum = max(1, math.ceil(round(self.settings.quorum_fraction * len(drawn.members), 9)))
        attempt = Attempt(drawn.members, quorum, sitting_out=drawn.sitting_out, untaught=drawn.untaught)
        self._record.attempts.append(attempt)
        self._cohort = {item.client.node_id: item for item in drawn.members}
        return self._messages(server_round, drawn.members, self._prepared(server_round, drawn.members, grid))

    def _draw(self, server_round: int, failed: set[str], rng: np.random.Generator) -> Cohort:
        """Who trains what: by the devices, or by the schedule and the devices."""
        if self.shrinking is not None:
            self._record.phase = self.shrinking.phase_of(server_round).name
            self.state = self.shrinking.entered(server_round, self.state)
            return self.shrinking.cohort(server_round, self.state, failed, self.settings.clients_per_round, rng)
        smallest = None if self.settings.uniform else partial(self.planner.fit_of, self.supernet.space.smallest())
        members = draw_cohort(self.plan.without(failed), self.settings.clients_per_round, smallest, rng)
        return Cohort(members, {}, ())

    def _prepared(self, server_round: int, members: Iterable[Assignment], grid: Grid) -> Prepared:
        """The statistics and the teachers that the round's payloads carry."""
        frozen = {item.fit.subnet: None for item in members if item.fit.plan.statistics == "frozen"}
        sums = self._statistics(grid, self.state, frozen, self._record)
        teachers = {item.teacher: None for item in members if item.teacher is not None}
        if self.shrinking is None or not teachers:
            return Prepared(sums)
        state = self.shrinking.teacher_state(server_round, self.state)
        seen = self._statistics(grid, state, teachers, self._record)
        return Prepared(sums, {teacher: self.scorer.calibrated_tensors(state, teacher, seen) for teacher in teachers})

    def _statistics(
        self, grid: Grid, state: SharedState, subnets: Iterable[SubnetConfig], record: RoundRecord
    ) -> SumsOf:
        """The clients' statistics of subnets of a state; none where the server calibrates."""
        if not self.scorer.by_clients:
            return {}
        rng = np.random.default_rng([self.settings.seed, _CALIBRATION_STREAM, record.round])
        cohort = draw_cohort(self.plan, self.settings.clients_per_round, None, rng)
        calibration = FleetCalibration(self.scorer, self.planner, self._payloads.plain)
        clients = [item.client for item in cohort]
        return calibration.sums(partial(self._exchange, grid), record.round, state, subnets, clients, record)

    def _messages(self, server_round: int, cohort: Sequence[Assignment], prepared: Prepared) -> Iterator[Message]:
        """By payload, the largest subnets first: one payload at a time, and what takes longest is not begun last."""
        for _, items in itertools.groupby(sorted(cohort, key=_payload_order), key=_payload_order):
            sharers = list(items)
            payload = self._payloads.to_train(server_round, self.state, sharers[0], prepared)
            for item in sharers:
                self._record.bytes_down += len(payload)
                content = packed_content(payload)
                yield Message(content, item.client.node_id, MessageType.TRAIN, group_id=str(server_round))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Verify and fold each reply as it comes; where the quorum answered, take the server's step.

        A failure costs only its client.
        """
        record, sums = self._record, FoldSums(self.supernet.slice_map)
        self._accepted: list[str] = []
        self._fold_all(replies, sums)
        record.current.verified = sums.num_deltas
        if record.complete:
            self.state, report = sums.finish(self.state, self.optimiser)
            record.delta_norm, record.truncated = report.delta_norm, report.truncated
            record.covered_fraction = float(np.mean(list(report.covered_fraction.values())))
        return None, MetricRecord({"loss": record.loss or 0.0, "folded": record.folded})

    def _fold_all(self, replies: Iterable[Message], sums: FoldSums) -> None:
        """Fold what can be folded; when this returns no reply is left in memory."""
        for reply in replies:
            item = self._cohort[reply.metadata.src_node_id]
            try:
                self._fold(reply, item, sums)
            except (WireError, DeltaError, FoldError) as error:
                self._record.current.failures[item.client.client_id] = str(error)

    def _fold(self, reply: Message, item: Assignment, sums: FoldSums) -> None:
        """Add one reply to the sums, or raise why not."""
        if reply.has_error():
            raise DeltaError(f"client {item.client.client_id!r} failed: {reply.error.reason}")
        buffer = packed_buffer(reply)
        self._record.bytes_up += len(buffer)
        delta = decode_delta(buffer)
        expected = Expectation(
            client_id=item.client.client_id,
            round=self._record.round,
            version=self.state.version,
            subnet=item.fit.subnet,
            plan=item.fit.plan,
            num_examples=item.client.num_train,
            slice_map=self.supernet.slice_map(item.fit.subnet, item.fit.plan.parametrised),
        )
        verify_delta(delta, expected)
        sums.add(delta)
        loss = message_metrics(reply).get("loss", math.nan)
        if 0 <= loss <= _MAX_LOSS:
            self._record.current.losses.append((loss, delta.num_examples))
        self._accepted.append(reply.metadata.reply_to_message_id)

    def _finish_round(self, grid: Grid, watch: Stopwatch) -> None:
        """Commit the clients' states, write the diary and the checkpoint, tell the observers."""
        states: dict[int, bytes] = {}
        if isinstance(grid, KeepsClientStates):
            grid.commit_states(self._accepted if self._record.complete else [])
            states = grid.export_states()
        record = self._record
        record.wall_seconds = watch.wall_seconds()
        self.done = record.round
        self.totals = Totals(
            bytes_down=self.totals.bytes_down + record.bytes_down,
            bytes_up=self.totals.bytes_up + record.bytes_up,
            wall_seconds=self.totals.wall_seconds + record.wall_seconds,
            cpu_seconds=self.totals.cpu_seconds + watch.cpu_seconds(),
            peak_rss_bytes=max(self.totals.peak_rss_bytes, watch.peak_rss_bytes()),
        )
        length = self.log.append(record)
        self.checkpoints.save(Checkpoint(self.done, self.state, states, self.totals, self.run, self.fleet, length))
        for observer in self.observers:
            observer.round_finished(record)

    # -- evaluation on the clients -----------------------------------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterator[Message]:
        """Send every client its own subnet, to be scored on its own test examples."""
        everybody = [item for item in self.plan.assignments.values() if item.client.num_test]
        self._cohort = {item.client.node_id: item for item in everybody}
        subnets = dict.fromkeys(item.fit.subnet for item in everybody)
        sums = self._statistics(grid, self.state, subnets, RoundRecord(server_round))
        payload_of = partial(self._payloads.to_score, server_round, self.state, sums=sums)
        return scoring_messages(server_round, everybody, payload_of)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Accuracy on the clients' own test examples by device class, weighted by examples."""
        found = accuracy_by_class(replies, self._cohort)
        return MetricRecord(dict(found)) if found else None

    def score_on_clients(self, grid: Grid) -> dict[str, float]:
        """Run one evaluation over the whole fleet; device class -> accuracy on the clients' own test examples."""
        messages = self.configure_evaluate(self.done, ArrayRecord(), ConfigRecord(), grid)
        metrics = self.aggregate_evaluate(self.done, self._exchange(grid, messages))
        return {name: float(value) for name, value in (metrics or {}).items() if isinstance(value, float)}

    def _gather_pairs(self, grid: Grid) -> None:
        """Have random subnets of the current state scored by one cohort, and keep what it says."""
        if not self.settings.pairs_per_round:
            return
        record = self._record
        rng = np.random.default_rng([self.settings.seed, _PAIRS_STREAM, record.round])
        subnets = [self.supernet.space.sample(rng) for _ in range(self.settings.pairs_per_round)]
        cohort = draw_cohort(self.plan, self.settings.clients_per_round, None, rng)
        sums = self._statistics(grid, self.state, subnets, record)
        payload_of = partial(self._payloads.calibrated, record.round, self.state, sums=sums)
        gathering = PairGathering(self.scorer, self.planner, payload_of)
        clients = [item.client for item in cohort]
        self.pairs.append(gathering.gather(partial(self._exchange, grid), subnets, clients, record))

    # -- what it is made of ------------------------------------------------------------------------------------------

    def summary(self) -> None:
        """Tell the observers who trains what."""
        for observer in self.observers:
            observer.fleet_planned(self.plan)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint; what was written after it is dropped once the fleet has proved to be the same."""
        self.state, self.totals, self.done = checkpoint.state, checkpoint.totals, checkpoint.round
        self.fleet = checkpoint.fleet
        self._restored = checkpoint

    def subnets(self) -> dict[str, SubnetConfig]:
        """The subnets that are watched: the largest, the smallest, and each device class's own."""
        if self.settings.uniform:
            return {"uniform": self.plan.weakest().subnet}
        space = self.supernet.space
        own = {name: fit.subnet for name, (fit, _) in self.plan.classes().items()}
        return {"largest": space.largest(), "smallest": space.smallest(), **own}

    def _score(self, grid: Grid, record: RoundRecord) -> dict[str, Score]:
        """The watched subnets, calibrated with the server's or the clients' images."""
        watched = self.subnets()
        sums = self._statistics(grid, self.state, watched.values(), record)
        return self.scorer.score(self.state, watched, sums)


def _payload_order(item: Assignment) -> tuple[float, Any, str, Any, str]:
    """Equal for those who get the same payload; the largest subnets come first."""
    teacher = item.teacher.choices if item.teacher is not None else ()
    return (
        -capacity(item.fit.cost),
        item.fit.subnet.choices,
        item.fit.plan.digest(),
        teacher,
        item.client.profile.engine,
    )


def _accuracies(scores: Mapping[str, Score]) -> MetricRecord:
    return MetricRecord({name: score.accuracy for name, score in scores.items()})
