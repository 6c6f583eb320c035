"""Published files: old spellings, fresh classifiers, and files that are refused."""

import subprocess
import sys

import pytest
import torch

from fedofa.supernet import PUBLISHED, MobileNetV3Supernet, ProxylessSupernet, load_published, save_published
from fedofa.supernet.fixed import FixedSupernet
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec
from fedofa.supernet.published import published_names, spellings
from fedofa.types.errors import CheckpointError, ConfigError

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


def test_older_key_names_are_read(supernet, written, tmp_path):
    old = {}
    for key, tensor in weights_of(written).items():
        renamed = key.replace(".conv.", ".mobile_inverted_conv.", 1) if key.startswith("blocks.") else key
        renamed = renamed.replace("bn.bn.", "bn.").replace(".conv.conv.weight", ".conv.weight")
        old[renamed.replace("classifier.linear.", "classifier.linear.linear.")] = tensor
    assert old.keys() != weights_of(written).keys()
    assert load_published(written_again(old, tmp_path / "old")).state().digest() == supernet.state().digest()


def test_no_key_is_a_spelling_of_two_tensors():
    from fedofa.supernet.families import build_elastic

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


def test_a_file_of_another_family_is_refused_by_what_is_missing(written):
    with pytest.raises(CheckpointError) as caught:
        load_published(written, "ofa_supernet_resnet50")
    for part in ("'resnet'", "missing blocks.0.conv1.bn.bn.bias", "problems", "more"):
        assert part in str(caught.value)


def test_an_unknown_name_is_refused(written):
    with pytest.raises(ConfigError, match="expected a name of ofa_mbv3_d234_e346_k357_w1.0, .*, found 'ofa_mbv4'"):
        load_published(written, "ofa_mbv4")


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
