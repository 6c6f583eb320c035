"""Law 2 on a described chain: stages of unlike length, blocks of unlike kernel, matrices away from the identity."""

import numpy as np
import torch
from cohorts import example_counts, make_delta, random_delta, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from fedofa.aggregation.fold import FoldSums
from fedofa.aggregation.server_optimisers import Plain
from fedofa.supernet.chain import BlockSize, ChainSpec, ChainSupernet

SPEC = ChainSpec(
    (
        BlockSize(8),
        BlockSize(16, 7, 4, 2),
        BlockSize(16, 3, 4),
        BlockSize(16, 5, 4),
        BlockSize(24, 5, 4, 2),
        BlockSize(32, 3, 0.5, 2, "residual"),
        BlockSize(32, 3, 0.5, 1, "residual"),
    ),
    in_channels=1,
    num_classes=5,
    stem_width=8,
    feature_width=16,
    kernels=(3, 5, 7),
    fractions=(0.5, 1.0),
    padding="tensorflow",
    resolutions=(16, 20),
)


def build() -> ChainSupernet:
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    supernet = ChainSupernet(SPEC, generator)
    with torch.no_grad():
        for name, tensor in supernet.shared().items():
            if ".matrix_" in name:
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    supernet.set_ordering({group: rng.permutation(size) for group, size in supernet.channel_groups().items()})
    return supernet


SUPERNET = build()
STATE, SPACE = SUPERNET.state(), SUPERNET.space
laws = settings(max_examples=20, deadline=None)


def folded(deltas):
    sums = FoldSums(SUPERNET.slice_map)
    for delta in deltas:
        sums.add(delta)
    return sums.finish(STATE, Plain())[0].tensors


def test_blocks_have_the_matrices_of_the_kernels_below_their_own():
    matrices = {name.removeprefix("stages.").replace(".depthwise", "") for name in STATE.tensors if "matrix" in name}
    assert matrices == {"1.0.matrix_7to5", "1.0.matrix_5to3", "1.2.matrix_5to3", "2.0.matrix_5to3"}


@laws
@given(seeds, example_counts)
def test_put_get_for_one_client(seed, count):
    rng = np.random.default_rng(seed)
    delta = random_delta(SUPERNET, SPACE.sample(rng), rng, num_examples=count)
    slices = SUPERNET.slice_map(delta.subnet)
    before, got = slices.extract(STATE.tensors), slices.extract(folded([delta]))
    for name, change in delta.weights.items():
        np.testing.assert_allclose(got[name], before[name] + change, atol=1e-5 * max(1, np.abs(change).max()))


@laws
@given(seeds, st.lists(example_counts, min_size=2, max_size=4))
def test_put_get_for_clients_that_agree(seed, counts):
    rng = np.random.default_rng(seed)
    change = {
        name: rng.standard_normal(tensor.shape).astype(np.float32)
        for name, tensor in STATE.tensors.items()
        if ".matrix_" not in name
    }
    view = {**STATE.tensors, **change}
    deltas = []
    for count in counts:
        slices = SUPERNET.slice_map(subnet := SPACE.sample(rng))
        weights = {name: slices[name].extract(view) for name in slices.trainable}
        deltas.append(make_delta(subnet, weights, num_examples=count))
    after = folded(deltas)
    for delta in deltas:
        slices = SUPERNET.slice_map(delta.subnet)
        before, got = slices.extract(STATE.tensors), slices.extract(after)
        for name, expected in delta.weights.items():
            np.testing.assert_allclose(got[name], before[name] + expected, atol=3e-5)
