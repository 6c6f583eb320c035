"""From a description to a supernet, and what is said about descriptions that are none."""

import json

import pytest
import torch
from cohorts import SPEC

from fedofa.supernet.families import build_supernet, two_conv_cnn
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec
from fedofa.supernet.proxyless import ProxylessSpec
from fedofa.supernet.resnet import ResNetSpec
from fedofa.types.errors import ConfigError

SMALL = {"family": "mobilenet_v3", **SPEC.to_json()}
FIXED = {"family": "fixed", "module": "two_conv_cnn", "num_classes": 7, "input_shape": [3, 32, 32]}
FAMILIES = pytest.mark.parametrize("description", [SMALL, FIXED], ids=["mobilenet_v3", "fixed"])


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
        ({"family": None}, r"supernet\.family: unknown family None; known: mobilenet_v3, proxyless, resnet, fixed"),
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
