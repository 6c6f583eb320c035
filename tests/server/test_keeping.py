"""What a run keeps on disk: checkpoints, the diary, the folder that only one run may write to."""

import json
import subprocess
import sys

import numpy as np
import pytest

from fedofa.types.errors import CheckpointError, ConfigError
from fedofa.types.state import SharedState
from server.checkpoint import Checkpoint, CheckpointStore, Totals
from server.outputs import exclusive, set_aside
from server.rounds import Attempt, RoundLog, RoundRecord

RUN = {"seed": 0, "fleet.num_clients": 3}


def checkpoint(number: int) -> Checkpoint:
    rng = np.random.default_rng(number)
    tensors = {"a.weight": rng.standard_normal((3, 2)).astype(np.float32), "a.count": np.array(number)}
    moments = {"momentum": {"a.weight": rng.standard_normal((3, 2)).astype(np.float32)}}
    state = SharedState(number, tensors, {"g": rng.permutation(8)}, moments)
    return Checkpoint(number, state, {2: b"state of client 2"}, Totals(bytes_up=number), RUN, "abc", 10 * number)


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.load(RUN) is None
    for number in (1, 2, 3):
        store.save(checkpoint(number))
    assert store.rounds() == [2, 3], "the newest two are kept"
    got, expected = store.load(RUN), checkpoint(3)
    assert got is not None
    assert got.state.digest() == expected.state.digest()
    assert got.state.tensors["a.count"].shape == ()
    assert np.array_equal(got.state.moments["momentum"]["a.weight"], expected.state.moments["momentum"]["a.weight"])
    assert (got.round, got.client_states, got.totals, got.fleet, got.log_bytes) == (
        3, expected.client_states, expected.totals, "abc", 30,
    )  # fmt: skip
    assert store.load(RUN, 2).state.version == 2


def test_a_half_written_checkpoint_does_not_count(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(checkpoint(1))
    (tmp_path / ".writing-000002").mkdir()
    (tmp_path / ".writing-000002/state.safetensors").write_bytes(b"half")
    assert store.rounds() == [1]
    store.save(checkpoint(2))
    assert store.rounds() == [1, 2]


@pytest.mark.parametrize("name", ["state.safetensors", "checkpoint.json"])
def test_damage_at_any_place_is_refused(tmp_path, name):
    store = CheckpointStore(tmp_path)
    for number in (1, 2):
        store.save(checkpoint(number))
    path = tmp_path / "round-000002" / name
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[:size] for size in rng.integers(0, len(whole), 8)]
    if name == "state.safetensors":
        for place in rng.integers(0, len(whole), 12):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << int(rng.integers(8))
            damaged.append(bytes(flipped))
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="resume_round=1"):
            store.load(RUN)
    assert store.newest_intact(RUN).round == 1
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read.*resume_round=1"):
        store.load(RUN)


def test_another_runs_checkpoint_is_refused_by_setting(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(checkpoint(1))
    with pytest.raises(CheckpointError, match=r"fleet\.num_clients: 3 then, 4 now"):
        store.load({**RUN, "fleet.num_clients": 4})
    assert store.newest_intact({**RUN, "seed": 9}) is None


def test_the_diary_is_cut_back_to_the_checkpoint_and_never_silently_shorter(tmp_path):
    log = RoundLog(tmp_path / "rounds.jsonl")
    log.cut(0)
    lengths = [log.append(RoundRecord(number, [Attempt([], 1)])) for number in (1, 2, 3)]
    with log.path.open("ab") as file:
        file.write(b'{"round": 4, "torn')
    log.cut(lengths[1])
    assert [line["round"] for line in log.read()] == [1, 2]
    with pytest.raises(CheckpointError, match="shorter"):
        log.cut(lengths[2])
    log.cut(0)
    assert log.read() == []


def test_only_one_run_writes_to_a_folder(tmp_path):
    folder = tmp_path / "run"
    script = (
        "import sys; from pathlib import Path; from server.outputs import exclusive\n"
        "with exclusive(Path(sys.argv[1])): pass"
    )
    other = [sys.executable, "-c", script, str(folder)]
    with exclusive(folder):
        done = subprocess.run(other, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode != 0
        assert "another run is writing to" in done.stderr
    assert subprocess.run(other, check=False, timeout=120).returncode == 0


def test_an_earlier_run_is_moved_aside(tmp_path):
    folder = tmp_path / "run"
    for number in range(3):
        set_aside(folder)
        (folder / "summary.json").write_text(json.dumps(number))
    kept = sorted(json.loads((path / "summary.json").read_text()) for path in tmp_path.iterdir())
    assert kept == [0, 1, 2]
    with pytest.raises(ConfigError, match="cannot be written"), exclusive(folder / "summary.json" / "run"):
        pass
