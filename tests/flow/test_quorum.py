"""A round needs its quorum: it is tried again with other clients, or given up by name, and changes nothing then."""

import pytest
from deserted_app import NUM_DESERTERS

from clients.local import client_id
from conf.compose import compose_conf, encode_conf
from fedofa.types.errors import QuorumError
from server.federation import build_parts
from server.grid import InProcessGrid

DESERTERS = {client_id(number) for number in range(NUM_DESERTERS)}


@pytest.fixture
def federation(overrides, tmp_path):
    """Run rounds of 4 of 12 clients, 8 of whom never train; returns the strategy and the error that ended it, or ""."""

    def run(client_app: str, rounds: int, *more: str, checkpoint=None):
        always = [f"fleet.classes.{name}.availability=1" for name in ("sensor_board", "raspberry_pi", "phone")]
        size = ("fleet.clients_per_round=4", f"rounds={rounds}", "fleet.classes.workstation.availability=1")
        conf = compose_conf(overrides(tmp_path / "run", *always, *size, *more))
        strategy = build_parts(conf).strategy(tmp_path / "run")
        run_config = {"config": encode_conf(conf)}
        with InProcessGrid(client_app, num_nodes=12, run_config=run_config, num_workers=2) as grid:
            if checkpoint is not None:
                strategy.restore(strategy.checkpoints.load(strategy.run, checkpoint))
            try:
                strategy.start(grid, num_rounds=rounds)
            except QuorumError as error:
                return strategy, str(error)
        return strategy, ""

    return run


def test_a_round_without_its_quorum_is_tried_again_with_other_clients(federation):
    strategy, error = federation("deserted_app:app", 2, "fleet.quorum_fraction=1.0", "fleet.round_attempts=5")
    assert not error
    records = strategy.log.read()
    assert [record["outcome"] for record in records] == ["complete", "complete"]
    assert max(record["attempts"] for record in records) > 1
    for record in records:
        failed = {failure["client"] for failure in record["failures"]}
        assert failed <= DESERTERS
        assert not failed & {item["client"] for item in record["cohort"]}, "those that failed are not asked again"
        assert record["folded"] == len(record["cohort"]) == record["quorum"] == 4
        assert {failure["attempt"] for failure in record["failures"]} == set(range(1, record["attempts"]))
    assert strategy.state.version == 2


def test_rounds_are_given_up_by_name_and_a_run_of_them_ends_the_run(federation):
    more = ("fleet.quorum_fraction=1.0", "fleet.round_attempts=1", "fleet.max_lost_rounds=2")
    strategy, error = federation("deserted_app:app", 3, *more)
    assert "2 rounds in a row were given up, the last one round 2" in error
    assert "expected 4 (fleet.quorum_fraction)" in error
    assert "the line is dead" in error
    assert "resume=true" in error
    records = strategy.log.read()
    assert [(record["outcome"], record["folded"], record["loss"]) for record in records] == [("given up", 0, None)] * 2
    assert strategy.state.version == 0
    untouched = strategy.supernet.state().digest()
    assert strategy.state.digest() == untouched

    resumed, error = federation("clients.client_app:app", 3, *more, checkpoint=2)
    assert not error
    assert [record["outcome"] for record in resumed.log.read()] == ["given up", "given up", "complete"]
    assert resumed.state.digest() != untouched
