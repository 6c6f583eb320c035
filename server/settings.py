"""How a federation runs: cohorts, patience with clients, what is measured when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class FederationSettings:
    """How a federation runs; the names are those of the settings files."""

    seed: int
    clients_per_round: int
    max_in_flight: int
    reply_seconds: float
    num_clients: int
    join_seconds: float
    evaluate_every: int
    float_dtype: str
    decay_rounds: int = 0  # the clients' learning rate falls along a cosine over so many rounds; 0: it is constant
    quorum_fraction: float = 0.5  # of a cohort's clients, whose verified deltas a round needs
    round_attempts: int = 2  # how often a round is tried, each time with other clients, before it is given up
    max_lost_rounds: int = 3  # rounds given up one after the other that end the run
    unfit_engines: Mapping[str, str] = field(default_factory=dict)  # engine -> why its clients take no part
    pairs_per_round: int = 0  # random subnets that a cohort scores after every round
    uniform: bool = False  # one subnet for everybody, the weakest client's: ordinary federated averaging
