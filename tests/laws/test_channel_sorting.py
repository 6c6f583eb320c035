"""Channels by importance before each expand phase: as the peer package sorts them; what trained before stays."""

import numpy as np
import pytest
import torch
from cohorts import SPECS, build_supernet, seeds
from hypothesis import given, settings
from peers import activate, build_peer, images

from fedofa.shrinking.channels import sorted_channels
from fedofa.shrinking.sampling import PhaseSampler
from fedofa.shrinking.schedule import ShrinkSchedule
from fedofa.supernet.families import build_elastic
from fedofa.supernet.published import PUBLISHED, load_published_weights

EXPAND = {"ofa_supernet_resnet50": (0.25, 0.2)}
"""The second and the smallest expand ratio."""


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_channels_are_sorted_as_by_the_peer(name, ofa_networks):
    """The peer moves channels when a phase begins, we order them: subnets of both give the same logits.

    In the second phase the peer sorts what a squeeze-excite has inside as if nothing had been trained narrower, so only
    families without one are compared there.
    """
    peer = build_peer(ofa_networks, name)
    supernet = build_elastic(PUBLISHED[name], torch.Generator()).eval()
    load_published_weights(supernet, dict(peer.state_dict()))
    schedule = ShrinkSchedule.progressive(supernet.space, 1000)
    narrowing = [index for index, phase in enumerate(schedule.phases) if phase.order_channels]
    second, smallest = EXPAND.get(name, (4, 3))
    x = images(64)

    def compare(expand):
        subnet = supernet.space.subnet(expand=expand)
        activate(peer, subnet)
        with torch.no_grad():
            theirs, ours = peer(x), supernet(x, subnet)
        assert (theirs - ours).abs().max() <= 1e-5 * max(1.0, ours.abs().max())
        return ours

    in_order = compare(second)
    peer.re_organize_middle_weights(expand_ratio_stage=0)
    supernet.set_ordering(sorted_channels(supernet, schedule.phases[: narrowing[0]], supernet.state()))
    sorted_once = compare(second)
    assert (sorted_once - in_order).abs().max() > 1e-2
    if "mbv3" in name:
        return
    peer.re_organize_middle_weights(expand_ratio_stage=1)
    supernet.set_ordering(sorted_channels(supernet, schedule.phases[: narrowing[1]], supernet.state()))
    assert torch.allclose(compare(second), sorted_once, atol=1e-5, rtol=1e-5)
    compare(smallest)


@settings(max_examples=10, deadline=None)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@given(seeds)
def test_subnets_of_earlier_phases_stay_the_networks_they_are(spec, seed):
    for norm in ("group", "batch"):
        supernet = build_supernet(seed % 7, norm=norm, spec=spec).eval()
        space, phases = supernet.space, ShrinkSchedule.progressive(supernet.space, 100).phases
        last = max(index for index, phase in enumerate(phases) if phase.order_channels)
        rng, x = np.random.default_rng(seed), torch.randn(2, 1, 20, 20, generator=torch.Generator().manual_seed(seed))
        sampler = PhaseSampler(space, phases[last - 1], lambda _: 0)
        trained = [space.largest(), sampler.smallest(), *(sampler.draw(rng)[0] for _ in range(3))]
        with torch.no_grad():
            before = [supernet(x, subnet) for subnet in trained]
            given_ordering = {group: order.tolist() for group, order in supernet.ordering.items()}
            supernet.set_ordering(sorted_channels(supernet, phases[:last], supernet.state()))
            after = [supernet(x, subnet) for subnet in trained]
        assert given_ordering != {group: order.tolist() for group, order in supernet.ordering.items()}
        for a, b in zip(before, after, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        once = sorted_channels(supernet, phases[:last], supernet.state())
        assert {group: order.tolist() for group, order in once.items()} == {
            group: order.tolist() for group, order in supernet.ordering.items()
        }, "sorting what is sorted changes nothing"
