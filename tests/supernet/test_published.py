"""Published files: old spellings, fresh classifiers, and files that are refused."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedofa.supernet import PUBLISHED, MobileNetV3Supernet, ProxylessSupernet, load_published, save_published
from fedofa.supernet.chain import BlockSize, ChainSpec
from fedofa.supernet.families import build_elastic
from fedofa.supernet.fixed import FixedSupernet
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec
from fedofa.supernet.network import is_lite
from fedofa.supernet.published import load_published_weights, start_from_published
from fedofa.supernet.published_keys import published_names, spellings
from fedofa.types.errors import CheckpointError, ConfigError, MisfitError

NAME = "ofa_mbv3_d234_e346_k357_w1.0"


@pytest.fixture(scope="module")
def supernet():
    return MobileNetV3Supernet.published(generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def written(supernet, tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "mbv3.pth"
    save_published(supernet, path)
    return path


def weights_of(path):
    return torch.load(path, weights_only=True)["state_dict"]


def written_again(weights, path):
    torch.save({"state_dict": weights}, path)
    return path


def test_what_was_written_is_read(supernet, written):
    again = load_published(written)
    assert again.spec == PUBLISHED[NAME]
    assert again.state().digest() == supernet.state().digest()
    assert load_published(written, NAME).state().digest() == supernet.state().digest()


def test_inputs_are_normalised_as_the_published_networks_were_trained(written):
    imagenet = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert load_published(written).normalisation == imagenet
    assert load_published(written, num_classes=4).normalisation == imagenet


def older(key: str) -> str:
    """A key as older files have it; residual blocks never had a `mobile_inverted_conv`."""
    if key.startswith("blocks.") and key.split(".")[2] == "conv":
        key = key.replace(".conv.", ".mobile_inverted_conv.", 1)
    key = key.replace("bn.bn.", "bn.").replace(".conv.conv.weight", ".conv.weight")
    short, long = "classifier.linear.", "classifier.linear.linear."
    return key.replace(long, short) if key.startswith(long) else key.replace(short, long)


@pytest.mark.parametrize("name", PUBLISHED)
def test_older_key_names_are_read(name, tmp_path):
    supernet = build_elastic(replace(PUBLISHED[name], num_classes=3), torch.Generator().manual_seed(0))
    save_published(supernet, tmp_path / "new")
    weights = weights_of(tmp_path / "new")
    old = {older(key): tensor for key, tensor in weights.items()}
    assert len(old) == len(weights) and len(old.keys() - weights.keys()) > 100
    again = load_published(written_again(old, tmp_path / "old"), num_classes=3)
    assert again.spec == supernet.spec
    assert again.state().digest() == supernet.state().digest()


def test_no_key_is_a_spelling_of_two_tensors():
    for spec in PUBLISHED.values():
        keys = [key for _, theirs in published_names(build_elastic(spec)) for key in spellings(theirs)]
        assert len(keys) == len(set(keys))


def test_a_tensor_under_two_spellings_is_refused(written, tmp_path):
    weights = weights_of(written)
    weights["first_conv.bn.bn.weight"] = weights["first_conv.bn.weight"].clone()
    with pytest.raises(CheckpointError, match=r"1 problems: unknown first_conv\.bn\.bn\.weight"):
        load_published(written_again(weights, tmp_path / "twice"))


def test_another_number_of_classes_needs_a_word(supernet, written, tmp_path):
    weights = weights_of(written)
    weights["classifier.linear.weight"] = torch.ones(7, 1280)
    weights["classifier.linear.bias"] = torch.ones(7)
    path = written_again(weights, tmp_path / "seven")
    with pytest.raises(CheckpointError, match="has 7 classes, expected 1000; pass num_classes=7 to take it as it is"):
        load_published(path)
    taken = load_published(path, num_classes=7)
    assert torch.equal(taken.shared()["classifier.weight"], torch.ones(7, 1280))
    fresh = load_published(path, num_classes=10, generator=torch.Generator().manual_seed(0))
    assert fresh.shared()["classifier.weight"].shape == (10, 1280)
    assert 0.005 < fresh.shared()["classifier.weight"].std() < 0.02
    assert load_published(path, num_classes=10).shared()["classifier.weight"].abs().max() == 0
    for name, tensor in supernet.shared().items():
        if not name.startswith("classifier."):
            assert torch.equal(tensor, taken.shared()[name])
            assert torch.equal(tensor, fresh.shared()[name])


def test_a_file_that_does_not_fit_is_refused_for_that_before_its_classes(written, tmp_path):
    """Nobody is told to pass the classes of another network's file."""
    weights = weights_of(written)
    weights["classifier.linear.weight"] = torch.ones(7, 1280)
    weights["classifier.linear.bias"] = torch.ones(7)
    path = written_again(weights, tmp_path / "seven")
    with pytest.raises(MisfitError, match="the file is of ofa_mbv3_d234_e346_k357_w1.0, not of ofa_supernet_resnet50"):
        load_published(path, "ofa_supernet_resnet50")
    del weights["first_conv.bn.weight"]
    with pytest.raises(MisfitError, match=r"1 problems: missing first_conv\.bn\.weight"):
        load_published(written_again(weights, path))


