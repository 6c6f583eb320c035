"""A supernet's files: what one run leaves is what another starts from, or one clear error."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from cohorts import build_supernet

from fedofa.data.sources import ImageSet
from fedofa.supernet import MobileNetV3Supernet, save_published
from fedofa.supernet.chain import BlockSize, ChainSpec
from fedofa.supernet.families import build_elastic
from fedofa.supernet.fixed import FixedSupernet
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec
from fedofa.types.errors import CheckpointError, MisfitError
from server.weights import normalisation_for, start_from, write_supernet

DRAWS = torch.Generator().manual_seed(3)


def written(folder, supernet):
    write_supernet(folder, supernet.state(), supernet.description(), {"mean": [0.5], "std": [0.25]})
    return folder


def rewrite(folder, change):
    path = folder / "supernet.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_weights_and_ordering_come_back(tmp_path):
    for norm in ("group", "batch"):
        source, target = build_supernet(1, norm=norm), build_supernet(2, norm=norm, shuffled=False)
        start_from(target, written(tmp_path, source), DRAWS)
        assert target.state().digest() == source.state().digest()
        start_from(target, tmp_path / "supernet.safetensors", DRAWS)
    assert not list(tmp_path.glob("*writing*"))
    assert json.loads((tmp_path / "supernet.json").read_text())["normalisation"] == {"mean": [0.5], "std": [0.25]}


def test_the_normalisation_that_weights_were_trained_with_comes_back(published, tmp_path):
    """From a published file by way of a run's folder, as in `shrink` and then `simulate`."""
    shrunk, supernet = mobilenet(12), mobilenet(12)
    start_from(shrunk, published[0], DRAWS)
    write_supernet(tmp_path, shrunk.state(), shrunk.description(), shrunk.normalisation)
    start_from(supernet, tmp_path, DRAWS)
    assert supernet.normalisation == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.mark.parametrize("absent", [True, False])
def test_a_folder_without_a_normalisation_leaves_the_datas_own(tmp_path, absent):
    source, supernet = build_supernet(1), build_supernet(2)
    written(tmp_path, source)
    rewrite(tmp_path, lambda content: content.pop("normalisation") if absent else content.update(normalisation={}))
    start_from(supernet, tmp_path, DRAWS)
    assert supernet.normalisation is None
    assert supernet.state().digest() == source.state().digest()


@pytest.mark.parametrize(
    "found", [[0.5], {"mean": [0.5]}, {"mean": [0.5], "std": [0.0]}, {"mean": [0.5, 0.5], "std": [1]}, {"mean": 1}]
)
def test_a_normalisation_that_is_none_is_refused_and_nothing_is_taken(tmp_path, found):
    supernet = build_supernet(2)
    before = supernet.state().digest()
    written(tmp_path, build_supernet(1))
    rewrite(tmp_path, lambda content: content.update(normalisation=found))
    with pytest.raises(CheckpointError, match=r"supernet\.json: normalisation: expected \"mean\" and \"std\".*found"):
        start_from(supernet, tmp_path, DRAWS)
    assert supernet.state().digest() == before and supernet.normalisation is None


def measurements(channels, rows):
    shape = (2, channels, rows, 4)
    statistics = tuple(float(x) for x in range(1, channels * rows + 1))
    return ImageSet("sensors", ("a", "b"), np.zeros(shape, np.float32), np.zeros(2, np.int64), None, *[statistics] * 2)


@pytest.mark.parametrize("values", [2, 6])
def test_a_normalisation_of_channels_or_of_rows_is_the_weights_own(values):
    supernet = build_supernet(1)
    assert normalisation_for(supernet, measurements(2, 3))["std"] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    supernet.normalisation = {"mean": [0.0] * values, "std": [0.5] * values}
    assert normalisation_for(supernet, measurements(2, 3)) == supernet.normalisation


def test_a_normalisation_of_another_shape_is_refused_with_what_it_should_have():
    supernet = build_supernet(1)
    supernet.normalisation = {"mean": [0.0] * 8, "std": [0.5] * 8}
    with pytest.raises(CheckpointError, match=r"has 8 values, expected one for each of the 2 channels of 'sensors' or"):
        normalisation_for(supernet, measurements(2, 3))


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


def test_values_that_are_no_weights_are_listed_and_nothing_is_taken(tmp_path):
    source, supernet = build_supernet(1, norm="batch"), build_supernet(2, norm="batch")
    before, state = supernet.state().digest(), source.state()
    bad = dict(state.tensors)
    bad["stem.conv.weight"] = np.full_like(bad["stem.conv.weight"], np.nan)
    bad["stem.norm.running_var"] = -bad["stem.norm.running_var"]
    bad["classifier.bias"] = bad["classifier.bias"].astype(np.int64)
    write_supernet(tmp_path, type(state)(0, bad), source.description(), {})
    with pytest.raises(
        MisfitError, match=r"supernet_weights: .*supernet\.safetensors: 3 problems: classifier\.bias: e"
    ):
        start_from(supernet, tmp_path, DRAWS)
    with pytest.raises(MisfitError) as refused:
        start_from(supernet, tmp_path, DRAWS)
    assert refused.value.problems == (
        "classifier.bias: expected floating-point values, found torch.int64",
        "stem.conv.weight: expected finite values, found 72 of 72 that are not",
        "stem.norm.running_var: expected variances, found 8 of 8 below 0",
    )
    assert supernet.state().digest() == before


