"""Energy of one layer by hand, what must make it smaller, the shipped chips, and batteries."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from cohorts import SPEC

from fedofa.device.energy import Battery, Chip, Energy, layer_macs
from fedofa.device.layers import Layer
from fedofa.device.operators import OperatorIndex, SubnetBatch
from fedofa.supernet.families import build_elastic
from fedofa.supernet.network import ConvSpec
from fedofa.types.errors import ConfigError, InfeasibilityError

CHIP = Chip("test", "made up", 1e-12, 1, 2, 6, 200, buffer_bytes=1e6, array_rows=12, array_columns=14)
CHIPS = sorted((Path(__file__).parents[2] / "conf" / "chip").glob("*.yaml"))
INDEX = OperatorIndex.of(build_elastic(SPEC))
BATCH = SubnetBatch(INDEX, INDEX.encoding.sample(np.random.default_rng(0), 30))


def test_a_pointwise_layer_by_hand():
    layer = Layer(ConvSpec("x", 8, 16), in_side=4, out_side=4)
    macs = 8 * 16 * 16
    registers = macs * (1 + 4 * 1)
    array = 2 * (macs + macs)
    buffer = 6 * (macs / 4 + (macs / 14 + 16 * 16) + 2 * macs / 8)
    dram = 200 * 8 * 16
    assert layer_macs(layer, CHIP) == pytest.approx(registers + array + buffer + dram)
    small = replace(CHIP, buffer_bytes=100)
    assert layer_macs(layer, small) == pytest.approx(registers + array + buffer + dram + 200 * (8 + 16) * 16)


@pytest.mark.parametrize(
    "change",
    [{"weight_bits": 8}, {"activation_bits": 8}, {"weight_sparsity": 0.5}, {"activation_sparsity": 0.5}],
)
def test_fewer_bits_and_more_zeros_cost_less(change):
    before = Energy(INDEX, CHIP).predict(BATCH)
    assert (Energy(INDEX, replace(CHIP, **change)).predict(BATCH) < before).all()


@pytest.mark.parametrize("level", ["register_file", "array", "buffer", "dram", "mac_joules"])
def test_every_level_counts(level):
    dearer = replace(CHIP, **{level: 2 * getattr(CHIP, level)})
    before, after = Energy(INDEX, CHIP).predict(BATCH), Energy(INDEX, dearer).predict(BATCH)
    assert (after > before).all() and (after <= 2 * before * (1 + 1e-9)).all()


@pytest.mark.parametrize("path", CHIPS, ids=lambda path: path.stem)
def test_the_shipped_chips_state_their_source(path):
    chip = Chip(**yaml.safe_load(path.read_text()))
    assert chip.source and Energy(INDEX, chip).predict(BATCH).min() > 0


@pytest.mark.parametrize(
    ("change", "name"),
    [({"dram": -1}, "dram"), ({"weight_sparsity": 1.0}, "weight_sparsity"), ({"buffer": "6"}, "buffer")],
)
def test_a_chip_that_cannot_be_is_refused(change, name):
    with pytest.raises(ConfigError, match=f"chip 'test', {name}"):
        replace(CHIP, **change)


def test_a_battery_tightens_the_budget():
    assert Battery(1.0, 0.2).tightened(50.0) == 50.0
    assert Battery(0.6, 0.2).tightened(50.0) == pytest.approx(25.0)
    with pytest.raises(InfeasibilityError, match="20%"):
        Battery(0.2, 0.2).tightened(50.0)
    with pytest.raises(ConfigError, match="state of charge"):
        Battery(1.2)