OWN = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}


def test_a_normalisation_of_ones_own_is_written_and_read(tmp_path):
    supernet = MobileNetV3Supernet(MobileNetV3Spec(num_classes=7), torch.Generator().manual_seed(0))
    supernet.normalisation = OWN
    save_published(supernet, tmp_path / "own")
    content = torch.load(tmp_path / "own", weights_only=True)
    assert content["normalisation"] == OWN and set(content) == {"state_dict", "normalisation"}
    assert load_published(tmp_path / "own", num_classes=7).normalisation == OWN
    assert load_published(tmp_path / "own", num_classes=4).normalisation == OWN
    started = MobileNetV3Supernet(MobileNetV3Spec(num_classes=7), torch.Generator())
    start_from_published(started, tmp_path / "own")
    assert started.normalisation == OWN
    supernet.normalisation = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    save_published(supernet, tmp_path / "imagenets")
    assert set(torch.load(tmp_path / "imagenets", weights_only=True)) == {"state_dict"}


@pytest.mark.parametrize(
    "found",
    [
        None,
        [0.5],
        {"mean": [0.5]},
        {"mean": [], "std": []},
        {"mean": "a", "std": "b"},
        {"mean": [0.5], "std": [0.0]},
        {"mean": [0.5, float("nan")], "std": [1.0, 1.0]},
        {"mean": [0.5] * 3, "std": [0.5]},
    ],
)
def test_a_damaged_normalisation_is_refused(written, tmp_path, found):
    torch.save({"state_dict": weights_of(written), "normalisation": found}, tmp_path / "damaged")
    with pytest.raises(CheckpointError, match='damaged: normalisation: expected "mean" and "std".*found .*correct it'):
        load_published(tmp_path / "damaged")


def test_a_supernet_of_structure_only_takes_no_weights(written):
    structure = MobileNetV3Supernet.published()
    for take in (
        lambda: start_from_published(structure, written),
        lambda: load_published_weights(structure, weights_of(written)),
    ):
        with pytest.raises(CheckpointError, match=r"\(mobilenet_v3\) is structure only.*build it with a generator"):
            take()


def test_missing_folders_are_made_and_a_path_that_cannot_be_written_is_one_error(supernet, tmp_path):
    save_published(supernet, tmp_path / "a" / "b" / "mbv3.pth")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["mbv3.pth"]
    (tmp_path / "file").touch()
    for path in (tmp_path / "a", tmp_path / "file" / "mbv3.pth"):
        with pytest.raises(CheckpointError, match=rf"{path}: cannot be written \(.*; choose another path"):
            save_published(supernet, path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "file"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (MobileNetV3Spec(norm="group"), r"ofa_mbv3_d234_e346_k357_w1\.0: norm: 'batch' there, 'group' here\)"),
        (MobileNetV3Spec(in_channels=1).scaled(1.2), r"ofa_mbv3_.*_w1\.2: in_channels: 3 there, 1 here\)"),
        (
            replace(MobileNetV3Spec(), stages=MobileNetV3Spec().stages[:4]),
            r"ofa_mbv3_.*_w1\.0: number of stages: 5 there, 4 here; stages\[4\]\.width: 160 there, None here; ",
        ),
    ],
    ids=["norm", "channels", "stages"],
)
def test_what_differs_from_the_nearest_published_space_is_said(written, spec, message):
    with pytest.raises(CheckpointError, match=f"no published format .the nearest is {message}.*Choose the settings"):
        start_from_published(build_elastic(spec), written)


def test_what_else_takes_a_file_is_said_where_no_published_space_is_near(written):
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    chain = build_elastic(ChainSpec((BlockSize(16), BlockSize(64, 3, 4, 2))))
    with pytest.raises(CheckpointError, match=rf"no published format: .* supernet\.pretrained={written}, here a run"):
        start_from_published(chain, written)
    with pytest.raises(CheckpointError, match="A wrapped module takes the weights of a run's folder only"):
        start_from_published(FixedSupernet(module, (1, 2, 2)), written)


