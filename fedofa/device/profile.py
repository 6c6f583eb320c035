"""What is measured on a device, as one file: latency of operators, rates, memory, and which device it was."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedofa.device.sealed import seal, unseal
from fedofa.device.tables import LatencyTable
from fedofa.types.device import DeviceProfile
from fedofa.types.errors import ConfigError, ProfileError

FORMAT = "fedofa device profile 1"
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True, slots=True)
class MeasuredDevice:
    """One device with what was measured on it.

    Args:
        profile: the budgets that the server knows it by.
        memory_bytes_per_second: sustained memory bandwidth, bytes read and written.
        machine: what identifies the kind of device (see `describe_machine`).
        clock: that latencies were taken with.
        latency: of the space's operators.
        fit: errors of the latency table on subnets that it was not fitted to, where they were measured.
    """

    profile: DeviceProfile
    memory_bytes_per_second: float
    machine: Mapping[str, Any]
    clock: str
    latency: LatencyTable = field(repr=False)
    fit: Mapping[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal value."""
        content = {
            "format": FORMAT,
            "profile": self.profile.to_json(),
            "memory_bytes_per_second": self.memory_bytes_per_second,
            "machine": dict(self.machine),
            "clock": self.clock,
            "fit": None if self.fit is None else dict(self.fit),
            "latency": self.latency.to_json(),
        }
        return seal(content)

    @classmethod
    def from_json(cls, value: Any, where: str = "device profile") -> MeasuredDevice:
        """The inverse of `to_json`.

        Raises:
            ProfileError: when it is damaged or not a device profile.
        """
        content = unseal(value, FORMAT, where, "profile the device again")
        try:
            return cls(
                profile=DeviceProfile.from_json(content["profile"]),
                memory_bytes_per_second=float(content["memory_bytes_per_second"]),
                machine=dict(content["machine"]),
                clock=str(content["clock"]),
                latency=LatencyTable.from_json(content["latency"], f"{where}, latency"),
                fit=content.get("fit"),
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, ProfileError):
                raise
            raise ProfileError(f"{where}: not a device profile: {error!r}; profile the device again") from error


def load_device(path: Path) -> MeasuredDevice:
    """The device of a file that `fedofa profile` wrote.

    Raises:
        ProfileError: when it cannot be read or is damaged.
    """
    return MeasuredDevice.from_json(read_json(path), str(path))


def read_json(path: Path) -> Any:
    """The content of a JSON file; a `ProfileError` where there is none."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ProfileError(f"{path} cannot be read: {error}; `fedofa profile output={path}` makes one") from error


def describe_machine() -> dict[str, Any]:
    """What tells one kind of device from another: processor, cores, architecture, system."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "architecture": platform.machine(),
        "system": platform.system(),
    }


def check_machine(found: Mapping[str, Any], where: str) -> None:
    """Refuse what was measured on another kind of device than this one.

    Raises:
        ProfileError: naming what differs.
    """
    here = describe_machine()
    differing = [
        f"{key}: {found.get(key)!r} there, {value!r} here" for key, value in here.items() if found.get(key) != value
    ]
    if differing:
        raise ProfileError(
            f"{where} is of another machine ({'; '.join(differing)}); profile this one into another file"
        )


def free_memory_bytes(cgroups: Any = _CGROUPS, meminfo: Path = Path("/proc/meminfo")) -> float:
    """Memory that can be had now: what the system says is available, or what the process's control group leaves.

    Raises:
        ConfigError: where the system does not say.
    """
    available = [_available(meminfo)]
    for limit, usage in cgroups:
        try:
            available.append(int(Path(limit).read_text()) - int(Path(usage).read_text()))
        except (OSError, ValueError):
            continue  # no such control group, or "max"
    known = [value for value in available if value is not None]
    if not known:
        raise ConfigError("free memory: the system does not say; give memory_bytes")
    return float(max(min(known), 1))


def _available(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.split(":")[0].strip() in ("model name", "Model", "Hardware"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
