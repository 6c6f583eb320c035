"""Law 6: subnets cut from published-format weights are the peer package's; the ordering does not change the largest."""

import numpy as np
import pytest
import torch
from cohorts import build_supernet, seeds
from hypothesis import given, settings

from fedofa.supernet.importance import channel_ordering
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec, MobileNetV3Supernet
from fedofa.supernet.published import load_published_weights, published_names
from fedofa.types.errors import CheckpointError


def randomised(network, seed=0):
    """Random weights of sane scale everywhere, batch-norm statistics and transform matrices included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else None
            if noise is None:
                continue
            if name.endswith("_matrix"):
                tensor.add_(0.1 * noise)
            elif name.endswith("running_var"):
                tensor.copy_(1.0 + 0.5 * torch.rand(tensor.shape, generator=generator))
            elif tensor.dim() == 4:
                tensor.copy_(noise * (2.0 / tensor[0].numel()) ** 0.5)
            elif "bn" in name and name.endswith("weight"):
                tensor.copy_(1.0 + 0.2 * noise)
            else:
                tensor.copy_(0.1 * noise)
    return network.eval()


@pytest.fixture(scope="module")
def peer(ofa_networks):
    return randomised(
        ofa_networks.OFAMobileNetV3(
            ks_list=[3, 5, 7], expand_ratio_list=[3, 4, 6], depth_list=[2, 3, 4], dropout_rate=0.0
        )
    )


@pytest.fixture(scope="module")
def published(peer):
    supernet = MobileNetV3Supernet.published(generator=torch.Generator().manual_seed(1)).eval()
    load_published_weights(supernet, peer.state_dict())
    return supernet


def test_published_names_are_exactly_the_peers(peer, published):
    theirs = {key for key in peer.state_dict() if not key.endswith("num_batches_tracked")}
    assert {key for _, key in published_names(published)} == theirs


def test_subnets_cut_from_published_weights_equal_the_peers(peer, published):
    rng = np.random.default_rng(0)
    space = published.space
    subnets = [space.largest(), space.smallest(), *(space.sample(rng) for _ in range(6))]
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    for subnet in subnets:
        rows = {axis: space.values(subnet, axis) for axis in ("kernel", "expand", "depth")}
        peer.set_active_subnet(
            ks=[k or 3 for k in rows["kernel"]], e=[e or 3 for e in rows["expand"]], d=list(rows["depth"])
        )
        with torch.no_grad():
            theirs, ours, cut = peer(x), published(x, subnet), published.build(subnet).eval()(x)
        scale = theirs.abs().max()
        assert scale > 1e-3
        assert (theirs - ours).abs().max() <= 1e-5 * max(1.0, scale)
        assert torch.equal(ours, cut) or (ours - cut).abs().max() <= 1e-6 * scale


def test_published_weights_that_do_not_fit_are_listed_and_nothing_is_copied(peer, published):
    weights = dict(peer.state_dict())
    before = published.state().digest()
    weights["classifier.linear.bias"] = torch.zeros(7)
    weights["extra.weight"] = torch.zeros(1)
    del weights["first_conv.conv.weight"]
    with pytest.raises(CheckpointError) as caught:
        load_published_weights(published, weights)
    for part in ("missing first_conv.conv.weight", "unknown extra.weight", "expected shape (1000,), found (7,)"):
        assert part in str(caught.value)
    assert published.state().digest() == before


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_changing_the_ordering_leaves_the_largest_subnet_unchanged(seed):
    for norm in ("group", "batch"):
        supernet = build_supernet(seed % 7, norm=norm, shuffled=False).eval()
        shuffled = build_supernet(seed % 7, norm=norm, shuffled=True).eval()
        shuffled.set_ordering(
            channel_ordering(shuffled.network_spec(shuffled.space.largest()), shuffled.state().tensors)
        )
        x = torch.randn(2, 1, 20, 20, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            a, b = (net(x, net.space.largest()) for net in (supernet, shuffled))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_importance_keeps_the_channels_that_matter():
    """Half of a block's channels are made irrelevant; the narrow subnet by importance is the wide one's equal."""
    supernet = build_supernet(1, norm="batch", shuffled=False).eval()
    space = supernet.space
    shared = supernet.shared()
    rng = np.random.default_rng(0)
    for block in supernet.network_spec(space.largest()).blocks[1:]:
        keep = rng.permutation(block.mid_channels)[: block.mid_channels // 3]
        mask = torch.zeros(block.mid_channels)
        mask[keep] = 1.0
        with torch.no_grad():
            shared[f"{block.name}.project.conv.weight"].mul_(mask.view(1, -1, 1, 1))
            if block.squeeze_excite:
                shared[f"{block.name}.squeeze_excite.reduce.conv.weight"].mul_(mask.view(1, -1, 1, 1))
                shared[f"{block.name}.squeeze_excite.expand.conv.weight"][:, 8:] = 0
    narrow, wide = space.subnet(expand=1), space.largest()
    x = torch.randn(2, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = supernet(x, wide)
        assert (supernet(x, narrow) - expected).abs().max() > 1e-3
        supernet.set_ordering(channel_ordering(supernet.network_spec(wide), supernet.state().tensors))
        torch.testing.assert_close(supernet(x, narrow), expected, atol=1e-5, rtol=1e-5)


def test_a_spec_round_trips_through_json():
    spec = MobileNetV3Spec()
    assert MobileNetV3Spec.from_json(spec.to_json()) == spec