def test_a_file_of_another_family_is_refused_by_its_own_name_first_and_all_that_is_wrong(written):
    with pytest.raises(MisfitError) as caught:
        load_published(written, "ofa_supernet_resnet50")
    assert str(caught.value).startswith(
        f"{written}: the file is of {NAME}, not of ofa_supernet_resnet50: use that space; the weights do not fit "
        f"ofa_supernet_resnet50: {len(caught.value.problems)} problems: missing blocks.0.conv1.bn.bn.bias, "
    )
    assert " more; unknown " in str(caught.value)
    head = "misshapen classifier.linear.weight (expected shape (1000, 2048), found (1000, 1280))"
    assert "missing blocks.9.conv3.conv.conv.weight" in caught.value.problems and head in caught.value.problems
    assert "missing blocks.9.conv3.conv.conv.weight" not in str(caught.value)


def test_a_file_that_is_of_none_says_what_it_was_taken_for_and_how_to_choose(tmp_path):
    path = written_again({"first_conv.conv.weight": torch.zeros(24, 3, 3, 3)}, tmp_path / "foreign")
    with pytest.raises(MisfitError) as caught:
        load_published(path)
    wide = "ofa_mbv3_d234_e346_k357_w1.2"
    others = ", ".join(name for name in PUBLISHED if name != wide)
    assert str(caught.value).startswith(
        f"{path}: the file was taken to be {wide}, which it fits best; if it is another, pass name= one of {others}; "
        f"the weights do not fit {wide}: "
    )


@pytest.mark.parametrize(
    ("key", "change", "problem"),
    [
        ("first_conv.conv.weight", Tensor.int, "expected floating-point values, found torch.int32"),
        (
            "classifier.linear.bias",
            lambda bias: bias.index_fill(0, torch.tensor([2, 5]), float("nan")),
            "expected finite values, found 2 of 1000 that are not",
        ),
        (
            "blocks.1.conv.depth_conv.bn.bn.running_var",
            lambda variance: torch.full_like(variance, 1e300, dtype=torch.float64),
            "expected finite values, found 96 of 96 that are not",
        ),
        (
            "blocks.1.conv.depth_conv.bn.bn.running_var",
            torch.neg,
            "expected variances, found 96 of 96 below 0",
        ),
        ("first_conv.bn.bias", Tensor.to_sparse, "expected a dense tensor, found torch.sparse_coo"),
    ],
    ids=["integers", "not a number", "too large", "negative variance", "sparse"],
)
def test_values_that_are_no_weights_are_refused(written, tmp_path, key, change, problem):
    weights = weights_of(written)
    weights[key] = change(weights[key])
    with pytest.raises(MisfitError) as caught:
        load_published(written_again(weights, tmp_path / "damaged"), NAME)
    assert caught.value.problems == (f"damaged {key} ({problem})",)
    assert f"the weights do not fit {NAME}: 1 problems: damaged {key} ({problem})" in str(caught.value)


def test_an_unknown_name_is_refused(written):
    with pytest.raises(ConfigError, match="expected a name of ofa_mbv3_d234_e346_k357_w1.0, .*, found 'ofa_mbv4'"):
        load_published(written, "ofa_mbv4")
    with pytest.raises(ConfigError, match=r"expected a name of .*, found \['x'\]"):
        load_published(written, ["x"])  # type: ignore[arg-type]


