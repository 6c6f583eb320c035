"""From a description to a supernet, and what is said about descriptions that are none."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from cohorts import SPEC, SPECS

from fedofa.supernet.chain import BlockSize, ChainSpec
from fedofa.supernet.families import build_elastic, build_supernet, two_conv_cnn
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec, StageSpec
from fedofa.types.errors import ConfigError

CHAIN = {
    "family": "chain",
    **ChainSpec(
        (BlockSize(8), BlockSize(16, 5, 4, 2), BlockSize(16, 5, 4)),
        in_channels=1,
        num_classes=5,
        stem_width=8,
        feature_width=16,
        mean=(0.5,),
        std=(0.25,),
    ).to_json(),
}
SMALL = {"family": "mobilenet_v3", **SPEC.to_json()}
FIXED = {"family": "fixed", "module": "two_conv_cnn", "num_classes": 7, "input_shape": [3, 32, 32]}
FAMILIES = pytest.mark.parametrize("description", [SMALL, CHAIN, FIXED], ids=["mobilenet_v3", "chain", "fixed"])


@FAMILIES
def test_a_description_travels_and_makes_the_same_supernet(description):
    generator = torch.Generator().manual_seed(3)
    first = build_supernet(description, generator)
    again = json.loads(json.dumps(first.description()))
    second = build_supernet(again, torch.Generator().manual_seed(3))
    assert second.description() == again == json.loads(json.dumps(description))
    assert second.state().digest() == first.state().digest()
    assert build_supernet(again, torch.Generator().manual_seed(4)).state().digest() != first.state().digest()


@FAMILIES
def test_without_a_generator_it_is_structure_only(description):
    whole, structure = build_supernet(description, torch.Generator().manual_seed(0)), build_supernet(description)
    assert all(tensor.is_meta for tensor in structure.shared().values())
    subnet = whole.space.largest()
    assert structure.parameter_table(subnet) == whole.parameter_table(subnet)
    assert structure.block_costs(subnet) == whole.block_costs(subnet)


@FAMILIES
def test_drawing_weights_leaves_torchs_default_generator_alone(description):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_supernet(description, torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(3), expected)


def test_the_small_cnn_has_the_parameters_it_says():
    assert sum(parameter.numel() for parameter in two_conv_cnn().parameters()) == 206_922


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "mobilenet_v2"}, r"supernet\.family: unknown family 'mobilenet_v2'.*did you mean 'mobilenet_v3'"),
        (
            {"family": None},
            r"supernet\.family: unknown family None; known: mobilenet_v3, proxyless, resnet, chain, fixed",
        ),
        ({"family": ["fixed"]}, r"supernet\.family: unknown family"),
        ({"widht": 3}, r"unknown settings \['widht'\]"),
    ],
)
@FAMILIES
def test_an_unknown_family_or_setting_is_refused(description, change, message):
    with pytest.raises(ConfigError, match=message):
        build_supernet({**description, **change})


def test_an_unknown_module_is_refused():
    with pytest.raises(ConfigError, match=r"supernet\.module: unknown module 'two_conv'.*did you mean 'two_conv_cnn'"):
        build_supernet({**FIXED, "module": "two_conv"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "layer"}, r"supernet\.norm: expected one of \['group', 'batch'\], found 'layer'"),
        ({"kernels": [3, 4]}, r"supernet\.kernels: .*odd, found \[4\]"),
        ({"stages": []}, r"supernet\.stages: expected at least one"),
        ({"stem_width": 12}, r"multiples of 8, found \[12\]"),
    ],
)
def test_sizes_that_make_no_network_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        MobileNetV3Spec.from_json({**SPEC.to_json(), **change})


PROXYLESS = {"family": "proxyless", **SPECS["proxyless"].to_json()}
RESNET = {"family": "resnet", **SPECS["resnet"].to_json()}
STAGE, BLOCK = SMALL["stages"][0], CHAIN["blocks"][1]


@pytest.mark.parametrize(
    ("description", "change", "message"),
    [
        (SMALL, {"depths": [0, 1]}, r"supernet\.depths: expected whole numbers of at least 1, found \[0\]"),
        (PROXYLESS, {"depths": [0, 1]}, r"supernet\.depths: expected whole numbers of at least 1, found \[0\]"),
        (RESNET, {"depths": [-3, 0]}, r"supernet\.depths: expected whole numbers of at least 0, found \[-3\]"),
        (CHAIN, {"min_depth": 0}, r"supernet\.min_depth: expected a whole number of at least 1, found 0"),
        (SMALL, {"kernels": [-1, 3]}, r"supernet\.kernels: expected whole numbers of at least 1, found \[-1\]"),
        (SMALL, {"kernels": [3, 5.0]}, r"supernet\.kernels: expected whole numbers of at least 1, found \[5\.0\]"),
        (SMALL, {"kernels": 3}, r"supernet\.kernels: expected a list, found 3"),
        (CHAIN, {"stem_kernel": 4}, r"supernet\.stem_kernel: kernel sizes must be odd, found \[4\]"),
        (CHAIN, {"stem_kernel": -3}, r"supernet\.stem_kernel: expected a whole number of at least 1, found -3"),
        (SMALL, {"stem_width": 0}, r"supernet\.stem_width: expected a whole number of at least 1, found 0"),
        (RESNET, {"stem_width": -8}, r"supernet\.stem_width: expected a whole number of at least 1, found -8"),
        (SMALL, {"first_width": -8}, r"supernet\.first_width: .*found -8"),
        (SMALL, {"final_width": 0}, r"supernet\.final_width: .*found 0"),
        (SMALL, {"feature_width": 0}, r"supernet\.feature_width: .*of at least 1, found 0"),
        (CHAIN, {"feature_width": -8}, r"supernet\.feature_width: .*of at least 0, found -8"),
        (SMALL, {"stem_stride": 0}, r"supernet\.stem_stride: .*found 0"),
        (SMALL, {"first_stride": -1}, r"supernet\.first_stride: .*found -1"),
        (SMALL, {"resolutions": [0, 3]}, r"supernet\.resolutions: .*found \[0\]"),
        (CHAIN, {"resolutions": [-4, 3]}, r"supernet\.resolutions: .*found \[-4\]"),
        (SMALL, {"expands": [0, 3]}, r"supernet\.expands: expected positive numbers, found \[0\]"),
        (RESNET, {"expands": [-2, 3]}, r"supernet\.expands: expected positive numbers, found \[-2\]"),
        (RESNET, {"widths": [0.0, 1.0]}, r"supernet\.widths: expected positive numbers, found \[0\.0\]"),
        (SMALL, {"norm_eps": -1}, r"supernet\.norm_eps: expected a positive number, found -1"),
        (CHAIN, {"norm_eps": float("nan")}, r"supernet\.norm_eps: expected a positive number, found nan"),
        (SMALL, {"dropout": 2}, r"supernet\.dropout: expected a number in \[0, 1\), found 2"),
        (SMALL, {"num_classes": 0}, r"supernet\.num_classes: .*found 0"),
        (RESNET, {"num_classes": 0}, r"supernet\.num_classes: .*found 0"),
        (CHAIN, {"num_classes": -1}, r"supernet\.num_classes: .*found -1"),
        (FIXED, {"num_classes": 0}, r"supernet\.num_classes: .*found 0"),
        (FIXED, {"input_shape": [0, 28, 28]}, r"supernet\.input_shape: .*found \[0\]"),
        (SMALL, {"in_channels": 0}, r"supernet\.in_channels: .*found 0"),
        (SMALL, {"stages": [{**STAGE, "stride": 0}]}, r"supernet\.stages: stride: .*found 0"),
        (SMALL, {"stages": [{**STAGE, "width": -8}]}, r"supernet\.stages: width: .*found -8"),
        (SMALL, {"stages": [3]}, r"supernet\.stages: expected \['width', 'stride', .*found 3"),
        (PROXYLESS, {"last_stage": 3}, r"supernet\.last_stage: expected \['width', 'stride', .*found 3"),
        (RESNET, {"stages": [{"width": 8, "blocks": 0, "stride": 1}]}, r"supernet\.stages: blocks: .*found 0"),
        (CHAIN, {"blocks": [{**BLOCK, "stride": 1.5}]}, r"supernet\.blocks: stride: .*found 1\.5"),
        (CHAIN, {"blocks": [{**BLOCK, "expand": "4"}]}, r"supernet\.blocks: expand: .*positive number, found '4'"),
        (CHAIN, {"blocks": "abc"}, r"supernet\.blocks: expected a list, found 'abc'"),
        (SMALL, {"num_classes": True}, r"supernet\.num_classes: expected a whole number of at least 1, found True"),
        (SMALL, {"expands": [True, 3]}, r"supernet\.expands: expected positive numbers, found \[True\]"),
        (SMALL, {"dropout": False}, r"supernet\.dropout: expected a number in \[0, 1\), found False"),
        (SMALL, {"lite_residual": "false"}, r"supernet\.lite_residual: expected true or false, found 'false'"),
        (CHAIN, {"lite_residual": 1}, r"supernet\.lite_residual: expected true or false, found 1"),
        (CHAIN, {"stem_pool": "false"}, r"supernet\.stem_pool: expected true or false, found 'false'"),
        (
            SMALL,
            {"stages": [{**STAGE, "squeeze_excite": "false"}]},
            r"supernet\.stages: squeeze_excite: expected true or false, found 'false'",
        ),
        (
            CHAIN,
            {"blocks": [{"width": 8}, {"width": 16, "expand": 0.05}]},
            r"supernet\.blocks: expand: 0\.05 leaves 'stages\.1\.0' without inner channels; expected at least one",
        ),
        (
            SMALL,
            {"expands": [1, 1.1, 1.2]},
            r"supernet\.expands: \[1, 1\.1, 1\.2\] times the 8 channels .* are \[8, 16, 16\].*another width",
        ),
        (
            PROXYLESS,
            {"expands": [1, 1.1, 1.2]},
            r"supernet\.expands: \[1, 1\.1, 1\.2\] times the 8 channels .* are \[8, 16, 16\].*another width",
        ),
        (CHAIN, {"mean": [0.5, 0.5], "std": [1, 1]}, r"supernet\.mean: expected one value for each of 1 channels"),
        (CHAIN, {"mean": []}, r"supernet\.mean: expected one value for each of 1 channels, in both mean and std"),
        (CHAIN, {"std": [0]}, r"supernet\.mean and supernet\.std: .*those of std positive, found .*'std': \(0,\)"),
        (CHAIN, {"std": [-1.0]}, r"supernet\.mean and supernet\.std: .*found .*'std': \(-1\.0,\)"),
        (CHAIN, {"mean": [float("nan")]}, r"supernet\.mean and supernet\.std: expected finite.*'mean': \(nan,\)"),
        (CHAIN, {"mean": ["a"]}, r"supernet\.mean and supernet\.std: expected finite.*'mean': \('a',\)"),
        (CHAIN, {"mean": [[0.5]]}, r"supernet\.mean and supernet\.std: expected finite.*'mean': \(\[0\.5\],\)"),
        (CHAIN, {"mean": "a"}, r"supernet\.mean: expected a list, found 'a'"),
        (CHAIN, {"std": None}, r"supernet\.std: expected a list, found None"),
    ],
)
def test_settings_that_make_no_network_are_refused_by_name(description, change, message):
    with pytest.raises(ConfigError, match=message):
        build_supernet({**description, **change})


def test_lists_serve_as_tuples():
    blocks = [BlockSize(16), BlockSize(24, 3, 4, 2)]
    listed, settled = ChainSpec(blocks, resolutions=[96]), ChainSpec(tuple(blocks), resolutions=(96,))  # type: ignore[arg-type]
    assert listed == settled and hash(listed) == hash(settled)
    assert build_elastic(listed).space.count() == build_elastic(settled).space.count()
    assert hash(MobileNetV3Spec(kernels=[3, 5])) == hash(MobileNetV3Spec(kernels=(3, 5)))  # type: ignore[arg-type]


def test_a_block_of_words_is_refused():
    with pytest.raises(
        ConfigError, match=r"supernet\.blocks: width: expected a whole number of at least 1, found '16'"
    ):
        BlockSize("16")  # type: ignore[arg-type]


@pytest.mark.parametrize("description", [None, [1], "chain", 3])
def test_what_is_no_description_is_refused(description):
    with pytest.raises(ConfigError, match="supernet"):
        build_supernet(description)


@pytest.mark.parametrize(
    "description",
    [
        {key: value for key, value in FIXED.items() if key != "input_shape"},
        {key: value for key, value in FIXED.items() if key != "num_classes"},
        {**FIXED, "input_shape": [1]},
        {**SMALL, "stages": [{"width": 8}]},
        {**SMALL, "stages": [{**SMALL["stages"][0], "activation": "gelu"}]},
        {**SMALL, "depths": []},
        {**SMALL, "stem_width": "8"},
    ],
    ids=["no input_shape", "no num_classes", "flat input_shape", "stage", "activation", "depths", "width"],
)
def test_a_malformed_description_is_refused_as_a_setting(description):
    with pytest.raises(ConfigError):
        build_supernet(description)


def test_a_stage_of_one_block_is_not_asked_for_the_widths_of_a_second():
    stage = StageSpec(8, 2, "relu", False)
    spec = replace(SPEC, first_width=16, stages=(stage,), expands=(1.5, 2), depths=(1,))
    assert build_elastic(spec).space.count() == 3 * 2
    with pytest.raises(ConfigError, match=r"\[1\.5, 2\] times the 8 channels of a block's input are \[16, 16\]"):
        replace(spec, depths=(1, 2))


def test_a_normalisation_of_numpys_numbers_travels():
    chain = ChainSpec((BlockSize(8),), in_channels=1, mean=(np.float32(0.5),), std=(np.float64(0.25),))
    assert json.loads(json.dumps(chain.to_json()))["mean"] == [0.5]
    assert build_elastic(chain).normalisation == {"mean": [0.5], "std": [0.25]}
