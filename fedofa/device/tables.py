"""Latency tables: milliseconds an operator on one device, as a file; one format for any device. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

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