@pytest.mark.parametrize("found", [None, [1], "x"])
def test_a_description_that_is_none_is_refused(tmp_path, found):
    written(tmp_path, build_supernet(1))
    rewrite(tmp_path, lambda content: content.update(supernet=found))
    with pytest.raises(CheckpointError, match=r"supernet_weights: .*supernet\.json: expected an object under"):
        start_from(build_supernet(2), tmp_path, DRAWS)


@pytest.mark.parametrize(
    "ordering",
    [
        {"stages.1.0.mid": np.arange(5)},
        {"nothing": np.arange(5)},
        {"stages.1.0.mid": np.zeros((4, 6), np.int64)},
    ],
    ids=["length", "group", "dimensions"],
)
def test_a_damaged_ordering_is_refused_with_its_file(tmp_path, ordering):
    source = build_supernet(1, norm="batch")
    state = source.state()
    write_supernet(tmp_path, type(state)(0, state.tensors, ordering), source.description(), {})
    supernet = build_supernet(2, norm="batch")
    before = supernet.state().digest()
    with pytest.raises(CheckpointError, match=r"supernet_weights: .*supernet\.safetensors: ordering of"):
        start_from(supernet, tmp_path, DRAWS)
    assert supernet.state().digest() == before


def test_the_integers_of_a_wrapped_module_come_back(tmp_path):
    def wrapped(seed):
        torch.manual_seed(seed)
        module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
        return FixedSupernet(module, (1, 4, 4))

    source, supernet = wrapped(1), wrapped(2)
    start_from(supernet, written(tmp_path, source), DRAWS)
    assert supernet.state().digest() == source.state().digest()


def test_tensors_that_are_not_the_supernets_are_listed_with_both_shapes():
    supernet = build_supernet()
    state = supernet.state()
    tensors = {f"other.{n}": np.zeros((n, 2), np.float32) for n in range(4)} | state.tensors
    tensors["classifier.bias"] = np.zeros(3, np.float32)
    del tensors["classifier.weight"]
    bias, weight = (state.tensors[f"classifier.{name}"].shape for name in ("bias", "weight"))
    with pytest.raises(CheckpointError) as caught:
        supernet.load_state(type(state)(0, tensors))
    none = "no such tensor"
    assert (
        "(mobilenet_v3): 6 tensors are missing, unknown or of another shape: "
        f"classifier.bias: expected shape {bias}, found shape (3,); "
        f"classifier.weight: expected shape {weight}, found {none}; other.0: expected {none}, found shape (0, 2); "
        f"other.1: expected {none}, found shape (1, 2); other.2: expected {none}, found shape (2, 2); and 1 more. "
        "Use the supernet settings it was saved with"
    ) in str(caught.value)
    assert supernet.state().digest() == state.digest()


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
            r"supernet_weights: .*: the file is of ofa_mbv3_d234_e346_k357_w1\.0, not of .*w1\.2",
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


CHAIN = ChainSpec((BlockSize(8), BlockSize(16, 5, 4, 2)), num_classes=3, stem_width=8, feature_width=16)
OWN = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}


def chain_written(folder, **settings):
    """A run's folder of a chain whose source took over these settings."""
    source = build_elastic(replace(CHAIN, **settings), torch.Generator().manual_seed(1))
    write_supernet(folder, source.state(), source.description(), source.normalisation or {})
    return source


@pytest.mark.parametrize("mean", [(), (0.1, 0.2, 0.3)], ids=["the data's", "another"])
def test_a_normalisation_that_a_source_took_over_comes_with_the_folder(tmp_path, mean):
    source = chain_written(tmp_path, mean=tuple(OWN["mean"]), std=tuple(OWN["std"]))
    supernet = build_elastic(replace(CHAIN, mean=mean, std=mean), torch.Generator().manual_seed(2))
    assert start_from(supernet, tmp_path, DRAWS) is None
    assert supernet.state().digest() == source.state().digest()
    assert supernet.normalisation == OWN


def test_what_else_a_source_took_over_is_named_with_the_overrides_to_give(tmp_path):
    chain_written(tmp_path, padding="tensorflow", norm_eps=1e-3, mean=tuple(OWN["mean"]), std=tuple(OWN["std"]))
    supernet = build_elastic(CHAIN, torch.Generator().manual_seed(2))
    with pytest.raises(CheckpointError) as caught:
        start_from(supernet, tmp_path, DRAWS)
    said = "give supernet.norm_eps=0.001 supernet.padding=tensorflow supernet.pretrained=null"
    assert str(caught.value).endswith(said) and "norm_eps: 0.001 there, 1e-05 here; padding: " in str(caught.value)
    chain_written(tmp_path, stem_width=16, padding="tensorflow")
    with pytest.raises(CheckpointError, match=r"another space: .*stem_width: 16 there, 8 here.* made with$"):
        start_from(supernet, tmp_path, DRAWS)


def test_the_description_stands_for_its_folder(tmp_path):
    source, supernet = build_supernet(1), build_supernet(2)
    written(tmp_path, source)
    start_from(supernet, tmp_path / "supernet.json", DRAWS)
    assert supernet.state().digest() == source.state().digest()
    (tmp_path / "supernet.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match="cannot be read: .*expected a run's folder with supernet.safetensors and"
    ):
        start_from(supernet, tmp_path / "supernet.json", DRAWS)