def test_files_that_hold_no_state_dict_are_refused(tmp_path):
    (tmp_path / "noise").write_bytes(b"not a checkpoint")
    torch.save({"model": {}}, tmp_path / "model")
    torch.save([1], tmp_path / "list")
    torch.save({"state_dict": {"first_conv.conv.weight": 3}}, tmp_path / "numbers")
    for name, message in (
        ("absent", "not a readable checkpoint"),
        ("noise", "not a readable checkpoint"),
        ("model", r"expected {'state_dict': {key: tensor}}, found \['model'\]"),
        ("list", "found list"),
        ("numbers", r"first_conv\.conv\.weight \(expected shape .*, found int\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_published(tmp_path / name)


def test_only_published_sizes_are_written(tmp_path):
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    for supernet in (
        MobileNetV3Supernet(MobileNetV3Spec(norm="group"), generator),
        ProxylessSupernet.published(1.0, generator),
        FixedSupernet(module, (1, 2, 2)),
    ):
        with pytest.raises(CheckpointError, match="has no published format"):
            save_published(supernet, tmp_path / "x")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="structure only"):
        save_published(MobileNetV3Supernet.published(), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_the_public_names_load_no_more_than_they_need():
    code = (
        "import sys, fedofa.supernet as s; assert 'torch' not in sys.modules; s.ResNetSupernet; "
        "assert 'fedofa.supernet.published' not in sys.modules; "
        "[getattr(s, name) for name in s.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(ImportError):
        from fedofa.supernet import nothing  # noqa: F401


def test_keys_that_are_none_of_a_published_files_are_shown(written, tmp_path):
    weights = {f"module.{key}": value for key, value in weights_of(written).items()}
    for name in (None, NAME):
        with pytest.raises(MisfitError) as caught:
            load_published(written_again(weights, tmp_path / "parallel"), name)
        assert str(caught.value).startswith(
            f"{tmp_path / 'parallel'}: none of its keys is a published checkpoint's: expected keys such as "
            "'first_conv.conv.weight' under 'state_dict', found 'module.first_conv.conv.weight', "
        )
        assert f"and {len(weights) - 3} more; rename them" in str(caught.value)
        assert caught.value.problems == tuple(f"unknown {key}" for key in sorted(weights))
    with pytest.raises(MisfitError, match="none of its keys is .* found none; rename them"):
        load_published(written_again({}, tmp_path / "empty"))


def test_a_file_that_fits_but_is_damaged_is_not_said_to_be_another(written, tmp_path):
    weights = weights_of(written)
    weights["first_conv.bn.bias"][0] = float("nan")
    with pytest.raises(MisfitError, match=rf"damaged: the weights do not fit {NAME}: 1 problems: damaged first_conv"):
        load_published(written_again(weights, tmp_path / "damaged"))


def test_a_normalisation_of_other_channels_is_refused(written, tmp_path):
    torch.save({"state_dict": weights_of(written), "normalisation": {"mean": [0.5], "std": [1]}}, tmp_path / "grey")
    with pytest.raises(
        CheckpointError, match="grey: normalisation: expected one mean and std for each of 3 ch.*found 1"
    ):
        load_published(tmp_path / "grey")


def small_published() -> MobileNetV3Supernet:
    return MobileNetV3Supernet(MobileNetV3Spec(num_classes=2), torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "normalisation",
    [
        {"mean": np.array([0.5, 0.4, 0.3]), "std": np.array([0.1, 0.2, 0.3])},
        {"mean": [np.float64(0.5), 0.4, 0.3], "std": (0.1, 0.2, np.float64(0.3))},
        {"mean": torch.tensor([0.5, 0.4, 0.3], dtype=torch.float64), "std": [0.1, 0.2, 0.3]},
    ],
    ids=["arrays", "numbers", "tensors"],
)
def test_a_normalisation_in_numpys_words_is_written_in_plain_ones(tmp_path, normalisation):
    supernet = small_published()
    supernet.normalisation = normalisation
    save_published(supernet, tmp_path / "own")
    assert load_published(tmp_path / "own", num_classes=2).normalisation == OWN


@pytest.mark.parametrize(
    ("normalisation", "message"),
    [
        ({"mean": [0.5] * 3, "std": [0.0] * 3}, r"supernet\.normalisation: expected .* those of std positive, found"),
        ([0.5], r"supernet\.normalisation: expected .*, found \[0\.5\]; correct it"),
        ({"mean": [0.5], "std": [0.5]}, r"supernet\.normalisation: expected one mean and std for each of 3 .*found 1"),
    ],
)
def test_a_normalisation_that_could_not_be_read_is_not_written(tmp_path, normalisation, message):
    supernet = small_published()
    supernet.normalisation = normalisation
    with pytest.raises(CheckpointError, match=message):
        save_published(supernet, tmp_path / "own")
    assert list(tmp_path.iterdir()) == []


def test_values_that_could_not_be_read_are_not_written(tmp_path):
    supernet = small_published()
    with torch.no_grad():
        supernet.shared()["stem.conv.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(
        MisfitError, match=r"values are no weights: stem\.conv\.weight: expected finite values, found 1 of"
    ):
        save_published(supernet, tmp_path / "own")
    assert list(tmp_path.iterdir()) == []


def test_a_path_without_a_name_is_one_error(supernet):
    with pytest.raises(CheckpointError, match=r"\.: cannot be written \(it is a folder\); choose another path"):
        save_published(supernet, ".")


def test_lite_residual_branches_stay_as_they_are_beside_a_files_weights(supernet, written):
    lite = build_elastic(replace(MobileNetV3Spec(), lite_residual=True), torch.Generator().manual_seed(1))
    before = {name: tensor.clone() for name, tensor in lite.shared().items()}
    load_published_weights(lite, weights_of(written))
    for name, tensor in lite.shared().items():
        assert torch.equal(tensor, before[name] if is_lite(name) else supernet.shared()[name])
    with pytest.raises(MisfitError, match=r"do not fit ofa_mbv3_.*: \d+ problems: missing blocks"):
        load_published_weights(lite, {})
