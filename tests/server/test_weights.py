"""A supernet's files: what one run leaves is what another starts from, or one clear error."""

import json

import numpy as np
import pytest
import torch
from cohorts import build_supernet

from fedofa.supernet import MobileNetV3Supernet, save_published
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec
from fedofa.types.errors import CheckpointError
from server.weights import start_from, write_supernet

DRAWS = torch.Generator().manual_seed(3)


def written(folder, supernet):
    write_supernet(folder, supernet.state(), supernet.description(), {"mean": [0.5], "std": [0.25]})
    return folder


def test_weights_and_ordering_come_back(tmp_path):
    for norm in ("group", "batch"):
        source, target = build_supernet(1, norm=norm), build_supernet(2, norm=norm, shuffled=False)
        start_from(target, written(tmp_path, source), DRAWS)
        assert target.state().digest() == source.state().digest()
        start_from(target, tmp_path / "supernet.safetensors", DRAWS)
    assert not list(tmp_path.glob("*writing*"))
    assert json.loads((tmp_path / "supernet.json").read_text())["normalisation"] == {"mean": [0.5], "std": [0.25]}


def test_a_supernet_of_another_space_is_refused_by_setting(tmp_path):
    written(tmp_path, build_supernet(norm="batch"))
    supernet = build_supernet(norm="group")
    before = supernet.state().digest()
    with pytest.raises(CheckpointError, match=r"supernet_weights: .*another space: norm: 'batch' there, 'group' here"):
        start_from(supernet, tmp_path, DRAWS)
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
        start_from(build_supernet(), tmp_path, DRAWS)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A published file of random weights, and the supernet in it."""
    supernet = MobileNetV3Supernet(MobileNetV3Spec(num_classes=12), torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("published") / "mbv3.pth"
    save_published(supernet, path)
    return path, supernet.state().tensors


def mobilenet(num_classes, width=1.0, **sizes):
    return MobileNetV3Supernet(MobileNetV3Spec(num_classes=num_classes, **sizes).scaled(width), DRAWS)


def test_a_published_file_is_a_start(published):
    path, tensors = published
    supernet = mobilenet(12)
    assert start_from(supernet, path, DRAWS) is None
    for name, value in supernet.state().tensors.items():
        np.testing.assert_array_equal(value, tensors[name])
    assert supernet.normalisation == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def test_a_published_file_of_other_classes_starts_with_a_fresh_classifier_and_says_so(published):
    path, tensors = published
    supernet = mobilenet(10)
    note = start_from(supernet, path, DRAWS)
    assert note == "supernet_weights: the classifier of mbv3.pth has 12 classes: this run starts with a fresh one"
    for name, value in supernet.state().tensors.items():
        if name.startswith("classifier."):
            assert len(value) == 10
        else:
            np.testing.assert_array_equal(value, tensors[name])
    assert supernet.state().tensors["classifier.weight"].std() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: mobilenet(12, 1.2),
            r"supernet_weights: .*The file is of ofa_mbv3_d234_e346_k357_w1\.0, not of .*w1\.2",
        ),
        (lambda: mobilenet(12, in_channels=1), r"supernet_weights: .*has no published format.*3 channels"),
        (build_supernet, r"supernet_weights: .*has no published format"),
    ],
    ids=["width", "channels", "sizes"],
)
def test_a_published_file_of_another_space_is_refused_and_nothing_is_taken(published, make, message):
    supernet = make()
    before = supernet.state().digest()
    with pytest.raises(CheckpointError, match=message):
        start_from(supernet, published[0], DRAWS)
    assert supernet.state().digest() == before


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no tensors")
    with pytest.raises(CheckpointError, match=r"supernet_weights: .*notes\.txt"):
        start_from(mobilenet(12), tmp_path / "notes.txt", DRAWS)
