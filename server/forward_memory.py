"""What a forward pass takes in memory, measured in a process of its own (this module, JSON in, a number out).

The figure is the growth of the process's own (anonymous) memory, at its peak, beyond what torch takes that has run a
like network; the allocator gives freed tensors back at once, so that nothing else is resident. Pages of the libraries'
files do not count: they are shared, the system drops them when it likes, and which implementation of a convolution is
read in depends on the size of the map.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedofa.device.allocator import tune_allocator
from fedofa.supernet.elastic import ElasticSupernet
from fedofa.supernet.families import build_supernet
from fedofa.supernet.layers import Network
from fedofa.supernet.network import NetworkSpec
from fedofa.types.errors import ConfigError, ProfileError
from fedofa.types.space import SubnetConfig

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_SECONDS = 300
_PASSES = 50
_WARM_SIDE = 32


def forward_bytes(supernet: Mapping[str, Any], subnet: SubnetConfig) -> int:
    """The peak of forward passes of one image, weights and image included, beyond the engine's floor.

    Args:
        supernet: its settings, as `build_supernet` takes them.
        subnet: of its space.

    Raises:
        ProfileError: when the process fails, as it does where the system tells no peak.
    """
    task = json.dumps({"supernet": dict(supernet), "subnet": subnet.to_json()})
    command = [sys.executable, "-m", "server.forward_memory"]
    done = subprocess.run(command, input=task, capture_output=True, text=True, timeout=_SECONDS, check=False)
    try:
        return int(done.stdout)
    except ValueError as error:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        raise ProfileError(
            f"memory of a forward pass: its process ended with {last:.200}; use validate=false"
        ) from error


def _measure(supernet: Mapping[str, Any], choices: Mapping[str, Any]) -> int:
    """The peak beyond the floor.

    A small image goes through the same layers first, so that kernels are loaded. Its network stays: what it would leave
    in the heap could be used again, and would be missing from the figure. The peak is that of a pass after the first:
    the code that oneDNN makes for a shape stays, so that only then all of it is beside the widest layer. And it is of a
    pass in which no page of a file came or went: how many there are is known before and after it, not at its peak.
    """
    tune_allocator()
    torch.set_num_threads(1)
    described = build_supernet(supernet)
    if not isinstance(described, ElasticSupernet):
        raise ConfigError(f"supernet: expected one of blocks, found {type(described).__name__}")
    spec = described.network_spec(SubnetConfig.from_json(choices))
    del described
    warm = _filled(spec)
    _forward(warm, spec.in_channels, _WARM_SIDE)
    floor = _resident("VmRSS") - _resident("RssFile")
    network = _filled(spec)
    _forward(network, spec.in_channels, spec.resolution)
    for _ in range(_PASSES):
        files = _resident("RssFile")
        _reset_peak()
        _forward(network, spec.in_channels, spec.resolution)
        peak = _resident("VmHWM") - files - floor
        if _resident("RssFile") == files:
            return peak
    raise ProfileError(f"the system took pages of libraries away in each of {_PASSES} passes; free memory and retry")


def _filled(spec: NetworkSpec) -> nn.Module:
    network = Network(spec).to_empty(device="cpu").eval()
    with torch.inference_mode():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.fill_(0.01)
    return network


def _forward(network: nn.Module, channels: int, side: int) -> None:
    with torch.inference_mode():
        network(torch.rand(1, channels, side, side))


def _reset_peak() -> None:
    _CLEAR.write_text("5")


def _resident(name: str) -> int:
    """Bytes of a line of the process's status: "VmRSS" now, "RssFile" files' pages of it, "VmHWM" at the peak."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    given = json.load(sys.stdin)
    print(_measure(given["supernet"], given["subnet"]))
