"""Configurations in the words of the package `ofa`, and how many the published spaces have."""

import numpy as np
import pytest

from fedofa.supernet.published import PUBLISHED
from fedofa.types.errors import SpaceError
from fedofa.types.ofa import published_space
from fedofa.types.space import SubnetConfig

FAMILIES = ("mobilenet_v3", "proxyless", "resnet")
V3 = {"ks": [3] * 20, "e": [4] * 20, "d": [2, 3, 4, 2, 3]}
PROXYLESS = {"ks": [5] * 21, "e": [6] * 21, "d": [2, 3, 4, 2, 3, 1]}
RESNET = {"d": [2, 0, 1, 2, 0], "e": [0.25] * 18, "w": [0, 1, 2, 0, 1, 2]}


@pytest.mark.parametrize(
    ("family", "count"),
    [("mobilenet_v3", 7371**5), ("proxyless", 9 * 7371**5), ("resnet", 18 * 351**3 * 3159)],
)
def test_the_published_spaces_have_as_many_configurations_as_published(family, count):
    assert published_space(family).count() == count


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_specs_have_the_published_spaces(name):
    spec = PUBLISHED[name]
    assert spec.search_space().axes == published_space(spec.family).axes


@pytest.mark.parametrize("family", FAMILIES)
def test_configurations_go_there_and_back(family):
    space, rng = published_space(family), np.random.default_rng(0)
    for subnet in (space.largest(), space.smallest(), *(space.sample(rng) for _ in range(20))):
        assert SubnetConfig.from_ofa(subnet.to_ofa(), family) == subnet


def test_entries_mean_what_they_say():
    space = published_space("mobilenet_v3")
    subnet = SubnetConfig.from_ofa(V3, family="mobilenet_v3")
    assert subnet == space.subnet(kernel=3, expand=4, depth=[2, 3, 4, 2, 3])
    assert SubnetConfig.from_ofa({**V3, "r": [160]}, family="mobilenet_v3") == space.subnet(
        kernel=3, expand=4, depth=[2, 3, 4, 2, 3], resolution=160
    )
    assert SubnetConfig.from_ofa({**V3, "r": 160}, family="mobilenet_v3").to_ofa()["r"] == [160]
    proxyless = SubnetConfig.from_ofa(PROXYLESS, family="proxyless")
    assert proxyless.to_ofa()["d"] == PROXYLESS["d"]
    assert [len(proxyless.to_ofa()[key]) for key in ("ks", "e", "d")] == [21, 21, 6]
    resnet = SubnetConfig.from_ofa(RESNET, family="resnet")
    assert resnet == published_space("resnet").subnet(
        stem_depth=2, depth=[0, 1, 2, 0], expand=0.25, width=[0.65, 0.8, 1.0, 0.65, 0.8, 1.0]
    )
    assert resnet.to_ofa()["w"] == RESNET["w"]
    assert resnet.to_ofa()["d"] == RESNET["d"]


def test_configurations_as_the_package_passes_them_about_are_read():
    """Rows as numpy arrays, and "wid", which its samplers put there."""
    expected = SubnetConfig.from_ofa({**V3, "r": 160}, "mobilenet_v3")
    arrays = {key: np.array(row) for key, row in V3.items()}
    assert SubnetConfig.from_ofa({**arrays, "r": np.int64(160), "wid": None}, "mobilenet_v3") == expected
    widths = {key: np.array(row) for key, row in RESNET.items()}
    assert SubnetConfig.from_ofa(widths, "resnet") == SubnetConfig.from_ofa(RESNET, "resnet")
    numbers = {key: [np.array(row)[n] for n in range(len(row))] for key, row in RESNET.items()}
    assert SubnetConfig.from_ofa(numbers, "resnet") == SubnetConfig.from_ofa(RESNET, "resnet")


