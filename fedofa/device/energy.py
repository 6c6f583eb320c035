"""Energy of a forward pass: arithmetic and data movement through a chip's memory hierarchy, and a battery's budget.

The method is that of Yang, Chen and Sze (arXiv 1611.05128, section 3): the energy of a layer is its MACs times the
energy of one, plus at every level of the hierarchy (register file, array of processing elements, global buffer, DRAM)
the number of accesses times the energy of one. Bit widths and zeros scale both. The accesses follow a row-stationary
mapping (Eyeriss, ISCA 2016); see `_accesses`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import final

import numpy as np

from fedofa.device.layers import Layer, layers_of
from fedofa.device.models import AdditiveCost
from fedofa.device.operators import OperatorIndex
from fedofa.types.errors import ConfigError, InfeasibilityError

_REFERENCE_BITS = 16
_TO_MILLI = 1e3
_REGISTER_ACCESSES = 4
"""A MAC reads a weight, an input and a partial sum, and writes the sum."""


@dataclass(frozen=True, slots=True)
class Chip:
    """One accelerator's energy table.

    Args:
        name, source: of the chip and of the figures; "made up" where nobody measured them.
        mac_joules: of one multiply-accumulate of 16 x 16 bits.
        register_file, array, buffer, dram: energy of moving one 16-bit value, in MACs.
        buffer_bytes: of the global buffer.
        array_rows, array_columns: of processing elements.
        weight_bits, activation_bits: of values.
        weight_sparsity, activation_sparsity: fraction of zeros, whose MACs and traffic are skipped.
    """

    name: str
    source: str
    mac_joules: float
    register_file: float
    array: float
    buffer: float
    dram: float
    buffer_bytes: float
    array_rows: int
    array_columns: int
    weight_bits: int = 16
    activation_bits: int = 16
    weight_sparsity: float = 0.0
    activation_sparsity: float = 0.0

    def __post_init__(self) -> None:
        for item in fields(self)[2:]:
            value = getattr(self, item.name)
            sparsity = item.name.endswith("sparsity")
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not (0 <= value < 1 if sparsity else value > 0):
                expected = "a fraction in [0, 1)" if sparsity else "a positive number"
                raise ConfigError(f"chip {self.name!r}, {item.name}: expected {expected}, found {value!r:.40}")


@dataclass(frozen=True, slots=True)
class Accesses:
    """Values that a layer moves at each level, by kind: weights, activations (in and out), partial sums."""

    array: tuple[float, float, float]
    buffer: tuple[float, float, float]
    dram: tuple[float, float, float]


def _accesses(layer: Layer, chip: Chip) -> Accesses:
    """Accesses of one layer, mapped row-stationary.

    A row of the kernel stays in a processing element and slides over a row of the input: a weight is fetched from the
    buffer once an output row. An input serves the kernel's positions in the array and the output channels of the
    array's columns. Partial sums add up over the kernel's rows and the input channels of the array's rows before they
    go to the buffer. DRAM sees weights once; activations where input and result do not fit into the buffer together.
    """
    macs, kernel = layer.macs, layer.conv.kernel
    columns = min(layer.conv.out_channels if not layer.conv.depthwise else 1, chip.array_columns)
    rows = min(layer.fan_in, max(chip.array_rows // kernel, 1))
    weights = macs / layer.out_side
    inputs = max(macs / (kernel**2 * columns), layer.input_elements)
    sums = 2 * macs / (kernel**2 * rows)
    held = (layer.input_elements + layer.output_elements) * chip.activation_bits / 8
    moved = float(layer.input_elements + layer.output_elements) if held > chip.buffer_bytes else 0.0
    return Accesses(
        array=(0.0, macs / kernel, macs / kernel),
        buffer=(weights, inputs + layer.output_elements, sums),
        dram=(float(layer.weight_elements), moved, 0.0),
    )


def layer_macs(layer: Layer, chip: Chip) -> float:
    """Energy of one layer in units of one 16-bit MAC."""
    weight_share = (1 - chip.weight_sparsity) * chip.weight_bits / _REFERENCE_BITS
    activation_share = (1 - chip.activation_sparsity) * chip.activation_bits / _REFERENCE_BITS
    done = layer.macs * (1 - chip.weight_sparsity) * (1 - chip.activation_sparsity)
    widths = chip.weight_bits * chip.activation_bits / _REFERENCE_BITS**2
    accesses = _accesses(layer, chip)
    energy = done * (widths + _REGISTER_ACCESSES * chip.register_file * chip.activation_bits / _REFERENCE_BITS)
    for name, cost in (("array", chip.array), ("buffer", chip.buffer), ("dram", chip.dram)):
        weights, activations, sums = getattr(accesses, name)
        energy += cost * (weights * weight_share + activations * activation_share + sums)
    return energy


@final
class Energy(AdditiveCost):
    """Millijoules of one forward pass of one example on one chip.

    Args:
        index: of the space.
        chip: its energy table.
    """

    setting, unit = "energy_mj", "mJ"

    def __init__(self, index: OperatorIndex, chip: Chip) -> None:
        macs = [sum(layer_macs(layer, chip) for layer in layers_of(operator)) for operator in index.operators]
        super().__init__(index, np.array(macs) * chip.mac_joules * _TO_MILLI)


@dataclass(frozen=True, slots=True)
class Battery:
    """A device's charge, which tightens its energy budget.

    Args:
        state_of_charge: in [0, 1].
        reserve_fraction: of the charge that is not for this work, in [0, 1).
    """

    state_of_charge: float
    reserve_fraction: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.state_of_charge <= 1 or not 0 <= self.reserve_fraction < 1:
            raise ConfigError(
                f"battery: expected a state of charge in [0, 1] and a reserve in [0, 1), found "
                f"{self.state_of_charge!r} and {self.reserve_fraction!r}"
            )

    def tightened(self, energy_budget: float) -> float:
        """The budget times the share of the free charge that is left: all of it when full, none at the reserve.

        Raises:
            InfeasibilityError: when the charge is at the reserve or below.
        """
        left = (self.state_of_charge - self.reserve_fraction) / (1 - self.reserve_fraction)
        if left <= 0:
            raise InfeasibilityError(
                f"battery: its charge of {self.state_of_charge:.0%} is at or below the reserve of "
                f"{self.reserve_fraction:.0%}, so no energy is left; charge it, or lower the reserve"
            )
        return energy_budget * left
