"""Builds the parts of a federation from its settings."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clients.local import federation, fleet_profiles
from conf.compose import encode_conf
from conf.schema import AggregationConf, FinetuneConf, SimulateConf
from fedofa.aggregation.server_optimisers import Adaptive, Momentum, Plain, ServerOptimiser
from fedofa.data.federation import FederatedData
from fedofa.data.sources import ImageSet
from fedofa.device.cost import AnalyticCostModel
from fedofa.finetune.inputs import ImageForm
from fedofa.finetune.plans import build_plan, needs_contributions
from fedofa.finetune.recipe import LocalTraining
from fedofa.finetune.sparse import Contributions
from fedofa.finetune.trainer import SHIFT_REFUSAL
from fedofa.search.fit import FitSearch, PlanOf
from fedofa.shrinking.schedule import ShrinkSchedule
from fedofa.supernet.base import Supernet
from fedofa.supernet.chain import ChainSupernet
from fedofa.supernet.families import build_supernet
from fedofa.supernet.pretrained import start_from
from fedofa.supernet.sums import MAX_DELTAS
from fedofa.types.errors import ConfigError
from fedofa.update.exchange import FLOAT_DTYPES
from server.assignment import FleetAssigner, assigned_by, build_assigner
from server.checkpoint import CheckpointStore
from server.compiled import unfit_engines
from server.devices import DeviceFolder
from server.phases import FederatedShrinking
from server.planning import PLANNERS, BudgetedPlans, Planner
from server.progress import say
from server.resources import available_cores
from server.rounds import RoundLog
from server.schedules import check_read, federated_schedule
from server.scoring import Scorer
from server.settings import FederationSettings
from server.starting import check_start, fingerprint
from server.strategy import FedOFA
from server.structure import PRETRAINED, describe_structure
from server.tracking.backends import check_tracking
from server.weights import normalisation_for
from server.weights import start_from as start_from_weights

_RECOMPUTE = {"never": (False,), "auto": (False, True), "always": (True,)}
_DECAYS = ("none", "cosine")
_OPTIMISERS = ("plain", "momentum", "adam", "yogi")
_CALIBRATIONS = ("server", "clients", "none")
_IN_STORE = 2
"""Messages that wait for a free worker of this machine, so that none is idle while a reply is folded."""
_MAY_CHANGE = ("rounds", "resume", "resume_round", "output_dir", "runtime", "evaluation", "tracking")
"""Settings that a resumed run may change: they do not change what a round computes."""

_PATIENCE = ("max_in_flight", "reply_seconds", "join_seconds", "quorum_fraction", "round_attempts", "max_lost_rounds")
"""Settings of the fleet that a resumed run may change: how the server deals with clients that do not answer."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What the strategies of one run share."""

    conf: SimulateConf
    data: FederatedData
    supernet: Supernet
    search: FitSearch
    training: LocalTraining
    optimiser: ServerOptimiser
    scorer: Scorer
    schedule: ShrinkSchedule | None = None
    assigner: FleetAssigner | None = None
    ordering: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Of the channels at the start; a run whose phases order them leaves another in the supernet."""

    def strategy(self, output_dir: Path, *, uniform: bool = False) -> FedOFA:
        """A strategy at round 0 and a supernet at its start; checkpoints and diary are kept in `output_dir`."""
        conf = self.conf
        self.supernet.set_ordering(self.ordering)
        settings = FederationSettings(
            seed=conf.seed,
            clients_per_round=conf.fleet.clients_per_round,
            max_in_flight=messages_in_flight(conf),
            reply_seconds=conf.fleet.reply_seconds,
            num_clients=conf.fleet.num_clients,
            join_seconds=conf.fleet.join_seconds,
            evaluate_every=conf.evaluation.every,
            float_dtype=conf.aggregation.float_dtype,
            quorum_fraction=conf.fleet.quorum_fraction,
            round_attempts=conf.fleet.round_attempts,
            max_lost_rounds=conf.fleet.max_lost_rounds,
            decay_rounds=conf.rounds if conf.finetune.decay == "cosine" else 0,
            unfit_engines=unfit_engines(
                self.supernet, conf.finetune.statistics, conf.shrinking.schedule, conf.finetune.plans
            ),
            pairs_per_round=0 if uniform else conf.evaluation.pairs_per_round,
            uniform=uniform,
        )
        rules = (self.search, self.training, conf.fleet.round_seconds, conf.aggregation.float_dtype)
        planner = Planner(*rules, assigner=self.assigner)
        return FedOFA(
            supernet=self.supernet,
            state=self.supernet.state(),
            planner=planner,
            optimiser=self.optimiser,
            scorer=self.scorer,
            settings=settings,
            checkpoints=CheckpointStore(output_dir / "checkpoints"),
            log=RoundLog(output_dir / "rounds.jsonl"),
            devices=self.devices(Path(conf.output_dir).resolve()),
            run=run_identity(conf, uniform=uniform),
            shrinking=None if uniform or self.schedule is None else self.shrinking(self.schedule, planner),
        )

    def devices(self, output_dir: Path) -> DeviceFolder | None:
        """What keeps the clients' devices, where subnets are assigned by them; runs of one folder share it."""
        if self.assigner is None:
            return None
        probe_bytes = self.conf.assignment.link_probe_bytes
        return DeviceFolder(output_dir / "devices", self.assigner.index, probe_bytes)

    def shrinking(self, schedule: ShrinkSchedule, planner: Planner) -> FederatedShrinking:
        """What deals a schedule's subnets to the fleet.

        Raises:
            SpaceError, InfeasibilityError: when a phase leaves the space.
        """
        plans = _plans(self.conf.finetune, parametrised=True)
        return FederatedShrinking(self.supernet, schedule, plans, planner, self.scorer.loss_on_own, self.conf.seed)


