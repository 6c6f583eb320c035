"""Law 9: a delta that fails verification never reaches the fold, and a failing client costs only itself."""

import pytest
from hostile_app import MISDEEDS

import server.strategy as strategy_module
from clients.local import client_id
from conf.compose import compose_conf, encode_conf
from server.federation import build_parts
from server.fleet import draw_cohort
from server.grid import InProcessGrid

NUM_CLIENTS = 20


def run(overrides, output_dir, client_app: str):
    size = (f"fleet.num_clients={NUM_CLIENTS}", f"fleet.clients_per_round={NUM_CLIENTS}")
    patience = ("fleet.reply_seconds=10", "fleet.quorum_fraction=0.1")
    conf = compose_conf(overrides(output_dir, "rounds=2", *size, *patience))
    parts = build_parts(conf)
    strategy = parts.strategy(output_dir)
    with InProcessGrid(
        client_app, num_nodes=NUM_CLIENTS, run_config={"config": encode_conf(conf)}, num_workers=2
    ) as grid:
        strategy.start(grid, num_rounds=2)
        states = grid.export_states()
    return strategy, states


@pytest.mark.slow
def test_a_run_with_every_kind_of_failure_equals_the_same_cohort_without_those_clients(
    overrides, tmp_path, monkeypatch
):
    hostile, states = run(overrides, tmp_path / "hostile", "hostile_app:app")
    culprits = {client_id(number) for number in MISDEEDS}
    for record in hostile.log.read():
        asked = {item["client"] for item in record["cohort"]}
        assert len(asked & culprits) >= 8, "most kinds of failure are there"
        assert {failure["client"] for failure in record["failures"]} == asked & culprits
        assert record["folded"] == len(asked - culprits) > 0
    reasons = {f["client"]: f["reason"] for record in hostile.log.read() for f in record["failures"]}
    expected = {0: "out of battery", 1: "signal 9", 2: "not finite", 4: "expected shape", 5: "surprise", 6: "client id",
                7: "round", 8: "base version", 9: "number of examples", 10: "checksum", 11: "packed buffer",
                12: "plan", 13: "missing", 14: "out of the fold's range",
                15: "no answer within 10 s"}  # fmt: skip
    for number, words in expected.items():
        if client_id(number) in reasons:
            assert words in reasons[client_id(number)], reasons[client_id(number)]
            assert client_id(number) in reasons[client_id(number)] or number in (10, 11)
    assert not {client_id(partition) for partition in states} & culprits, "a refused client keeps its state as it was"

    def without_culprits(*arguments):
        return [item for item in draw_cohort(*arguments) if item.client.client_id not in culprits]

    monkeypatch.setattr(strategy_module, "draw_cohort", without_culprits)
    clean, clean_states = run(overrides, tmp_path / "clean", "clients.client_app:app")
    assert clean.state.digest() == hostile.state.digest()
    assert clean_states == states
    assert all(not record["failures"] for record in clean.log.read())
