"""Calibration: pooled statistics over uneven batches, and a subnet that regains its accuracy by them."""

import numpy as np
import pytest
import torch
from cohorts import build_supernet
from torch import nn
from torch.nn import functional

from fedofa.evaluation.calibration import calibrate
from fedofa.evaluation.metrics import evaluate

SUPERNET = build_supernet(norm="batch")
SUBNET = SUPERNET.space.smallest()


def images(batch: int = 23) -> torch.Tensor:
    return 3 + 2 * torch.randn(batch, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sizes", [[23], [10, 10, 3], [2, 21], [1] * 23])
def test_the_first_norms_statistics_are_those_of_all_data_at_once(sizes):
    model = SUPERNET.build(SUBNET)
    seen = []
    model.stem.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert calibrate(model, images().split(sizes))
    everything = torch.cat(seen).double().transpose(0, 1).flatten(1)
    assert everything.shape[1] == 23 * 8 * 8
    torch.testing.assert_close(model.stem.norm.running_mean, everything.mean(1).float())
    torch.testing.assert_close(model.stem.norm.running_var, everything.var(1, correction=0).float())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.running_var > 0).all()


def test_deeper_norms_see_inputs_normalised_by_the_batch():
    """With one batch: the statistics that training mode shows, whatever the wrong running ones were."""
    model, reference = SUPERNET.build(SUBNET), SUPERNET.build(SUBNET).train()
    with torch.no_grad():
        model.stem.norm.running_mean.fill_(100.0)
    seen = {}
    for name, module in reference.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: inputs[0]}))
    with torch.no_grad():
        reference(images())
    calibrate(model, [images()])
    assert len(seen) > 5
    for name, x in seen.items():
        norm = model.get_submodule(name)
        torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(norm.running_var, x.var((0, 2, 3), correction=0), atol=1e-5, rtol=1e-4)


def test_without_batch_norm_nothing_happens():
    model = build_supernet(norm="group").build(SUBNET)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert calibrate(model, [images()]) is False
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_only_statistics_change_and_momentum_mode_and_hooks_are_as_before():
    model = SUPERNET.build(SUBNET).train()
    model.stem.norm.momentum = 0.03
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(model, [images()])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, _ in model.named_buffers()}
    assert model.stem.norm.momentum == 0.03
    assert model.stages[0][0].depthwise.norm.momentum == 0.1
    assert not any(module.training or module._forward_pre_hooks for module in model.modules())
    first = dict(model.named_buffers())["stem.norm.running_mean"].clone()
    with torch.no_grad():
        model(10 * images())
    assert torch.equal(first, model.stem.norm.running_mean)


def test_an_error_on_the_way_restores_momentum_and_removes_hooks():
    model = SUPERNET.build(SUBNET)
    with pytest.raises(RuntimeError):
        calibrate(model, [images(), torch.zeros(2, 5, 16, 16)])
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def stripes(num_examples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes, horizontal and vertical stripes, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_examples) % 2
    wave = torch.sin(torch.arange(16) * (np.pi / 2)).repeat(16, 1)
    pictures = torch.stack([wave if label else wave.T for label in labels]).unsqueeze(1)
    return pictures + 0.5 * torch.randn(num_examples, 1, 16, 16, generator=generator), labels


def test_a_subnet_with_wrong_statistics_regains_its_accuracy():
    supernet = build_supernet(norm="batch").train()
    subnet = supernet.space.smallest()
    inputs, labels = stripes(64, seed=1)
    torch.manual_seed(0)
    optimiser = torch.optim.SGD(supernet.parameters(), lr=0.05, momentum=0.9)
    for _ in range(25):
        optimiser.zero_grad()
        functional.cross_entropy(supernet(inputs, subnet), labels).backward()
        optimiser.step()
    with torch.no_grad():
        for name, tensor in supernet.shared().items():
            if name.endswith("running_mean"):
                tensor.fill_(3.0)
    model = supernet.build(subnet)
    test = stripes(200, seed=2)
    assert evaluate(model, *test).accuracy < 0.7
    calibrate(model, inputs.split(20))
    assert evaluate(model, *test).accuracy > 0.95
