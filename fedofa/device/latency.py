"""Latency as a cost model: a device's table, or a roofline where nobody measured one."""

from __future__ import annotations

from typing import final

import numpy as np

from fedofa.device.models import AdditiveCost
from fedofa.device.operators import Operator, OperatorIndex, SubnetBatch
from fedofa.device.tables import LatencyTable
from fedofa.types.errors import ProfileError


@final
class Latency(AdditiveCost):
    """Milliseconds of one forward pass of one example.

    Args:
        index: of the space.
        table: of a device.

    Raises:
        ProfileError: when the table is of another family, or lacks operators of the space.
    """

    setting, unit = "latency_ms", "ms"

    def __init__(self, index: OperatorIndex, table: LatencyTable) -> None:
        family, keys = index.encoding.space.family, {operator.key for operator in index.operators}
        if table.family != family:
            raise ProfileError(
                f"latency table of {table.engine!r}: it is of family {table.family!r}, the supernet of {family!r}; "
                "profile the device with this supernet"
            )
        missing = sorted(keys - set(table.milliseconds))
        if missing:
            raise ProfileError(
                f"latency table of {table.engine!r}: {len(missing)} of the space's {len(keys)} operators are not in "
                f"it, among them {missing[0]!r}; profile the device with this supernet, or narrow the space "
                "(supernet.resolutions=[...]) to what was measured"
            )
        super().__init__(index, np.array([table.milliseconds[operator.key] for operator in index.operators]))
        self.overhead_ms = table.overhead_ms

    def predict(self, batch: SubnetBatch) -> np.ndarray:
        return super().predict(batch) + self.overhead_ms


def roofline_table(
    index: OperatorIndex,
    *,
    macs_per_second: float,
    bytes_per_second: float,
    launch_ms: float,
    engine: str,
    source: str,
    bytes_per_value: int = 4,
) -> LatencyTable:
    """A table for hardware that nobody measured: each operator takes as long as its arithmetic or its traffic.

    Args:
        index: of the space.
        macs_per_second, bytes_per_second: sustained rates.
        launch_ms: of every operator beside that.
        engine, source: as in `LatencyTable`.
        bytes_per_value: of weights and activations.
    """
    macs = index.operator_table(lambda cost: cost.macs)
    weights = index.operator_table(lambda cost: cost.num_parameters)
    values = np.array([_moved(operator) for operator in index.operators]) + weights
    seconds = np.maximum(macs / macs_per_second, values * bytes_per_value / bytes_per_second)
    times = {op.key: float(ms) for op, ms in zip(index.operators, seconds * 1e3 + launch_ms, strict=True)}
    return LatencyTable(index.encoding.space.family, engine, 1, source, times)


def _moved(operator: Operator) -> int:
    return operator.input_elements + operator.output_elements