def build_parts(conf: SimulateConf) -> Parts:
    """Data, supernet, search, recipe and scorer of a run.

    Raises:
        ConfigError, DatasetError: naming the setting.
    """
    _check(conf)
    by = assigned_by(conf)
    check_tracking(conf.tracking)
    fleet_profiles(conf)  # device classes out of range are refused here, not by every client
    training = build_training(conf.finetune)
    optimiser = build_optimiser(conf.aggregation)
    data = federation(conf)
    images = data.image_set
    supernet = build_first(describe_supernet(conf.supernet, images), torch.Generator().manual_seed(conf.seed))
    if conf.supernet_weights:
        say(start_from_weights(supernet, Path(conf.supernet_weights), torch.Generator().manual_seed(conf.seed)))
    normalisation = normalisation_for(supernet, images)
    if conf.evaluation.calibration == "none":
        _check_kept_statistics(conf, supernet)
    scorer = Scorer(supernet, data.global_test, data.calibration, normalisation, by=conf.evaluation.calibration)
    sparse = needs_contributions(conf.finetune.plans)
    contributions = scorer.contributions(supernet.state()) if sparse else None
    plans = _plans(conf.finetune, contributions=contributions)
    smallest = supernet.block_costs(supernet.space.smallest())
    for plan_of in itertools.chain.from_iterable(plans):
        plan_of(smallest)  # a plan that some subnet cannot follow is refused before anything starts
    search = FitSearch(
        supernet.space,
        supernet.block_costs,
        plans,
        AnalyticCostModel(),
        _plan_within(conf, supernet, training, images, contributions),
    )
    schedule = _schedule(conf, supernet, data)
    assigner = _assigner(conf, supernet, search) if by == "search" else None
    ordering = dict(supernet.ordering)
    parts = Parts(conf, data, supernet, search, training, optimiser, scorer, schedule, assigner, ordering)
    if parts.schedule is not None:  # a phase that leaves the space is refused before anything starts
        parts.shrinking(parts.schedule, Planner(search, training, conf.fleet.round_seconds, "float32"))
    return parts


