"""The Flower ServerApp: builds the federation from the run config, runs it, and leaves its results in `output_dir`."""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from conf.compose import load_conf
from conf.schema import SimulateConf
from fedofa.types.errors import CheckpointError
from server.federation import Parts, build_parts
from server.outputs import exclusive, set_aside, write_outputs
from server.progress import Progress
from server.strategy import FedOFA
from server.tracking.following import Tracking

app = ServerApp()

COMPARISON = "fedavg_weakest"


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation, then (with `evaluation.comparison`) federated averaging on the weakest device's subnet."""
    conf = load_conf(context.run_config)
    torch.set_num_threads(1)  # the fold must not depend on how many there are
    output_dir = Path(conf.output_dir).resolve()
    with exclusive(output_dir):
        _main(grid, conf, output_dir)


def _main(grid: Grid, conf: SimulateConf, output_dir: Path) -> None:
    parts = build_parts(conf)
    with Tracking(conf, output_dir) as tracking:
        with Progress(conf.rounds) as progress:
            strategy = _run(parts, output_dir, grid, progress, tracking)
            on_clients = strategy.score_on_clients(grid) if conf.evaluation.clients else {}
            comparison = None
            if conf.evaluation.comparison:
                progress.next_run("FedAvg, weakest device's subnet")
                comparison = _run(parts, output_dir / COMPARISON, grid, progress, tracking, uniform=True)
        tracking.results(write_outputs(parts, strategy, on_clients, comparison, output_dir))


def _run(
    parts: Parts, output_dir: Path, grid: Grid, progress: Progress, tracking: Tracking, *, uniform: bool = False
) -> FedOFA:
    """One strategy from its checkpoint, or from the start, to the last round."""
    strategy = parts.strategy(output_dir, uniform=uniform)
    if parts.conf.resume:
        _restore(strategy, parts.conf)
    strategy.prepare(grid)
    if not parts.conf.resume and not uniform:
        set_aside(output_dir)
    strategy.observers += [progress, *tracking.follow(strategy, output_dir)]
    strategy.start(grid, num_rounds=parts.conf.rounds)
    return strategy


def _restore(strategy: FedOFA, conf: SimulateConf) -> None:
    if strategy.settings.uniform:  # it can be run again, so a damaged checkpoint of it is not worth a question
        checkpoint = strategy.checkpoints.newest_intact(strategy.run)
    else:
        checkpoint = strategy.checkpoints.load(strategy.run, conf.resume_round)
    if checkpoint is None:
        strategy.checkpoints.drop_after(0)
        strategy.log.cut(0)
        return
    if checkpoint.round > conf.rounds:
        raise CheckpointError(
            f"{strategy.checkpoints.folder}: the newest checkpoint is of round {checkpoint.round}, beyond rounds="
            f"{conf.rounds}; ask for at least as many rounds, or for an older one with resume_round"
        )
    strategy.restore(checkpoint)
    strategy.supernet.set_ordering(checkpoint.state.ordering)
