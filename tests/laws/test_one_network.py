"""Law 6: subnets cut from published-format weights are the peer package's; the ordering does not change the largest."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from cohorts import SPECS, build_supernet, seeds
from hypothesis import given, settings
from peers import activate, build_peer, images

from fedofa.evaluation.calibration import calibrate
from fedofa.supernet.importance import channel_ordering, measured_ordering
from fedofa.supernet.published import PUBLISHED, load_published, load_published_weights, save_published
from fedofa.supernet.published_keys import published_names
from fedofa.types.errors import CheckpointError
from fedofa.types.space import SubnetConfig

every_published = pytest.mark.parametrize("name", PUBLISHED)


@pytest.fixture(scope="module")
def peers(ofa_networks):
    made = {}
    return lambda name: made.setdefault(name, build_peer(ofa_networks, name))


@pytest.fixture(scope="module")
def published(peers, tmp_path_factory):
    """The supernet of a file that holds the peer's weights, found by its keys and shapes."""
    made = {}

    def load(name):
        if name not in made:
            path = tmp_path_factory.mktemp("published") / "weights"
            torch.save({"state_dict": peers(name).state_dict()}, path)
            made[name] = load_published(path)
            path.unlink()
        return made[name]

    return load


@every_published
def test_published_names_are_exactly_the_peers(name, peers, published):
    theirs = {key for key in peers(name).state_dict() if not key.endswith("num_batches_tracked")}
    assert {key for _, key in published_names(published(name))} == theirs
    assert published(name).spec == PUBLISHED[name]


@pytest.mark.slow
@every_published
def test_subnets_cut_from_published_weights_equal_the_peers(name, peers, published):
    """Twenty random subnets, the largest and the smallest: with the file's statistics, and recalibrated ones.

    The latter in float64, in which processors that add up in different orders agree: what is left are small kernels,
    which both compose in float32.
    """
    peer, supernet, space = peers(name), published(name), published(name).space
    rng = np.random.default_rng(0)
    x = images(72)
    for subnet in (space.largest(), space.smallest(), *(space.sample(rng) for _ in range(20))):
        activate(peer, subnet)
        with torch.no_grad():
            theirs, ours = peer.get_active_subnet().eval(), supernet.build(subnet).eval()
            a, b = peer(x), supernet(x, subnet)
            assert (a - b).abs().max() <= 1e-5 * max(1.0, a.abs().max())
            assert (ours(x) - b).abs().max() <= 1e-6 * a.abs().max()
            for model in (theirs, ours):
                calibrate(model.double(), [images(72, batch=6).double()])
            a, b = theirs(x.double()), ours(x.double())
            assert 0.1 < a.abs().max() < 20
            assert (a - b).abs().max() <= 1e-5


@every_published
def test_a_configuration_that_the_peer_draws_is_ours(name, peers, published):
    peer, supernet = peers(name), published(name)
    random.seed(0)  # which the peer draws from
    subnet = SubnetConfig.from_ofa(peer.sample_active_subnet(), supernet.space.family)
    x = images(64)
    with torch.no_grad():
        theirs, ours = peer(x), supernet(x, subnet)
    assert (theirs - ours).abs().max() <= 1e-5 * max(1.0, theirs.abs().max())


@pytest.mark.slow
@every_published
def test_a_written_file_is_the_peers(name, peers, published, ofa_networks, tmp_path):
    """With channels ordered by importance: the peer takes leading channels, so the file must hold them sorted."""
    supernet, rng = published(name), np.random.default_rng(1)
    largest = supernet.network_spec(supernet.space.largest())
    supernet.set_ordering(channel_ordering(largest, supernet.state().tensors))
    try:
        save_published(supernet, tmp_path / "written")
        assert [path.name for path in tmp_path.iterdir()] == ["written"]
        weights = torch.load(tmp_path / "written", weights_only=True)["state_dict"]
        peer = build_peer(ofa_networks, name)
        assert {key: tensor.shape for key, tensor in weights.items()} == {
            key: tensor.shape for key, tensor in peer.state_dict().items()
        }
        peer.load_state_dict(weights)
        again = load_published(tmp_path / "written", name)
        assert again.ordering == {}
        x, smallest = images(64), supernet.space.smallest()
        activate(peers(name), smallest)
        with torch.no_grad():
            in_order = peers(name)(x)
            assert (in_order - supernet(x, smallest)).abs().max() > 1e-2
            for subnet in (smallest, *(supernet.space.sample(rng) for _ in range(2))):
                activate(peer, subnet)
                theirs, ours = peer(x), supernet(x, subnet)
                assert (theirs - ours).abs().max() <= 1e-5 * max(1.0, ours.abs().max())
                assert torch.allclose(again(x, subnet), ours, atol=1e-5, rtol=1e-5)
    finally:
        supernet.set_ordering({})