def _check_kept_statistics(conf: SimulateConf, supernet: Supernet) -> None:
    """Refuse to keep batch norms' statistics where they would not be the subnet's own."""
    if supernet.space.count() > 1:
        raise ConfigError(
            "evaluation.calibration=none: statistics that the supernet came with are those of one network; expected a "
            f"space of 1 subnet, found {supernet.space.count():,}. Take server or clients, or one value of every axis"
        )
    if conf.finetune.statistics != "frozen":
        raise ConfigError(
            "evaluation.calibration=none: statistics stay as they are only in training with "
            f"finetune.statistics=frozen, found {conf.finetune.statistics!r}"
        )


def _assigner(conf: SimulateConf, supernet: Supernet, fits: FitSearch) -> FleetAssigner:
    """What assigns subnets by search."""
    wire_bytes = 4 if conf.aggregation.float_dtype == "float32" else 2
    return build_assigner(conf.assignment, supernet, fits, micro_batch=conf.finetune.micro_batch, wire_bytes=wire_bytes)


def _schedule(conf: SimulateConf, supernet: Supernet, data: FederatedData) -> ShrinkSchedule | None:
    """The shrinking schedule of a run, None without one."""
    if conf.shrinking.schedule == "none":
        check_read(conf.shrinking)
        return None
    if not supernet.space.axes:
        raise ConfigError(
            f"shrinking.schedule: {conf.shrinking.schedule!r} needs a supernet of many subnets, found the fixed "
            "network; choose an elastic one (supernet=small), or shrinking=none"
        )
    schedule = federated_schedule(conf.shrinking, supernet.space, conf.rounds)
    if any(phase.candidates > 1 for phase in schedule.phases) and not len(data.calibration.labels):
        raise ConfigError(
            "data.calibration_examples: candidates of shrinking.schedule="
            f"{conf.shrinking.schedule} are compared on images that the server holds: expected at least 1, found 0"
        )
    return schedule


def build_training(conf: FinetuneConf) -> LocalTraining:
    """The clients' recipe."""
    names = LocalTraining.__dataclass_fields__
    return LocalTraining(**{name: getattr(conf, name) for name in names})


def build_optimiser(conf: AggregationConf) -> ServerOptimiser:
    """The server's optimiser.

    Raises:
        ConfigError: for an unknown one, or rates out of range.
    """
    if conf.optimiser not in _OPTIMISERS:
        raise ConfigError(f"aggregation.optimiser: expected one of {list(_OPTIMISERS)}, found {conf.optimiser!r}")
    for name in ("beta", "beta2"):
        if not 0 <= getattr(conf, name) < 1:
            raise ConfigError(f"aggregation.{name}: expected a number in [0, 1), found {getattr(conf, name)!r}")
    for name in ("learning_rate", "epsilon"):
        if not getattr(conf, name) > 0:
            raise ConfigError(f"aggregation.{name}: expected a positive number, found {getattr(conf, name)!r}")
    if conf.optimiser == "plain":
        return Plain(conf.learning_rate)
    if conf.optimiser == "momentum":
        return Momentum(conf.learning_rate, conf.beta)
    return Adaptive(conf.learning_rate, conf.beta, conf.beta2, conf.epsilon, yogi=conf.optimiser == "yogi")


def messages_in_flight(conf: SimulateConf) -> int:
    """How many clients are out at a time; each may leave the server a whole reply before the first one is folded.

    Workers of this machine need no more than their number and a few in store: more would only wait in memory. On a Ray
    of one's own deadlines count from sending, so that none may wait for another.
    """
    workers = conf.runtime.num_workers or available_cores()
    if conf.runtime.name == "in_process":
        return min(conf.fleet.max_in_flight, workers + _IN_STORE)
    if conf.runtime.name == "ray" and not conf.runtime.address:
        return min(conf.fleet.max_in_flight, workers)
    return conf.fleet.max_in_flight


