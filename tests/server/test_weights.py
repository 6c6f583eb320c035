"""A supernet's files: what one run leaves is what another starts from, or one clear error."""

import json

import numpy as np
import pytest
from cohorts import build_supernet

from fedofa.types.errors import CheckpointError
from server.weights import start_from, write_supernet


def written(folder, supernet):
    write_supernet(folder, supernet.state(), supernet.description(), {"mean": [0.5], "std": [0.25]})
    return folder


def test_weights_and_ordering_come_back(tmp_path):
    for norm in ("group", "batch"):
        source, target = build_supernet(1, norm=norm), build_supernet(2, norm=norm, shuffled=False)
        start_from(target, written(tmp_path, source))
        assert target.state().digest() == source.state().digest()
        start_from(target, tmp_path / "supernet.safetensors")
    assert not list(tmp_path.glob("*writing*"))
    assert json.loads((tmp_path / "supernet.json").read_text())["normalisation"] == {"mean": [0.5], "std": [0.25]}


def test_a_supernet_of_another_space_is_refused_by_setting(tmp_path):
    written(tmp_path, build_supernet(norm="batch"))
    supernet = build_supernet(norm="group")
    before = supernet.state().digest()
    with pytest.raises(CheckpointError, match=r"supernet_weights: .*another space: norm: 'batch' there, 'group' here"):
        start_from(supernet, tmp_path)
    assert supernet.state().digest() == before


@pytest.mark.parametrize("damage", ["missing", "truncated", "no description", "wrong tensors"])
def test_damaged_files_are_refused(tmp_path, damage):
    supernet = build_supernet()
    written(tmp_path, supernet)
    tensors, description = tmp_path / "supernet.safetensors", tmp_path / "supernet.json"
    if damage == "missing":
        tensors.unlink()
    elif damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:1000])
    elif damage == "no description":
        description.write_text("[]")
    else:
        state = supernet.state()
        content = json.loads(description.read_text())
        few = {**state.tensors, "classifier.bias": np.zeros(3, np.float32)}
        write_supernet(tmp_path, type(state)(0, few), content["supernet"], content["normalisation"])
    with pytest.raises(CheckpointError, match="supernet_weights"):
        start_from(build_supernet(), tmp_path)
