"""A server with 8 M-parameter replies, in a process of its own: `python scale_script.py NUM_CLIENTS COHORT KIND`.

KIND is "equal" (every client trains the largest subnet) or "unlike" (nearly every client has another subnet). Prints
one JSON line: what was folded and the peak resident memory of this process, and of all its workers too.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fedofa.aggregation.server_optimisers import Momentum
from fedofa.data.federation import Examples
from fedofa.device.cost import AnalyticCostModel
from fedofa.finetune.plans import build_plan
from fedofa.finetune.recipe import LocalTraining
from fedofa.search.fit import FitSearch
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec, MobileNetV3Supernet
from server.checkpoint import CheckpointStore
from server.grid import InProcessGrid
from server.planning import Planner
from server.resources import tree_usage
from server.rounds import RoundLog
from server.scoring import Scorer
from server.settings import FederationSettings
from server.strategy import FedOFA

NUM_ROUNDS = 2
NUM_WORKERS = 2


def build_strategy(num_clients: int, cohort: int, folder: Path) -> FedOFA:
    spec = MobileNetV3Spec(
        in_channels=1, num_classes=10, final_width=1664, feature_width=1664, resolutions=(32,), norm="group"
    )
    supernet = MobileNetV3Supernet(spec, torch.Generator().manual_seed(0))
    plan_of = partial(build_plan, "full", recompute=False, statistics="batch")
    images, labels = np.zeros((2, 1, 32, 32), np.uint8), np.zeros(2, np.int64)
    search = FitSearch(supernet.space, supernet.block_costs, [[plan_of]], AnalyticCostModel())
    settings = FederationSettings(
        seed=0,
        clients_per_round=cohort,
        max_in_flight=NUM_WORKERS + 2,
        reply_seconds=300,
        num_clients=num_clients,
        join_seconds=0,
        evaluate_every=NUM_ROUNDS,
        float_dtype="float32",
    )
    return FedOFA(
        supernet=supernet,
        state=supernet.state(),
        planner=Planner(search, LocalTraining(), round_seconds=1e6, float_dtype="float32"),
        optimiser=Momentum(1.0, 0.9),
        scorer=Scorer(
            supernet, Examples(images, labels), Examples(images[:0], labels[:0]), {"mean": [0.5], "std": [0.5]}
        ),
        settings=settings,
        checkpoints=CheckpointStore(folder / "checkpoints"),
        log=RoundLog(folder / "rounds.jsonl"),
        run={},
    )


def peak_bytes() -> int:
    """Of this program alone: `getrusage` would hand down the peak of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def main(num_clients: int, cohort: int, kind: str) -> None:
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        InProcessGrid(
            "scale_apps:app", num_nodes=num_clients, run_config={"kind": kind}, num_workers=NUM_WORKERS
        ) as grid,
    ):
        strategy = build_strategy(num_clients, cohort, Path(folder))
        strategy.start(grid, num_rounds=NUM_ROUNDS)
        summed_peak_bytes = tree_usage()[1]
        rounds = strategy.log.read()
        largest = strategy.supernet.slice_map(strategy.supernet.space.largest())
    facts = {
        "parameters": sum(int(np.prod(largest[name].shape)) for name in largest.trainable),
        "folded": [record["folded"] for record in rounds],
        "failures": [failure["reason"] for record in rounds for failure in record["failures"]],
        "distinct_subnets": [len({item["subnet"] for item in record["cohort"]}) for record in rounds],
        "seconds": [record["wall_seconds"] for record in rounds],
        "peak_bytes": peak_bytes(),
        "summed_peak_bytes": summed_peak_bytes,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