def run_identity(conf: SimulateConf, *, uniform: bool) -> dict[str, Any]:
    """The settings that make two runs the same run, flat, by dotted key."""
    settings = json.loads(encode_conf(conf))
    for name in _MAY_CHANGE:
        settings.pop(name)
    if conf.finetune.decay != "none":
        settings["rounds"] = conf.rounds  # the learning rate of every round depends on how many there are
    if conf.shrinking.schedule == "none":
        settings["shrinking"] = {"schedule": "none"}
    else:
        settings["shrinking"]["steps"] = conf.rounds
    if conf.finetune.statistics == "frozen" or conf.shrinking.schedule != "none":
        settings["calibration"] = conf.evaluation.calibration  # statistics are part of what clients train with
    for name in _PATIENCE:
        settings["fleet"].pop(name)
    settings["assignment"]["by"] = assigned_by(conf)
    if settings["assignment"]["by"] == "rule":
        settings.pop("assignment")
    elif conf.assignment.predictor:
        content = Path(conf.assignment.predictor).read_bytes()
        settings["assignment"]["predictor"] = hashlib.sha256(content).hexdigest()[:16]
    settings["data"].pop("cache_dir")
    settings["data"].pop("path")
    settings["supernet_weights"] = fingerprint(conf.supernet_weights)
    settings["uniform"] = uniform
    return flat_settings(settings)


