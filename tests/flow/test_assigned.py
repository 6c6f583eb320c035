"""Federations that assign by search: clients send what was measured on them, and a run that goes on finds it again."""

import json
import os

import pytest

from conf.compose import compose_conf
from fedofa.device.latency import Latency, roofline_table
from fedofa.device.operators import OperatorIndex
from fedofa.device.tables import LatencyTable
from fedofa.supernet.families import build_supernet
from fedofa.types.errors import ConfigError
from fedofa.types.space import SubnetConfig
from server import cli
from server.federation import build_parts

LIMIT_MS = 6.0


@pytest.fixture
def index(overrides, tmp_path):
    conf = compose_conf(overrides(tmp_path))
    return OperatorIndex.of(build_supernet({**conf.supernet, "in_channels": 1, "num_classes": 10}))


@pytest.fixture
def tables(index, tmp_path):
    """Files of a slow device, whose largest subnet is too slow, and of a damaged one."""
    slow = roofline_table(
        index, macs_per_second=1e8, bytes_per_second=1e9, launch_ms=0.02, engine="slow", source="made up"
    )
    (tmp_path / "slow.json").write_text(json.dumps(slow.to_json()))
    (tmp_path / "damaged.json").write_text(json.dumps(slow.to_json()).replace("made up", "measured"))
    return [
        f"assignment.latency_ms={LIMIT_MS}",
        f"fleet.classes.workstation.device={tmp_path / 'slow.json'}",
        f"fleet.classes.phone.device={tmp_path / 'damaged.json'}",
        "evaluation.comparison=false",
        "runtime.num_workers=1",
    ]


@pytest.mark.slow
def test_clients_are_assigned_by_what_they_send_and_pairs_train_a_predictor(
    simulate, overrides, tables, index, tmp_path, capsys
):
    run = tmp_path / "run"
    whole = simulate(run, *tables, "evaluation.pairs_per_round=4")
    refused = {name: why for name, why in whole["sitting_out"].items() if "its device profile is not taken" in why}
    assert refused and all("damaged" in why for why in refused.values())
    kept = sorted((run / "devices").iterdir())
    measured = [json.loads(path.read_text()) for path in kept]
    tables_kept = [LatencyTable.from_json(item["table"]) for item in measured]  # others have nothing to keep
    assert 0 < len(tables_kept) < whole["num_clients"] - len(refused)
    table = tables_kept[0]
    latency = Latency(index, table)
    (row,) = [row for row in whole["subnets"] if row["name"] == "workstation"]
    space = index.encoding.space
    values = {
        name: [space.axis(name).values[0] if value is None else value for value in chosen]
        for name, chosen in row["choices"].items()
    }
    assert latency.predict_one(space.subnet(**values)).value <= LIMIT_MS < latency.predict_one(space.largest()).value
    assert row["binding"] == "latency"

    pairs = [json.loads(line) for line in (run / "pairs.jsonl").read_text().splitlines()]
    assert [pair["round"] for pair in pairs] == [1] * 4 + [2] * 4 + [3] * 4
    assert all(0 <= pair["accuracy"] <= 1 and pair["num_examples"] > 0 for pair in pairs)
    for pair in pairs:
        space.check(SubnetConfig.from_json(pair["subnet"]))
    settings = [item for item in overrides(run) if item.startswith("supernet.")]
    predictor = tmp_path / "predictor.safetensors"
    words = [f"pairs={run}", f"output={predictor}", "supernet=small", "in_channels=1", "num_classes=10", *settings]
    assert cli.main(["predictor", *words]) == 0
    assert "held-out ones: rank correlation" in capsys.readouterr().out

    stamps = {path: os.stat(path).st_mtime_ns for path in kept}
    written = (run / "pairs.jsonl").read_text()
    resumed = simulate(run, *tables, "evaluation.pairs_per_round=4", "resume=true", "resume_round=2")
    assert resumed["shared_digest"] == whole["shared_digest"]
    assert {path: os.stat(path).st_mtime_ns for path in (run / "devices").iterdir()} == stamps
    assert (run / "pairs.jsonl").read_text() == written


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["assignment.by=magic"], "assignment.by: expected one of"),
        (["assignment.by=rule", "assignment.latency_ms=5"], "latency_ms: only assigning by search.*assignment.by=rule"),
        (
            ["shrinking=sandwich", "assignment.link_probe_bytes=5"],
            "link_probe_bytes: only .*sandwich",
        ),
        (["assignment.by=search", "assignment.latency_ms=-5"], "assignment.latency_ms: expected a positive"),
        (["assignment.by=search", "assignment.bytes_up=-5"], "bytes_up: expected a positive"),
        (["assignment.by=search", "assignment.link_probe_bytes=-5"], "link_probe_bytes: expected 0 to"),
        (["assignment.by=search", "assignment.archive_devices=1"], "archive: expected at least 8"),
        (["assignment.by=search", "shrinking=sandwich"], "a shrinking schedule deals"),
        (["evaluation.pairs_per_round=-1"], "evaluation.pairs_per_round: expected a number of at least 0"),
    ],
    ids=range(9),
)
def test_settings_that_do_not_go_together_are_refused(overrides, tmp_path, settings, reason):
    with pytest.raises(ConfigError, match=reason):
        build_parts(compose_conf(overrides(tmp_path, *settings)))


def test_limits_on_subnets_are_refused_where_there_is_only_one(tmp_path):
    conf = compose_conf([f"output_dir={tmp_path}", "supernet=fixed", "assignment.macs=5"])
    with pytest.raises(ConfigError, match="macs: only assigning by search heeds it.*one network"):
        build_parts(conf)
