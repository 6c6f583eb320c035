"""What the in-process engine costs beside a bare PyTorch FedAvg loop: `python benchmarks/simulation.py`.

First job: one small CNN, 10 clients a round with 50 examples each. After every round of the engine a loop written by
hand trains the same clients on the same batches in this process, so that both see the same machine; ratios are taken
round by round and their median is printed. Second job: the default fleet of unlike devices, with one worker and with
several. CPU seconds are those of this process and all workers, checkpoints included; start-up, the first round (a
warm-up) and the last one (which scores the subnets) are left out. In the last line `cpu_ratio` is engine over bare
loop with one worker, `wall_ratio_*` the same in wall time with several workers, and `mixed_wall_ratio_*` several
workers over one.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from flwr.app.user_config import UserConfig
from torch import Tensor
from torch.nn import functional

from clients.local import client_id
from clients.torch_engine import seed_task
from conf.compose import compose_conf, encode_conf
from conf.schema import SimulateConf
from fedofa.data.federation import Examples
from fedofa.evaluation.metrics import evaluate
from fedofa.finetune.inputs import prepare_inputs
from server.federation import Parts, build_parts
from server.fleet import FleetPlan
from server.grid import InProcessGrid
from server.resources import tree_usage
from server.rounds import RoundRecord
from server.strategy import FedOFA

_CNN = (
    "supernet=fixed", "partition=iid", "partition.client_test_fraction=0", "aggregation=plain",
    "fleet.num_clients=80", "fleet.clients_per_round=10",
    "fleet.round_seconds=1e6", "fleet.classes.sensor_board.memory_bytes=1e9",  # every device can train the network
    "finetune.epochs=7", "finetune.batch_size=10", "finetune.learning_rate=0.02", "finetune.momentum=0.9",
    "finetune.max_shift=0", "finetune.decay=none",
)  # fmt: skip
_SINGLE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Read when numpy and torch are first imported: `fedofa simulate` sets the same, and so runs its own process."""
_DISTANCE_TOLERANCE = 0.2
"""L2 distance between the engine's weights and the bare loop's, over the way the latter came. Both start alike and see
the same batches, so that only rounding errors grow between them: to 0.04 in 12 rounds; another recipe is above 0.5."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one round took."""

    cpu_seconds: float
    wall_seconds: float


class BareLoop:
    """Federated averaging as one writes it by hand: one model, one thread, inputs prepared beforehand."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._model = parts.supernet.build(parts.supernet.space.largest())
        self._weights = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        numbers = range(parts.data.num_clients)
        self._initial = self._weights
        self._examples = {client_id(number): self._prepared(parts.data.client(number).train) for number in numbers}

    def run_round(self, record: RoundRecord) -> None:
        """Train that round's cohort and take the mean of its weights, weighted by examples."""
        sums = {name: torch.zeros_like(tensor) for name, tensor in self._weights.items()}
        total = 0
        for item in record.cohort:
            inputs, labels = self._examples[item.client.client_id]
            self._model.load_state_dict(self._weights)
            generator = seed_task(self._parts.conf.seed, item.client.client_id, record.round)
            self._train(inputs, labels, generator)
            for name, tensor in self._model.state_dict().items():
                sums[name].add_(tensor, alpha=len(labels))
            total += len(labels)
        self._weights = {name: tensor / total for name, tensor in sums.items()}

    def accuracy(self) -> float:
        """Of the mean weights, on the global test set."""
        self._model.load_state_dict(self._weights)
        return evaluate(self._model, *self._prepared(self._parts.data.global_test)).accuracy

    def distance(self, tensors: Mapping[str, np.ndarray]) -> float:
        """From the mean weights to these tensors of the same names, relative to the way that training has come."""
        apart = [torch.from_numpy(tensors[name]) - mine for name, mine in self._weights.items()]
        way = [mine - self._initial[name] for name, mine in self._weights.items()]
        return float(_norm(apart) / _norm(way))

    def _train(self, inputs: Tensor, labels: Tensor, generator: torch.Generator) -> None:
        recipe = self._parts.training
        optimiser = torch.optim.SGD(self._model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum)
        self._model.train()
        for _ in range(recipe.epochs):
            for batch in torch.randperm(len(labels), generator=generator).split(recipe.batch_size):
                optimiser.zero_grad()
                functional.cross_entropy(self._model(inputs[batch]), labels[batch]).backward()
                optimiser.step()

    def _prepared(self, examples: Examples) -> tuple[Tensor, Tensor]:
        normalisation = self._parts.scorer.normalisation
        inputs = prepare_inputs(examples.images, normalisation["mean"], normalisation["std"])
        return inputs, torch.from_numpy(examples.labels)