@pytest.mark.parametrize("name", ["ofa_mbv3_d234_e346_k357_w1.0", "ofa_supernet_resnet50"])
def test_published_weights_that_do_not_fit_are_listed_and_nothing_is_copied(name, peers, published):
    weights = dict(peers(name).state_dict())
    before = published(name).state().digest()
    bias = next(key for key in weights if key.startswith("classifier") and key.endswith("bias"))
    first = next(key for key in weights if key.endswith("conv.weight"))
    weights[bias] = torch.zeros(7)
    weights["extra.weight"] = torch.zeros(1)
    weights["extra.num_batches_tracked"] = torch.tensor(1)
    del weights[first]
    with pytest.raises(CheckpointError) as caught:
        load_published_weights(published(name), weights)
    for part in (
        f"missing {first}",
        "unknown extra.num_batches_tracked, extra.weight",
        f"misshapen {bias} (expected shape (1000,), found (7,))",
        "4 problems",
    ):
        assert part in str(caught.value)
    assert published(name).state().digest() == before


@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@given(seeds)
def test_changing_the_ordering_leaves_the_largest_subnet_unchanged(spec, seed):
    for norm in ("group", "batch"):
        supernet = build_supernet(seed % 7, norm=norm, shuffled=False, spec=spec).eval()
        shuffled = build_supernet(seed % 7, norm=norm, shuffled=True, spec=spec).eval()
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


def test_measured_importance_sees_channels_that_are_never_active():
    """Large weights read what is always 0: their sums keep such channels, their effect on the loss drops them."""
    supernet = build_supernet(1, norm="batch", shuffled=False)
    space, shared, rng = supernet.space, supernet.shared(), np.random.default_rng(0)
    for block in supernet.network_spec(space.largest()).blocks[1:]:
        dead = rng.permutation(block.mid_channels)[block.mid_channels // 3 :]
        with torch.no_grad():
            shared[f"{block.name}.depthwise.norm.weight"][dead] = 0
            shared[f"{block.name}.depthwise.norm.bias"][dead] = 0
            shared[f"{block.name}.project.conv.weight"][:, dead] *= 10
            if block.squeeze_excite:
                shared[f"{block.name}.squeeze_excite.expand.conv.weight"][:, 8:] = 0
    before = {name: tensor.clone() for name, tensor in shared.items()}
    narrow, wide = space.subnet(expand=1), space.largest()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 1, 20, 20, generator=generator)

    def distance() -> float:
        with torch.no_grad():
            return float((supernet.eval()(x, narrow) - supernet(x, wide)).abs().max())

    supernet.set_ordering(channel_ordering(supernet.network_spec(wide), supernet.state().tensors))
    assert distance() > 1e-3
    shared["stem.conv.weight"].requires_grad_(False)
    supernet.set_ordering(measured_ordering(supernet, [(x, torch.arange(8) % 3)]))
    assert distance() < 1e-5
    assert all(torch.equal(tensor, before[name]) and tensor.grad is None for name, tensor in shared.items())
    assert not supernet.training
    assert not shared["stem.conv.weight"].requires_grad


def test_measured_importance_is_the_square_of_weight_times_gradient_over_batches():
    supernet = build_supernet(2, norm="batch")
    supernet.spec = replace(supernet.spec, dropout=0.0)
    block = supernet.network_spec(supernet.space.largest()).blocks[1]
    weight = supernet.shared()[f"{block.name}.project.conv.weight"]
    batches = [(torch.randn(4, 1, 20, 20), torch.arange(4) % 3) for _ in range(2)]
    expected = torch.zeros(block.mid_channels)
    for x, labels in batches:
        loss = torch.nn.functional.cross_entropy(supernet.train()(x, supernet.space.largest()), labels)
        (gradient,) = torch.autograd.grad(loss, weight)
        expected += (weight.detach() * gradient).sum(dim=(0, 2, 3)) ** 2
    order = measured_ordering(supernet, batches)[f"{block.name}.mid"]
    assert (np.diff(expected.numpy()[order]) <= 1e-7 * float(expected.max())).all()


@pytest.mark.parametrize("spec", [*PUBLISHED.values(), *SPECS.values()])
def test_a_spec_round_trips_through_json(spec):
    assert type(spec).from_json(spec.to_json()) == spec
