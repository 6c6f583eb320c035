"""Any module as a supernet of one subnet."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedofa.supernet.families import two_conv_cnn
from fedofa.supernet.fixed import FixedSupernet
from fedofa.types.errors import ConfigError, SpaceError


def build_module() -> nn.Sequential:
    """With two batch norms, which hold integer scalars besides their statistics."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.Hardswish()),
        nn.Flatten(),
        nn.Linear(8 * 3 * 3, 5),
    )


@pytest.fixture
def supernet() -> FixedSupernet:
    return FixedSupernet(build_module(), (2, 8, 8))


def images(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def test_it_has_one_subnet(supernet):
    assert supernet.space.count() == 1
    assert supernet.space.largest() == supernet.space.smallest()
    assert supernet.resolution(supernet.space.largest()) is None
    assert supernet.channel_groups() == {}
    with pytest.raises(SpaceError, match="unknown channel group"):
        supernet.set_ordering({"x": np.arange(2)})


@pytest.mark.parametrize("training", [True, False])
def test_module_forward_and_built_subnet_compute_the_same(training, supernet):
    subnet = supernet.space.largest()
    expected = build_module().train(training)(images())
    assert torch.equal(supernet.build(subnet).train(training)(images()), expected)
    assert torch.equal(supernet.train(training)(images(), subnet), expected)


def test_forward_does_not_touch_statistics_nor_the_module_it_wraps(supernet):
    before = supernet.state().digest()
    supernet.train()(images(), supernet.space.largest())
    assert supernet.state().digest() == before


def test_a_built_subnet_owns_its_memory(supernet):
    before = supernet.state().digest()
    model = supernet.build(supernet.space.largest()).train()
    model(images())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert supernet.state().digest() == before


def test_a_state_round_trips_with_batch_norms_integer_scalars(supernet):
    subnet = supernet.space.largest()
    trained = build_module().train()
    trained(images())
    source = FixedSupernet(trained, (2, 8, 8))
    assert source.state().tensors["1.num_batches_tracked"] == 1
    assert source.state().digest() != supernet.state().digest()
    supernet.load_state(source.state())
    assert supernet.state().digest() == source.state().digest()
    with torch.no_grad():
        assert torch.equal(supernet.eval()(images(), subnet), source.eval()(images(), subnet))


def test_tied_tensors_are_refused_by_name_and_shared_submodules_serve():
    tied = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[3].weight = tied[1].weight
    with pytest.raises(ConfigError, match=r"found tied ones: 1\.weight = 3\.weight; let the submodules share"):
        FixedSupernet(tied, (1, 2, 2))
    linear = nn.Linear(4, 4)
    shared = FixedSupernet(nn.Sequential(nn.Flatten(), linear, nn.ReLU(), linear), (1, 2, 2)).eval()
    subnet, x = shared.space.largest(), torch.randn(2, 1, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(shared.build(subnet).eval()(x), shared.network(x))
        torch.testing.assert_close(shared(x, subnet), shared.network(x))


def test_roles_follow_from_the_modules(supernet):
    roles = {item.name: item.role for item in supernet.parameter_table(supernet.space.largest())}
    assert roles["0.weight"] == "weight"
    assert roles["0.bias"] == "bias"
    assert roles["1.weight"] == roles["1.bias"] == roles["3.1.bias"] == "norm"
    assert roles["1.running_mean"] == roles["1.num_batches_tracked"] == "statistic"
    assert roles.keys() == build_module().state_dict().keys()


@pytest.mark.parametrize(("module", "shape"), [(build_module(), (2, 8, 8)), (two_conv_cnn(3, 7, 32), (3, 32, 32))])
def test_macs_and_parameters_are_counted_per_child(module, shape):
    supernet = FixedSupernet(module, shape)
    costs = supernet.block_costs(supernet.space.largest())
    assert [cost.name for cost in costs] == [name for name, _ in module.named_children()]
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(3, *shape))
    assert sum(cost.macs for cost in costs) == counter.get_total_flops() // 2 // 3
    for cost, child in zip(costs, module.children(), strict=True):
        assert cost.num_parameters == sum(parameter.numel() for parameter in child.parameters())
    assert costs[0].input_elements == int(np.prod(shape))
    assert costs[-1].output_elements == module[-1].out_features
    for one, following in itertools.pairwise(costs):
        assert one.output_elements == following.input_elements


def test_a_childs_kept_elements_count_neither_parameters_nor_buffers():
    module = nn.Sequential(nn.Conv2d(2, 64, 1, bias=False), nn.BatchNorm2d(64))
    supernet = FixedSupernet(module, (2, 8, 8))
    conv, norm = supernet.block_costs(supernet.space.largest())
    assert conv.saved_elements == 2 * 64
    assert norm.saved_elements == 64 * 64, "the batch's mean and deviation are kept once, not once an example"


def test_the_module_may_name_its_children_by_attribute():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 3)
            self.unused = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

    supernet = FixedSupernet(Net(), (4,))
    (cost,) = supernet.block_costs(supernet.space.largest())
    assert (cost.name, cost.macs, cost.num_parameters) == ("body", 12, 15)
