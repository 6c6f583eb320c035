"""Clients without torch in whole federations: beside others in process, and on a real SuperNode."""

import json
import re
import threading
import time
from pathlib import Path

import pytest

from conf.compose import compose_conf, encode_conf
from server.federation import build_parts
from server.grid import InProcessGrid
from server.resources import descendants
from server.superlink import LoopbackFederation, app_folder

QUICK = ("evaluation.comparison=false", "evaluation.clients=false")
NAMES = ("sensor_board", "raspberry_pi", "phone", "workstation")
PRESENT = [f"fleet.classes.{name}.availability=1.0" for name in NAMES]
ROOMY = "fleet.classes.sensor_board.memory_bytes=1e9"
PLANS = {
    "full": (),
    "sparse": ("finetune=sparse", "data.calibration_examples=60"),
    "features kept, lite branches in the supernet": (
        "finetune=last_blocks",
        "finetune.feature_cache=true",
        "finetune.max_shift=0",
        "supernet.lite_residual=true",
    ),
}


def engines(*names: str) -> list[str]:
    return [f"fleet.classes.{name}.engine=onnxruntime" for name in names]


def rounds(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def run_in_process(conf, folder: Path) -> tuple:
    strategy = build_parts(conf).strategy(folder)
    with InProcessGrid(num_nodes=12, run_config={"config": encode_conf(conf)}, num_workers=2) as grid:
        strategy.start(grid, num_rounds=conf.rounds)
        return strategy, strategy.score_on_clients(grid)


@pytest.mark.slow
@pytest.mark.parametrize("plans", PLANS)
def test_a_class_without_torch_trains_beside_the_others_and_changes_no_more_than_rounding(plans, overrides, tmp_path):
    settings = ("rounds=1", "fleet.clients_per_round=12", *PLANS[plans], "finetune.learning_rate=0.01", ROOMY, *PRESENT)
    runs = {}
    for name, more in (("torch", ()), ("mixed", engines("sensor_board", "phone"))):
        conf = compose_conf(overrides(tmp_path / name, *settings, *more))
        runs[name] = (*run_in_process(conf, tmp_path / name), rounds(tmp_path / name)[0])
    (torch_run, torch_scores, torch_round), (mixed_run, mixed_scores, mixed_round) = runs["torch"], runs["mixed"]
    assert mixed_round["failures"] == torch_round["failures"] == []
    assert len(mixed_round["cohort"]) == 12
    assert mixed_round["loss"] == pytest.approx(torch_round["loss"], rel=1e-5)
    assert set(mixed_scores) == set(torch_scores) == set(NAMES)
    for name, values in torch_run.state.tensors.items():
        found = mixed_run.state.tensors[name]
        assert abs(found - values).max() <= 1e-4 * max(1.0, abs(values).max()), name
    assert mixed_run.state.digest() != torch_run.state.digest()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            ("supernet.norm=batch", "data.calibration_examples=20"),
            "one example at a time gives batch norm no statistics",
        ),
        (("finetune=lora",), "compiled steps train no factors of low rank; leave lora(r) out of finetune.plans"),
    ],
)
def test_clients_that_the_run_cannot_serve_sit_out_and_say_why(settings, why, overrides, tmp_path):
    conf = compose_conf(overrides(tmp_path / "run", *settings, *engines("phone", "workstation")))
    strategy = build_parts(conf).strategy(tmp_path / "run")
    with InProcessGrid(num_nodes=12, run_config={"config": encode_conf(conf)}, num_workers=1) as grid:
        clients, refused = strategy.enrol(grid)
    assert len(clients) + len(refused) == 12
    assert {item.profile.engine for item in clients} == {"torch"}
    assert refused
    for reason in refused.values():
        assert reason.startswith(f"engine onnxruntime: {why}")


def mapped(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


class Watch(threading.Thread):
    """Looks at what the clients' processes have mapped, until it is told to stop."""

    def __init__(self, keepers: list[int]) -> None:
        super().__init__(daemon=True)
        self.keepers, self.seen, self.done = keepers, set(), threading.Event()

    def run(self) -> None:
        while not self.done.is_set():
            for pid in (pid for keeper in self.keepers for pid in descendants(keeper)):
                if b"flwr-clientapp" in command_line(pid):
                    self.seen |= set(re.findall(r"libtorch|onnxruntime_pybind11_state", mapped(pid)))
            time.sleep(0.05)


@pytest.mark.slow
def test_on_a_supernode_the_clients_process_never_loads_torch(overrides, tmp_path):
    settings = (
        "rounds=1", "fleet.num_clients=2", "fleet.clients_per_round=2", "data.test_examples=4000",
        "evaluation.every=1", ROOMY, *PRESENT, *QUICK, *engines(*NAMES),
    )  # fmt: skip
    conf = compose_conf(overrides(tmp_path / "superlink", *settings))
    nodes = [{"partition-id": number, "num-partitions": 2} for number in range(2)]
    with LoopbackFederation(nodes) as federation:
        watch = Watch([pid for name, pid in federation.keeper_pids.items() if name.startswith("supernode")])
        watch.start()
        federation.run(app_folder(), {"config": encode_conf(conf)}, lambda line: None)
        watch.done.set()
        watch.join()
    assert watch.seen == {"onnxruntime_pybind11_state"}
    assert rounds(tmp_path / "superlink")[0]["failures"] == []

    strategy = build_parts(conf).strategy(tmp_path / "in_process")
    with InProcessGrid(num_nodes=2, run_config={"config": encode_conf(conf)}, num_workers=1) as grid:
        strategy.start(grid, num_rounds=1)
    summary = json.loads((tmp_path / "superlink/summary.json").read_text())
    assert strategy.state.digest() == summary["shared_digest"]
