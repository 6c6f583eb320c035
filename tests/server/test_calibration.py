"""Federated calibration: the clients' sums are the central ones, whoever answers first, and bad ones do not count."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cohorts import SPEC, build_supernet
from flwr.app import Error, Message

from clients.records import packed_buffer, packed_content
from fedofa.data.federation import Examples
from fedofa.device.cost import AnalyticCostModel, forward_bytes
from fedofa.evaluation.calibration import apply_sums, calibrate, statistic_sums
from fedofa.finetune.inputs import prepare_inputs
from fedofa.finetune.plans import build_plan
from fedofa.finetune.recipe import LocalTraining
from fedofa.search.fit import FitSearch
from fedofa.supernet.base import fill_skeleton
from fedofa.supernet.mobilenet_v3 import MobileNetV3Supernet
from fedofa.types.device import DeviceProfile
from fedofa.types.errors import ConfigError, QuorumError
from fedofa.types.plan import FineTunePlan
from fedofa.types.statistics import ChannelSums, SubnetStatistics
from fedofa.update.exchange import ClientTask, decode_task, encode_statistics, encode_task
from server.calibration import CALIBRATE, FleetCalibration, norm_sizes
from server.carrier import assume_identity
from server.fleet import ClientInfo
from server.planning import Planner
from server.rounds import RoundRecord
from server.scoring import Scorer

SUPERNET = build_supernet(norm="batch")
STATE = replace(SUPERNET.state(), version=4)
SUBNETS = [SUPERNET.space.subnet(kernel=3, depth=1, resolution=16), SUPERNET.space.largest()]
NORMALISATION = {"mean": [0.4], "std": [0.3]}
IMAGES = np.random.default_rng(0).integers(0, 256, (41, 1, 20, 20)).astype(np.uint8)
BOUNDS = {"client-b": (0, 9), "client-a": (9, 30), "client-c": (30, 41)}
EMPTY = Examples(IMAGES[:0], np.zeros(0, np.int64))
SCORER = Scorer(SUPERNET, Examples(IMAGES[:2], np.zeros(2, np.int64)), EMPTY, NORMALISATION, by="clients")
PLANS = [[lambda blocks: build_plan("full", blocks)]]
SEARCH = FitSearch(SUPERNET.space, SUPERNET.block_costs, PLANS, AnalyticCostModel())
PLANNER = Planner(SEARCH, LocalTraining(), 60.0, "float32")


def test_a_last_batch_of_one_image_calibrates_where_maps_are_of_one_pixel():
    """A batch norm in training refuses one value a channel."""
    supernet = MobileNetV3Supernet(replace(SPEC, norm="batch", resolutions=(4,)), torch.Generator().manual_seed(0))
    images = np.random.default_rng(1).integers(0, 256, (101, 1, 20, 20)).astype(np.uint8)
    test, calibration = Examples(images[:5], np.zeros(5, np.int64)), Examples(images, np.zeros(101, np.int64))
    scorer, largest = Scorer(supernet, test, calibration, NORMALISATION), supernet.space.largest()
    built = scorer.build(supernet.state(), largest).state_dict()
    whole = supernet.build(largest)
    assert calibrate(whole, [scorer._inputs(calibration, largest)[:]])
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(built[name], value, atol=1e-4, rtol=1e-4, msg=name)
    with pytest.raises(ConfigError, match="expected at least 2 for a supernet with batch norm, found 1"):
        Scorer(supernet, test, Examples(images[:1], np.zeros(1, np.int64)), NORMALISATION)


def infos(**memory) -> list[ClientInfo]:
    return [
        ClientInfo(node, name, DeviceProfile("any", memory.get(name[-1], 1e9), 1e9, 1e9, 1e9), end - start, 0)
        for node, (name, (start, end)) in enumerate(BOUNDS.items(), start=7)
    ]


def inputs(subnet, start=0, end=41) -> torch.Tensor:
    return prepare_inputs(IMAGES[start:end], [0.4], [0.3], SUPERNET.resolution(subnet))


def payload(server_round, state, subnet) -> bytes:
    task = ClientTask(server_round, state.version, subnet, FineTunePlan("none", ()), {}, {}, NORMALISATION, 0)
    return encode_task(task, SUPERNET.slice_map(subnet).extract(state.tensors))


class Clients:
    """Answers from the tensors it is sent; `order` says whose answer comes first, `spoil` what some send instead."""

    def __init__(self, order=lambda names: names, spoil=None):
        assume_identity(1, 0)
        self.order, self.spoil, self.asked = order, spoil or {}, []

    def __call__(self, messages):
        names = {info.node_id: info.client_id for info in infos()}
        waiting = {names[message.metadata.dst_node_id]: message for message in messages}
        self.asked.append(sorted(waiting))
        for name in self.order(list(waiting)):
            yield self.answer(name, waiting[name])

    def answer(self, name, message) -> Message:
        assert message.metadata.message_type == CALIBRATE
        if self.spoil.get(name) == "fails":
            return Message(Error(2, "broken"), reply_to=message)
        task, received = decode_task(packed_buffer(message))
        tensors = {key: torch.from_numpy(np.array(value)) for key, value in received.items()}
        module = fill_skeleton(SUPERNET.skeleton(task.subnet), tensors)
        start, end = BOUNDS[name]
        sums = statistic_sums(module, [inputs(task.subnet, start, end)])
        statistics = SubnetStatistics(name, task.round, task.subnet, task.version, end - start, sums)
        spoiled = self.spoil.get(name, lambda same: same)(statistics)
        return Message(packed_content(encode_statistics(spoiled)), reply_to=message)


def collect(clients, infos_=None, subnets=SUBNETS):
    record = RoundRecord(5)
    calibration = FleetCalibration(SCORER, PLANNER, payload)
    return calibration.sums(clients, 5, STATE, subnets, infos_ or infos(), record), record


@pytest.mark.parametrize("subnet", SUBNETS, ids=["small", "largest"])
def test_merged_over_the_clients_they_are_the_central_ones_of_all_images(subnet):
    merged, record = collect(Clients())
    module, central = SCORER.build(STATE, subnet, merged), SUPERNET.build(subnet)
    calibrate(central, [inputs(subnet, *bounds) for bounds in BOUNDS.values()])
    for (name, got), (_, expected) in zip(module.named_buffers(), central.named_buffers(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6, msg=name)
    whole = statistic_sums(SUPERNET.build(subnet), [inputs(subnet)])
    first = merged[subnet]["stem.norm"]
    assert first.count == whole["stem.norm"].count == 41 * norm_sizes(SCORER, subnet)["stem.norm"][1]
    np.testing.assert_allclose(first.total, whole["stem.norm"].total, rtol=1e-6, atol=1e-6)
    assert record.bytes_up > 0
    assert record.bytes_down == 3 * sum(len(payload(5, STATE, item)) for item in SUBNETS)


def test_the_order_of_arrival_changes_no_bit():
    one, other = (collect(Clients(order))[0] for order in (sorted, lambda names: sorted(names)[::-1]))
    for subnet in SUBNETS:
        for name, sums in one[subnet].items():
            assert sums.total.tobytes() == other[subnet][name].total.tobytes()
            assert sums.squares.tobytes() == other[subnet][name].squares.tobytes()


def test_positions_are_those_of_each_norm():
    for subnet in SUBNETS:
        module, seen = SUPERNET.build(subnet), norm_sizes(SCORER, subnet)
        for name, sums in statistic_sums(module, [inputs(subnet, 0, 4)]).items():
            assert seen[name] == (len(sums.total), sums.count // 4)
        assert set(seen) == {name for name, child in module.named_modules() if isinstance(child, torch.nn.BatchNorm2d)}


def negative(statistics):
    bad = {name: ChannelSums(s.count, s.total, -1 - s.squares) for name, s in statistics.sums.items()}
    return replace(statistics, sums=bad)


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ("fails", "client 'client-a' failed: broken"),
        (negative, "a variance is negative"),
        (lambda statistics: replace(statistics, base_version=3), "base version: expected 4, found 3"),
    ],
)
def test_a_bad_answer_costs_only_its_client(spoiled, message):
    merged, record = collect(Clients(spoil={"client-a": spoiled}))
    without, _ = collect(Clients(), [info for info in infos() if info.client_id != "client-a"])
    assert list(record.calibration_failures) == ["client-a"]
    assert message in record.calibration_failures["client-a"]
    for subnet in SUBNETS:
        for name, sums in merged[subnet].items():
            assert sums.total.tobytes() == without[subnet][name].total.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("supernet.norm=batch", "smallest", "150", "100"),
        ("supernet=medium supernet.norm=batch", "largest", "100", "100"),
        ("supernet=medium", "largest", "60", "8"),
    ],
    ids=" ".join,
)
def test_a_client_scores_and_observes_within_the_memory_that_is_counted(arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    script = [sys.executable, str(Path(__file__).with_name("forward_script.py")), *arguments]
    printed = subprocess.run(script, env=environment, capture_output=True, text=True, check=True).stdout
    measured, counted = map(int, printed.split())
    assert 0.2 * counted < measured <= counted


def test_only_clients_whose_memory_holds_the_subnet_are_asked():
    small, largest = SUBNETS
    whole = replace(PLANNER.work(21), batch_size=21)
    limit = forward_bytes(SUPERNET.block_costs(small), whole) + 10.0
    assert forward_bytes(SUPERNET.block_costs(small), PLANNER.work(21)) < limit, "training takes fewer at a time"
    assert forward_bytes(SUPERNET.block_costs(largest), whole) > limit
    clients = Clients()
    collect(clients, infos(a=limit))
    assert clients.asked == [["client-a", "client-b", "client-c"], ["client-b", "client-c"]]


def test_without_any_usable_answer_the_run_ends_with_the_reason():
    spoil = {name: "fails" for name in BOUNDS}
    with pytest.raises(QuorumError, match=r"none of 3 clients gave usable statistics .*broken.*calibration=server"):
        collect(Clients(spoil=spoil))
    with pytest.raises(QuorumError, match="no available client can hold it"):
        collect(Clients(), infos(a=1.0, b=1.0, c=1.0))


def test_applied_statistics_are_in_the_module():
    merged, _ = collect(Clients(), subnets=SUBNETS[:1])
    module = SUPERNET.build(SUBNETS[0])
    apply_sums(module, merged[SUBNETS[0]])
    built = SCORER.build(STATE, SUBNETS[0], merged)
    assert all(torch.equal(value, built.state_dict()[name]) for name, value in module.state_dict().items())
