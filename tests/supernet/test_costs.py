"""Counted costs against torch: its flop counter, its parameters, and what autograd is seen to keep."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from cohorts import CHAIN_SPEC, SPECS, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedofa.supernet.chain import ChainSupernet
from fedofa.supernet.families import build_elastic, two_conv_cnn
from fedofa.supernet.fixed import FixedSupernet
from fedofa.supernet.mobilenet_v3 import MobileNetV3Supernet
from fedofa.supernet.published import PUBLISHED

SUPERNETS = {
    (family, norm, dropout): build_elastic(
        type(spec).from_json({**spec.to_json(), "norm": norm, "dropout": dropout}), torch.Generator().manual_seed(0)
    )
    for family, spec in SPECS.items()
    for norm in ("group", "batch")
    for dropout in (0.0, 0.1)
}
CHAIN = replace(CHAIN_SPEC, resolutions=(16, 21), dropout=0.0)
SUPERNETS |= {
    (f"chain, {activation}, {norm}, {width} features, pool {pool}", 0.0): ChainSupernet(
        replace(CHAIN, activation=activation, norm=norm, feature_width=width, stem_pool=pool),
        torch.Generator().manual_seed(0),
    )
    for activation, norm, width, pool in (
        ("relu6", "batch", 32, False),
        ("relu", "batch", 0, False),
        ("relu", "group", 0, True),
        ("relu", "batch", 32, True),
    )
}
SUPERNETS |= {
    (f"lite {spec.family}, {norm}", 0.0): build_elastic(
        replace(spec, norm=norm, lite_residual=True, dropout=0.0), torch.Generator().manual_seed(0)
    )
    for spec in (SPECS["mobilenet_v3"], CHAIN)
    for norm in ("group", "batch")
}
variants = st.sampled_from(sorted(SUPERNETS))
some = settings(max_examples=30, deadline=None)


def kept_elements(model: nn.Module, x: torch.Tensor) -> int:
    """Values that autograd keeps in a forward pass: distinct storages, the model's own tensors apart."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) // x.element_size()


def kept_per_example(model: nn.Module, shape: tuple[int, ...]) -> int:
    return kept_elements(model, torch.randn(3, *shape)) - kept_elements(model, torch.randn(2, *shape))


@some
@given(variants, seeds)
def test_macs_parameters_and_kept_elements_are_torchs(variant, seed):
    supernet = SUPERNETS[variant]
    subnet = supernet.space.sample(np.random.default_rng(seed))
    model, costs = supernet.build(subnet).train(), supernet.block_costs(subnet)
    shape = (1, supernet.resolution(subnet), supernet.resolution(subnet))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, *shape))
    assert sum(cost.macs for cost in costs) == counter.get_total_flops() // 2 // 2
    assert sum(cost.num_parameters for cost in costs) == sum(p.numel() for p in model.parameters())
    assert sum(cost.saved_elements for cost in costs) == kept_per_example(model, shape)


@some
@given(variants, seeds)
def test_blocks_are_the_modules_in_forward_order_with_their_sizes(variant, seed):
    supernet = SUPERNETS[variant]
    subnet = supernet.space.sample(np.random.default_rng(seed))
    model = supernet.build(subnet).eval()
    costs = supernet.block_costs(subnet)
    sizes = {}
    for cost in costs:
        model.get_submodule(cost.name).register_forward_hook(
            lambda module, inputs, output, name=cost.name: sizes.update({name: (inputs[0].numel(), output.numel())})
        )
    side = supernet.resolution(subnet)
    model(torch.randn(1, 1, side, side))
    assert sizes == {cost.name: (cost.input_elements, cost.output_elements) for cost in costs}
    assert list(sizes) == [cost.name for cost in costs]
    for cost in costs:
        names = [f"{cost.name}.{name}" for name, _ in model.get_submodule(cost.name).named_parameters()]
        assert sorted(item.name for item in cost.parameters) == sorted(names)
        assert cost.widest_elements >= cost.input_elements


@pytest.mark.parametrize("name", PUBLISHED)
def test_macs_and_parameters_of_published_sizes_are_torchs(name):
    """On the meta device, so that size costs nothing."""
    supernet, rng = build_elastic(PUBLISHED[name]), np.random.default_rng(0)
    space = supernet.space
    for subnet in (space.largest(), space.smallest(), *(space.sample(rng) for _ in range(3))):
        model, costs, side = supernet.skeleton(subnet).eval(), supernet.block_costs(subnet), supernet.resolution(subnet)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, side, side, device="meta"))
        assert sum(cost.macs for cost in costs) == counter.get_total_flops() // 2
        assert sum(cost.num_parameters for cost in costs) == sum(p.numel() for p in model.parameters())


def test_the_published_largest_and_smallest_subnets_cost_what_the_paper_says():
    """566 and 121 million MACs at 224 px (Once-for-All), to a percent."""
    supernet = MobileNetV3Supernet.published()
    for subnet, expected in (
        (supernet.space.largest(), 566e6),
        (supernet.space.subnet(kernel=3, expand=3, depth=2, resolution=224), 121e6),
    ):
        assert sum(cost.macs for cost in supernet.block_costs(subnet)) == pytest.approx(expected, rel=0.01)


def test_the_kept_elements_of_a_fixed_network_are_torchs_where_no_two_children_keep_the_same():
    module = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Hardswish(), nn.Flatten(), nn.Linear(8 * 36, 32), nn.Hardswish())
    supernet = FixedSupernet(module, (1, 8, 8))
    counted = [cost.saved_elements for cost in supernet.block_costs(supernet.space.largest())]
    assert counted == [64, 288, 0, 288, 32]
    assert sum(counted) == kept_per_example(module, (1, 8, 8))


def test_the_kept_elements_of_a_fixed_network_are_torchs():
    supernet = FixedSupernet(two_conv_cnn(), (1, 28, 28))
    subnet = supernet.space.largest()
    counted = sum(cost.saved_elements for cost in supernet.block_costs(subnet))
    assert counted == kept_per_example(supernet.build(subnet), (1, 28, 28))