@dataclass
class RoundClock:
    """Observes a run: what each of the engine's rounds takes, and what is run in alternation with them.

    CPU is counted from one round's end to the next, less what the other spent, so that nothing a worker still does
    after its reply is missed.

    Args:
        other: runs after every round of the engine, in this process.
    """

    other: Callable[[RoundRecord], None] | None = None
    engine_rounds: list[Usage] = field(default_factory=list)
    other_rounds: list[Usage] = field(default_factory=list)
    _cpu_mark: float = field(init=False, default_factory=lambda: tree_usage()[0])
    _wall_mark: float = field(init=False, default_factory=time.perf_counter)

    def fleet_planned(self, plan: FleetPlan) -> None:
        """Nothing to measure yet."""

    def round_finished(self, record: RoundRecord) -> None:
        """Note what the engine's round took, then give the other its turn."""
        wall_seconds = time.perf_counter() - self._wall_mark
        cpu_seconds, self._cpu_mark = tree_usage()[0] - self._cpu_mark, tree_usage()[0]
        self.engine_rounds.append(Usage(cpu_seconds, wall_seconds))
        if self.other:
            cpu_start, wall_start = time.process_time(), time.perf_counter()
            self.other(record)
            usage = Usage(time.process_time() - cpu_start, time.perf_counter() - wall_start)
            self.other_rounds.append(usage)
            self._cpu_mark += usage.cpu_seconds
        self._wall_mark = time.perf_counter()


def run_engine(conf: SimulateConf, parts: Parts, clock: RoundClock, num_workers: int) -> FedOFA:
    """Run a federation as `fedofa simulate` does, without display and result files."""
    run_config: UserConfig = {"config": encode_conf(conf)}
    with (
        tempfile.TemporaryDirectory() as output_dir,
        InProcessGrid(num_nodes=conf.fleet.num_clients, run_config=run_config, num_workers=num_workers) as grid,
    ):
        strategy = parts.strategy(Path(output_dir))
        strategy.observers.append(clock)
        strategy.start(grid, num_rounds=conf.rounds)
    return strategy


def settings(num_rounds: int, *overrides: str) -> SimulateConf:
    """A run that is scored in its last round only, and only on the server."""
    scoring = (f"evaluation.every={num_rounds}", "evaluation.clients=false", "evaluation.comparison=false")
    return compose_conf([*overrides, *scoring, f"rounds={num_rounds}"])


