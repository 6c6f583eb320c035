"""A whole federation of each new family, in a space small enough for digits."""

import json

import pytest

TINY = {
    "proxyless": [
        "supernet=proxyless",
        "supernet.stem_width=8",
        "supernet.first_width=8",
        "supernet.stages=[{width: 16, stride: 2, activation: relu6, squeeze_excite: false}]",
        "supernet.last_stage={width: 24, stride: 2, activation: relu6, squeeze_excite: false}",
        "supernet.feature_width=32",
        "supernet.expands=[2,3]",
        "supernet.depths=[1,2]",
    ],
    "resnet": [
        "supernet=resnet50",
        "supernet.stem_width=32",
        "supernet.stages=[{width: 32, blocks: 1, stride: 1},{width: 64, blocks: 1, stride: 2}]",
        "supernet.expands=[0.25,0.5]",
        "supernet.depths=[0,1]",
        "supernet.widths=[0.5,1.0]",
    ],
}
COMMON = [
    "rounds=2",
    "supernet.resolutions=[20,28]",
    "supernet.norm=group",
    "supernet.dropout=0.0",
    "fleet.num_clients=8",
    "fleet.clients_per_round=4",
    "data.test_examples=200",
    "partition.client_test_fraction=0.9",
    "finetune.epochs=1",
    "fleet.classes.sensor_board.memory_bytes=2e7",
    "evaluation.comparison=false",
    "evaluation.clients=false",
]
PLANS = {"proxyless": "finetune.plans=[full]", "resnet": 'finetune.plans=["last_blocks(1)",bias]'}


@pytest.mark.slow
@pytest.mark.parametrize("family", TINY)
def test_a_small_space_of_the_family_runs_end_to_end(family, tmp_path, cache_dir, run_fedofa):
    output_dir = tmp_path / "run"
    summary = run_fedofa(
        output_dir, f"data.cache_dir={cache_dir}", f"output_dir={output_dir}", *COMMON, *TINY[family], PLANS[family]
    )
    assert summary["rounds"] == 2
    records = [json.loads(line) for line in (output_dir / "rounds.jsonl").read_text().splitlines()]
    for record in records:
        assert record["folded"] == len(record["cohort"]) > 0
        assert record["failures"] == []
    rows = {row["name"]: row for row in summary["subnets"]}
    assert rows["smallest"]["macs"] < rows["largest"]["macs"]
    assert all(0 <= row["accuracy"] <= 1 for row in rows.values())
    assert json.loads((output_dir / "supernet.json").read_text())["supernet"]["family"] == family
