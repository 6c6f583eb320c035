"""What a device can do: the budgets that decide which subnet it gets and how it trains it."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fedofa.types.errors import ConfigError

ENGINES = ("torch", "onnxruntime")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._:-]{0,63}")
"""What a server takes as the name of a client or of a device class."""


def class_name(text: str) -> str:
    """A processor's name as the name of a device class: "Intel(R) Xeon(R) CPU @ 2.2GHz" is "Intel Xeon CPU 2.2GHz"."""
    words = re.sub(r"\([A-Za-z]*\)|[^A-Za-z0-9 ._:-]", "", text).split()
    return re.sub(r"^[^A-Za-z0-9]+", "", " ".join(words))[:64] or "device"


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """A device as the server sees it; the client states it in answer to a query.

    Args:
        device_class: name of the kind of device ("sensor_board", "phone", ...).
        memory_bytes: memory that training may use, after the operating system's and the engine's own floor.
        macs_per_second: sustained fp32 multiply-accumulates per second in training.
        uplink_bytes_per_second, downlink_bytes_per_second: sustained link rates.
        availability: probability, in (0, 1], that the device answers when a round begins.
        engine: what trains on it, "torch" or "onnxruntime" (a compiled step, for boards without torch).
    """

    device_class: str
    memory_bytes: float
    macs_per_second: float
    uplink_bytes_per_second: float
    downlink_bytes_per_second: float
    availability: float = 1.0
    engine: str = "torch"

    def __post_init__(self) -> None:
        if not isinstance(self.device_class, str):
            raise ConfigError(f"device profile, device_class: expected a name, found {self.device_class!r:.80}")
        if not isinstance(self.engine, str) or self.engine not in ENGINES:
            where = f"device class {self.device_class!r}, engine"
            raise ConfigError(f"{where}: expected one of {list(ENGINES)}, found {self.engine!r:.80}")
        for item in fields(self)[1:-1]:
            value = getattr(self, item.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 < value <= sys.float_info.max):
                where = f"device class {self.device_class!r}, {item.name}"
                raise ConfigError(f"{where}: expected a positive finite number, found {value!r:.80}")
        if self.availability > 1:
            raise ConfigError(
                f"device class {self.device_class!r}, availability: expected a probability in (0, 1], "
                f"found {self.availability!r}"
            )

    def to_json(self) -> dict[str, Any]:
        """A JSON object with one entry a field."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DeviceProfile:
        """The inverse of `to_json`; a `ConfigError` names what is missing or not known."""
        names = {item.name for item in fields(cls)}
        unknown, missing = sorted(set(value) - names), sorted(names - set(value) - {"availability", "engine"})
        if unknown or missing:
            raise ConfigError(f"device profile: missing {missing}, unknown {unknown}; expected {sorted(names)}")
        return cls(**value)