@dataclass
class Column:
    """Rounds of one variant, over all repeats."""

    rounds: list[Usage] = field(default_factory=list)

    def add(self, rounds: Sequence[Usage]) -> None:
        """Take a run's rounds but the first and the last."""
        self.rounds += rounds[1:-1]

    def median(self, name: str) -> float:
        """Of "cpu_seconds" or "wall_seconds"."""
        return statistics.median(getattr(usage, name) for usage in self.rounds)

    def ratio(self, other: "Column", name: str) -> float:
        """The median of the ratios to the other's rounds, taken pair by pair."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(getattr(mine, name) / getattr(theirs, name) for mine, theirs in pairs)


def compare_cnn(num_rounds: int, num_repeats: int, worker_counts: Sequence[int]) -> dict[int, tuple[Column, Column]]:
    """Number of workers -> the rounds of the engine and those of the bare loop that took turns with it."""
    conf = settings(num_rounds, *_CNN)
    parts = build_parts(conf)
    columns = {count: (Column(), Column()) for count in worker_counts}
    for _ in range(num_repeats):
        for count, (engine, bare) in columns.items():
            loop = BareLoop(parts)
            clock = RoundClock(loop.run_round)
            strategy = run_engine(conf, parts, clock, count)
            check_same_work(strategy, loop)
            engine.add(clock.engine_rounds)
            bare.add(clock.other_rounds)
    return columns


def check_same_work(strategy: FedOFA, loop: BareLoop) -> None:
    """Print what both arrived at; without their agreement a ratio of costs means nothing."""
    engine_accuracy, distance = strategy.scores["largest"].accuracy, loop.distance(strategy.state.tensors)
    print(
        f"  accuracy: engine {engine_accuracy:.3f}, bare loop {loop.accuracy():.3f}; distance {distance:.3f}",
        flush=True,
    )
    if not distance <= _DISTANCE_TOLERANCE:
        raise SystemExit(
            f"distance between the weights of engine and bare loop: expected at most {_DISTANCE_TOLERANCE}, found "
            f"{distance:.3f}; they did not do the same work. Give both the same recipe: see _CNN and BareLoop._train"
        )


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).norm()


def measure_mixed(num_rounds: int, num_repeats: int, worker_counts: Sequence[int]) -> dict[int, Column]:
    """Number of workers -> rounds of the default fleet; the same cohorts whatever the number."""
    conf = settings(num_rounds)
    parts = build_parts(conf)
    columns = {count: Column() for count in worker_counts}
    for _ in range(num_repeats):
        for count, column in columns.items():
            clock = RoundClock()
            strategy = run_engine(conf, parts, clock, count)
            print(f"  {count} workers: shared digest {strategy.state.digest()[:16]}", flush=True)
            column.add(clock.engine_rounds)
    return columns


def print_machine() -> None:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "flwr"))
    print(f"python {platform.python_version()}, {versions}\n{os.cpu_count()} cores")


def print_load(when: str) -> None:
    print(f"load average {when}: {' '.join(f'{load:.2f}' for load in os.getloadavg())}", flush=True)


def print_row(name: str, column: Column, bare: Column | None = None) -> None:
    cells = [f"{column.median(kind):14.3f}" for kind in ("cpu_seconds", "wall_seconds")]
    cells += [f"{column.ratio(bare, kind):12.3f}" for kind in ("cpu_seconds", "wall_seconds")] if bare else []
    print(f"{name:28}{''.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=12, help="of the CNN in each run; the first and last do not count"
    )
    parser.add_argument("--mixed-rounds", type=int, default=6, help="of the mixed fleet in each run, likewise")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each variant, in alternation")
    parser.add_argument("--workers", type=int, default=2, help="the larger number of workers, beside 1")
    parser.add_argument("--quick", action="store_true", help="one short run of each variant, to see that it works")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.mixed_rounds, options.repeats = 4, 3, 1
    if min(options.rounds, options.mixed_rounds) < 3 or options.repeats < 1 or options.workers < 2:
        parser.error("expected at least 3 rounds, 3 mixed rounds, 1 repeat and 2 workers")
    if any(os.environ.get(name) != value for name, value in _SINGLE_THREAD.items()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **_SINGLE_THREAD})
    many = options.workers
    print_machine()
    print_load("at the start")
    cnn = compare_cnn(options.rounds, options.repeats, (1, many))
    mixed = measure_mixed(options.mixed_rounds, options.repeats, (1, many))
    print(f"\n{'a round':28}{'CPU seconds':>14}{'wall seconds':>14}{'CPU x bare':>12}{'wall x bare':>12}")
    for count, (engine, bare) in cnn.items():
        print_row("CNN, bare loop", bare)
        print_row(f"CNN, engine, workers: {count}", engine, bare)
    for count, column in mixed.items():
        print_row(f"mixed fleet, workers: {count}", column)
    print_load("at the end")
    print(
        f"\ncpu_ratio={cnn[1][0].ratio(cnn[1][1], 'cpu_seconds'):.3f} "
        f"wall_ratio_{many}_workers={cnn[many][0].ratio(cnn[many][1], 'wall_seconds'):.3f} "
        f"mixed_cpu_seconds_per_round={mixed[1].median('cpu_seconds'):.2f} "
        f"mixed_wall_ratio_{many}_workers={mixed[many].ratio(mixed[1], 'wall_seconds'):.3f}"
    )


if __name__ == "__main__":
    main()
