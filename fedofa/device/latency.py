"""Latency tables: milliseconds an operator on one device, as a file and as a cost model; one format for any device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, final

import numpy as np

from fedofa.device.models import AdditiveCost
from fedofa.device.operators import Operator, OperatorIndex, SubnetBatch
from fedofa.device.sealed import seal, unseal
from fedofa.types.errors import ProfileError

FORMAT = "fedofa latency table 1"


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """What each operator takes on one device, batch 1.

    Args:
        family: of the supernet whose operators these are.
        engine: what ran them ("torch 2.13.0", "onnxruntime 1.32.0", "FPGA, 300 MHz").
        threads: that the engine may use.
        source: where the figures come from; "made up" where nobody measured them.
        milliseconds: operator key (see `operators.Operator`) -> milliseconds inside a network.
        overhead_ms: of one forward pass beside its operators.
    """

    family: str
    engine: str
    threads: int
    source: str
    milliseconds: Mapping[str, float] = field(repr=False)
    overhead_ms: float = 0.0

    def __post_init__(self) -> None:
        wrong = {key: value for key, value in self.milliseconds.items() if not _is_time(value)}
        if wrong:
            key, value = next(iter(wrong.items()))
            raise ProfileError(
                f"latency table of {self.engine!r}: {len(wrong)} of {len(self.milliseconds)} operators have no valid "
                f"time; {key!r}: expected milliseconds, finite and not negative, found {value!r:.40}; measure it again"
            )
        if not _is_time(self.overhead_ms) or not isinstance(self.threads, int) or self.threads < 1:
            raise ProfileError(
                f"latency table of {self.engine!r}: expected an overhead in milliseconds and at least one thread, "
                f"found {self.overhead_ms!r:.40} and {self.threads!r:.40}"
            )

    def to_json(self) -> dict[str, Any]:
        """A JSON object with a checksum."""
        content = {"format": FORMAT, **asdict(self), "milliseconds": dict(self.milliseconds)}
        return seal(content)

    @classmethod
    def from_json(cls, value: Any, where: str = "latency table") -> LatencyTable:
        """The inverse of `to_json`. A table that was written by hand may leave the checksum out.

        Args:
            value: the object.
            where: the file, for errors.

        Raises:
            ProfileError: when it is damaged or not a latency table.
        """
        content = unseal(value, FORMAT, where, "measure it again or copy it anew")
        names = {item.name for item in fields(cls)}
        missing = sorted(names - set(content) - {"overhead_ms"})
        unknown = sorted(set(content) - names - {"format"})
        if missing or unknown or not isinstance(content.get("milliseconds"), Mapping):
            raise ProfileError(f"{where}: missing {missing}, unknown {unknown}; expected {sorted(names)}")
        return cls(**{name: content[name] for name in names if name in content})


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


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
