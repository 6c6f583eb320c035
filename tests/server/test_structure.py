"""A supernet from settings: what the data fix, and what pretrained weights need of them."""

import numpy as np
import pytest
import torch

from conf.compose import compose_conf
from fedofa.data.sources import ImageSet
from fedofa.supernet.fixed import FixedSupernet
from fedofa.types.errors import ConfigError
from server.federation import build_first, describe_supernet


def image_set(channels: int) -> ImageSet:
    images = np.zeros((2, channels, 28, 28), np.uint8)
    statistics = (0.5,) * channels
    return ImageSet("made up", ("a", "b"), images, np.zeros(2, np.int64), None, statistics, statistics)


def build(channels: int, *overrides: str):
    description = describe_supernet(compose_conf(list(overrides)).supernet, image_set(channels))
    return build_first(description, torch.Generator().manual_seed(0))


def test_channels_classes_and_a_fixed_networks_size_are_the_datas():
    spec = build(1, "supernet=small").spec
    assert (spec.in_channels, spec.num_classes) == (1, 2)
    fixed = build(3, "supernet=fixed")
    assert isinstance(fixed, FixedSupernet)
    assert fixed.description()["input_shape"] == [3, 28, 28]


def test_pretrained_weights_need_the_channels_that_they_are_normalised_by():
    with pytest.raises(
        ConfigError, match=r"supernet\.pretrained: the weights need images of 3 channels.*found data of 1"
    ):
        build(1, "supernet=efficientnet_lite0")
    with pytest.raises(ConfigError, match=r"supernet\.mean: expected one value for each of 1 channels"):
        build(1, "supernet=efficientnet_lite0", "supernet.pretrained=null")
    own = build(1, "supernet=efficientnet_lite0", "supernet.pretrained=null", "supernet.mean=[]", "supernet.std=[]")
    assert own.normalisation is None


def test_a_description_builds_the_same_supernet_again():
    conf = compose_conf(["supernet=mobilenet_v2", "supernet.pretrained=null"])
    description = describe_supernet(conf.supernet, image_set(3))
    digests = {build_first(description, torch.Generator().manual_seed(0)).state().digest() for _ in range(2)}
    assert len(digests) == 1