def test_entries_of_absent_blocks_do_not_matter():
    other = {**V3, "ks": [3, 3, None, 0, *V3["ks"][4:]]}
    assert SubnetConfig.from_ofa(other, "mobilenet_v3") == SubnetConfig.from_ofa(V3, "mobilenet_v3")


@pytest.mark.parametrize(
    ("architecture", "family", "message"),
    [
        (
            V3,
            "mobilenet_v2",
            "no published space of family 'mobilenet_v2': expected one of mobilenet_v3, proxyless, resnet",
        ),
        (V3, ["mobilenet_v3"], r"no published space of family \['mobilenet_v3'\]"),
        (None, "mobilenet_v3", "expected an object, found None"),
        ([1], "mobilenet_v3", r"expected an object, found \[1\]"),
        ({**V3, "wid": 1.2}, "mobilenet_v3", r"missing \[\], unknown \['wid'\]"),
        ({**V3, 1: 2}, "mobilenet_v3", r"missing \[\], unknown \['1'\]"),
        ({"ks": [3] * 20, "d": [2] * 5}, "mobilenet_v3", r"missing \['e'\], unknown \[\]"),
        ({**V3, "w": [0] * 6}, "mobilenet_v3", r"missing \[\], unknown \['w'\]"),
        ({**V3, "ks": [3] * 21}, "mobilenet_v3", "kernel: expected 20 entries, found 21"),
        ({**V3, "ks": [4] * 20}, "mobilenet_v3", r"axis 'kernel', position 0: 4 is not allowed.*\[3, 5, 7\]"),
        ({**V3, "d": [2] * 6}, "mobilenet_v3", "'d': expected 5 entries, found 6"),
        ({**V3, "d": [2, 2, 2, 2, 5]}, "mobilenet_v3", "axis 'depth', position 4: 5 is not allowed"),
        ({**V3, "e": 3}, "mobilenet_v3", "'e': expected a list, found 3"),
        (V3, "proxyless", "'d': expected 6 entries, found 5"),
        ({**PROXYLESS, "d": [2, 2, 2, 2, 2, 2]}, "proxyless", "the last stage has one block.*1, found 2"),
        ({**RESNET, "d": [1, 0, 0, 0, 0]}, "resnet", r"axis 'stem_depth', position 0: 1 is not allowed.*\[0, 2\]"),
        ({**RESNET, "w": [0, 0, 0, 0, 0, 3]}, "resnet", "'w': expected indices from 0 to 2, found 3"),
        ({**RESNET, "w": [0.65] * 6}, "resnet", "'w': expected indices from 0 to 2, found 0.65"),
        ({**RESNET, "w": [True] * 6}, "resnet", "'w': expected indices from 0 to 2, found True"),
        ({**RESNET, "w": [np.int64(3)] * 6}, "resnet", r"'w': expected indices from 0 to 2, found np.int64\(3\)"),
        ({**V3, "ks": [np.array([3, 3])] * 20}, "mobilenet_v3", r"'ks': expected a list of numbers, found array\("),
        ({**V3, "ks": [[3, 3]] * 20}, "mobilenet_v3", r"'ks': expected a list of numbers, found \[3, 3\] in it"),
        ({**V3, "ks": np.full((20, 2), 3)}, "mobilenet_v3", r"'ks': expected a list of numbers, found \[3, 3\] in it"),
        ({**PROXYLESS, "d": [np.array([1, 1])] * 6}, "proxyless", r"'d': expected a list of numbers, found array\("),
    ],
)
def test_what_is_no_configuration_is_refused(architecture, family, message):
    with pytest.raises(SpaceError, match=message):
        SubnetConfig.from_ofa(architecture, family)


def test_a_configuration_of_another_space_is_not_written():
    with pytest.raises(SpaceError, match="no published space of family 'fixed'"):
        SubnetConfig("fixed", ()).to_ofa()
    with pytest.raises(SpaceError, match="expected the axes"):
        SubnetConfig("resnet", ()).to_ofa()