def flat_settings(value: Any, key: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    if not isinstance(value, dict):
        return {key: value}
    items: dict[str, Any] = {}
    for name, item in value.items():
        items |= flat_settings(item, f"{key}.{name}" if key else name)
    return items


def describe_supernet(settings: Mapping[str, Any], images: ImageSet) -> dict[str, Any]:
    """What `build_first` takes: the supernet's structure over the data's images, and its `pretrained` setting."""
    _, channels, height, width = images.images.shape
    structure = describe_structure(settings, channels, len(images.class_names), (height, width))
    return {**structure, PRETRAINED: settings.get(PRETRAINED)}


def build_first(description: Mapping[str, Any], generator: torch.Generator) -> Supernet:
    """The supernet with its first weights: pretrained where the description says so, else drawn."""
    pretrained = description.get(PRETRAINED)
    settings = {name: value for name, value in description.items() if name != PRETRAINED}
    if not pretrained:
        return build_supernet(settings, generator)
    _check_channels(settings)
    structure = build_supernet(settings)
    if not isinstance(structure, ChainSupernet):
        raise ConfigError(f"supernet.pretrained: expected the family 'chain', found {settings['family']!r}")
    return start_from(structure.spec, pretrained, generator, say)


def _check_channels(settings: Mapping[str, Any]) -> None:
    """Refuse data of other channels than pretrained weights are normalised for."""
    expected, found = len(settings.get("mean") or ()), settings.get("in_channels")
    if expected not in (0, found):
        raise ConfigError(
            f"supernet.pretrained: the weights need images of {expected} channels, normalised by supernet.mean; found "
            f"data of {found}. Choose data of {expected} channels (data=cifar10), or another supernet (supernet=small)"
        )


def _plans(
    conf: FinetuneConf, *, parametrised: bool = False, contributions: Contributions | None = None
) -> list[list[PlanOf]]:
    """The plans in order of preference, each with the ways of recomputing that are allowed."""
    if conf.feature_cache and conf.max_shift:
        raise ConfigError(f"finetune.feature_cache: {SHIFT_REFUSAL}; found max_shift={conf.max_shift}")
    settings = {"statistics": conf.statistics, "lean": conf.lean, "micro_batch": conf.micro_batch}
    settings |= {"parametrised": parametrised, "contributions": contributions, "feature_cache": conf.feature_cache}
    return [
        [partial(build_plan, name, recompute=again, **settings) for again in _RECOMPUTE[conf.recompute]]
        for name in conf.plans
    ]


def _plan_within(
    conf: SimulateConf,
    supernet: Supernet,
    training: LocalTraining,
    images: ImageSet,
    contributions: Contributions | None,
) -> BudgetedPlans | None:
    """What makes plans for a device's memory, where the settings ask for such plans."""
    finetune = conf.finetune
    if finetune.planner not in PLANNERS:
        raise ConfigError(f"finetune.planner: expected one of {list(PLANNERS)}, found {finetune.planner!r}")
    if finetune.planner == "cost":
        return None
    fixed = {"lean": finetune.lean, "micro_batch": finetune.micro_batch, "recompute": finetune.recompute != "auto"}
    fixed |= {"shrinking.schedule": conf.shrinking.schedule != "none"}
    clashes = [name for name, is_set in fixed.items() if is_set]
    if clashes:
        raise ConfigError(
            f"finetune.planner=budget chooses every plan's levers itself; expected {clashes} as they are by default"
        )
    _, channels, height, width = images.images.shape
    form = ImageForm((channels, height, width), images.images.itemsize)
    return BudgetedPlans(supernet, training, form, finetune.statistics, contributions)


def _check(conf: SimulateConf) -> None:
    """Settings that only their meaning can refuse."""
    positive = {
        "rounds": conf.rounds,
        "fleet.num_clients": conf.fleet.num_clients,
        "fleet.clients_per_round": conf.fleet.clients_per_round,
        "fleet.max_in_flight": conf.fleet.max_in_flight,
        "fleet.round_seconds": conf.fleet.round_seconds,
        "fleet.reply_seconds": conf.fleet.reply_seconds,
        "fleet.round_attempts": conf.fleet.round_attempts,
        "fleet.max_lost_rounds": conf.fleet.max_lost_rounds,
        "evaluation.every": conf.evaluation.every,
    }
    for name, value in positive.items():
        if not value > 0:
            raise ConfigError(f"{name}: expected a positive number, found {value!r}")
    start = {"resume": conf.resume, "at": conf.resume_round, "name": "resume_round"}
    check_start(Path(conf.output_dir), conf.supernet_weights, **start)
    if not 0 <= conf.fleet.quorum_fraction <= 1:
        raise ConfigError(f"fleet.quorum_fraction: expected a number in [0, 1], found {conf.fleet.quorum_fraction}")
    if not conf.fleet.join_seconds >= 0:
        raise ConfigError(f"fleet.join_seconds: expected a number of at least 0, found {conf.fleet.join_seconds!r}")
    if conf.evaluation.pairs_per_round < 0:
        raise ConfigError(
            f"evaluation.pairs_per_round: expected a number of at least 0, found {conf.evaluation.pairs_per_round}"
        )
    if conf.fleet.clients_per_round > MAX_DELTAS:
        raise ConfigError(
            f"fleet.clients_per_round: expected at most {MAX_DELTAS}, found {conf.fleet.clients_per_round}"
        )
    if conf.fleet.clients_per_round > conf.fleet.num_clients:
        raise ConfigError(
            f"fleet.clients_per_round: expected at most fleet.num_clients ({conf.fleet.num_clients}), "
            f"found {conf.fleet.clients_per_round}"
        )
    if conf.evaluation.calibration not in _CALIBRATIONS:
        raise ConfigError(
            f"evaluation.calibration: expected one of {list(_CALIBRATIONS)}, found {conf.evaluation.calibration!r}"
        )
    if conf.finetune.recompute not in _RECOMPUTE:
        raise ConfigError(f"finetune.recompute: expected one of {list(_RECOMPUTE)}, found {conf.finetune.recompute!r}")
    if conf.finetune.decay not in _DECAYS:
        raise ConfigError(f"finetune.decay: expected one of {list(_DECAYS)}, found {conf.finetune.decay!r}")
    if not conf.finetune.plans:
        raise ConfigError("finetune.plans: expected at least one plan, found none")
    if conf.aggregation.float_dtype not in FLOAT_DTYPES:
        raise ConfigError(
            f"aggregation.float_dtype: expected one of {list(FLOAT_DTYPES)}, found {conf.aggregation.float_dtype!r}"
        )
