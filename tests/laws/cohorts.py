"""Supernets and deltas for the property tests: small, every axis elastic, matrices off the identity."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import strategies as st

from fedofa.supernet.chain import BlockSize, ChainSpec
from fedofa.supernet.elastic import ElasticSpec, ElasticSupernet
from fedofa.supernet.families import build_elastic
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec, StageSpec
from fedofa.supernet.proxyless import ProxylessSpec
from fedofa.supernet.resnet import ResidualStageSpec, ResNetSpec
from fedofa.types.delta import SubnetDelta

SPEC = MobileNetV3Spec(
    in_channels=1,
    num_classes=5,
    stem_width=8,
    first_width=8,
    stages=(StageSpec(8, 2, "relu", True), StageSpec(16, 2, "h_swish", False)),
    final_width=24,
    feature_width=32,
    expands=(1, 2, 3),
    depths=(1, 2),
    resolutions=(16, 20),
    norm="group",
)
PROXYLESS_SPEC = ProxylessSpec(
    in_channels=1,
    num_classes=5,
    stem_width=8,
    first_width=8,
    stages=(StageSpec(8, 2, "relu6", False), StageSpec(16, 2, "relu6", False)),
    last_stage=StageSpec(16, 1, "relu6", False),
    feature_width=24,
    expands=(1, 2),
    depths=(1, 2),
    resolutions=(16, 20),
    norm="group",
)
RESNET_SPEC = ResNetSpec(
    in_channels=1,
    num_classes=5,
    stem_width=32,
    stages=(ResidualStageSpec(32, 1, 1), ResidualStageSpec(48, 2, 2)),
    expands=(0.25, 0.5),
    depths=(0, 1),
    widths=(0.5, 0.75, 1.0),
    resolutions=(16, 20),
    norm="group",
)
CHAIN_SPEC = ChainSpec(
    (
        BlockSize(8, 3, 1, 2),  # keeps a padded copy of the stem's result
        BlockSize(16, 5, 4, 2),
        BlockSize(16, 5, 4),
        BlockSize(32, 3, 0.5, 2, "residual"),
        BlockSize(32, 3, 0.5, 1, "residual"),
    ),
    in_channels=1,
    num_classes=5,
    stem_width=8,
    feature_width=0,
    fractions=(0.5, 1.0),
    resolutions=(16, 20),
    padding="tensorflow",
)
LITE_SPEC = replace(SPEC, lite_residual=True)
SPECS = {spec.family: spec for spec in (SPEC, PROXYLESS_SPEC, RESNET_SPEC)}


def build_supernet(
    seed: int = 0, *, norm: str = "group", shuffled: bool = True, spec: ElasticSpec = SPEC
) -> ElasticSupernet:
    """Random weights, matrices near but away from the identity, and (with `shuffled`) a random channel ordering."""
    generator = torch.Generator().manual_seed(seed)
    supernet = build_elastic(type(spec).from_json({**spec.to_json(), "norm": norm}), generator)
    with torch.no_grad():
        for name, tensor in supernet.shared().items():
            if ".matrix_" in name:
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
            elif name.endswith("norm.weight"):
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    if shuffled:
        rng = np.random.default_rng(seed)
        supernet.set_ordering({group: shuffled_groups(size, rng) for group, size in supernet.channel_groups().items()})
    return supernet


def shuffled_groups(size: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation that moves whole groups of eight channels."""
    return (rng.permutation(size // 8)[:, None] * 8 + np.arange(8)).ravel()


def random_delta(supernet, subnet, rng, *, client: str = "c", num_examples: int = 1, names=None) -> SubnetDelta:
    """A delta of standard normal values for the trainable tensors of a subnet, or for `names` only."""
    slices = supernet.slice_map(subnet)
    chosen = slices.trainable if names is None else names
    weights = {name: rng.standard_normal(slices[name].shape).astype(np.float32) for name in chosen}
    return make_delta(subnet, weights, client=client, num_examples=num_examples)


def make_delta(subnet, weights, *, client: str = "c", num_examples: int = 1) -> SubnetDelta:
    return SubnetDelta(client, 1, subnet, "plan", 0, num_examples, 1, weights)


seeds = st.integers(0, 2**32 - 1)
example_counts = st.integers(1, 5000)
