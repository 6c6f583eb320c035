"""One client as its ClientApp sees it: who it is, what device it runs on, what data it holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from flwr.app import Context

from clients.examples import load_examples
from conf.compose import load_conf
from conf.schema import DeviceClassConf, SimulateConf
from fedofa.data.federation import ClientData, FederatedData
from fedofa.device.fleet import assign_profiles
from fedofa.device.profile import check_machine, load_device
from fedofa.types.device import DeviceProfile
from fedofa.types.errors import ConfigError

_FLEET_STREAM = 1
"""Tells the fleet's random numbers from others that are drawn from the same seed."""


@dataclass(frozen=True, slots=True)
class LocalClient:
    """A client's identity, device and data. The id is the client's own; it does not change with the runtime."""

    client_id: str
    profile: DeviceProfile
    data: ClientData
    device: Path | None = None  # the file that was measured on it, or on one of its kind


def client_id(partition: int) -> str:
    """The id of the client that holds a partition of a simulated federation."""
    return f"client-{partition:04d}"


def local_client(context: Context) -> LocalClient:
    """The client of a simulated federation that this node is, by the node's `partition-id`.

    A node that states a `device`, a file that `fedofa profile` wrote on this machine, is that device; others are
    devices of the fleet's classes.

    Raises:
        ConfigError: when the node config is not understood.
        ProfileError: when the device's file is damaged, or of another machine.
    """
    partition = context.node_config.get("partition-id")
    if not isinstance(partition, int):
        raise ConfigError(
            f"node config: expected an integer 'partition-id', found {partition!r}; start the node with "
            '--node-config "partition-id=0 num-partitions=1"'
        )
    data, profiles, classes = _simulation(tuple(sorted(context.run_config.items())))
    if partition >= len(profiles):
        raise ConfigError(f"partition-id {partition} is beyond the fleet of {len(profiles)} clients")
    name, own = client_id(partition), context.node_config.get("device")
    if own:
        device = load_device(Path(str(own)))
        check_machine(device.machine, str(own))
        return LocalClient(name, device.profile, data.client(partition), Path(str(own)))
    profile = profiles[partition]
    path = classes[profile.device_class].device
    return LocalClient(name, profile, data.client(partition), Path(path).expanduser() if path else None)


@lru_cache(maxsize=2)
def _simulation(
    run_config: tuple[tuple[str, object], ...],
) -> tuple[FederatedData, tuple[DeviceProfile, ...], dict[str, DeviceClassConf]]:
    """The data, the fleet and its classes of a run; a process reads its settings once."""
    conf = load_conf(dict(run_config))
    return federation(conf), fleet_profiles(conf), conf.fleet.classes


def federation(conf: SimulateConf) -> FederatedData:
    """The partitioned data of a run."""
    return load_examples(conf.data, conf.seed, num_clients=conf.fleet.num_clients, **asdict(conf.partition))


def fleet_profiles(conf: SimulateConf) -> tuple[DeviceProfile, ...]:
    """Every simulated client's device, by partition."""
    classes = {}
    for name, item in conf.fleet.classes.items():
        budgets = {key: value for key, value in asdict(item).items() if key not in ("share", "device")}
        classes[name] = (item.share, DeviceProfile(name, **budgets))
    rng = np.random.default_rng([conf.seed, _FLEET_STREAM])
    return tuple(assign_profiles(classes, conf.fleet.num_clients, rng))
