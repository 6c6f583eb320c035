"""Sustained rates of this device: memory bandwidth, and MACs per second in training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from fedofa.device.timing import CLOCKS
from fedofa.supernet.costs import block_costs
from fedofa.supernet.layers import Network
from fedofa.supernet.network import NetworkSpec

_COPY_BYTES = 64 * 2**20
_REPEATS, _BATCH = 3, 4
_PASSES = 3
"""Training runs forward once and backward twice as long."""


def memory_bytes_per_second(clock: str) -> float:
    """Bytes read and written a second by the fastest of some copies that do not fit into most caches.

    Args:
        clock: a name in `timing.CLOCKS`.
    """
    source = np.ones(_COPY_BYTES, np.uint8)
    target = np.empty_like(source)
    return 2 * _COPY_BYTES / min(_seconds(lambda: np.copyto(target, source), clock) for _ in range(_REPEATS + 1))


def training_macs_per_second(spec: NetworkSpec, threads: int, clock: str) -> float:
    """Multiply-accumulates a second of training steps in torch, forward and backward, fp32.

    Args:
        spec: the network to train.
        threads: of torch.
        clock: a name in `timing.CLOCKS`.
    """
    torch.set_num_threads(threads)
    network = Network(spec).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.fill_(0.01)
    images = torch.rand(_BATCH, spec.in_channels, spec.resolution, spec.resolution)
    labels = torch.zeros(_BATCH, dtype=torch.int64)

    def step() -> None:
        functional.cross_entropy(network(images), labels).backward()
        network.zero_grad()

    seconds = min(_seconds(step, clock) for _ in range(_REPEATS + 1))
    return _PASSES * _BATCH * sum(block.macs for block in block_costs(spec)) / seconds


def _seconds(action: Callable[[], object], clock: str) -> float:
    read = CLOCKS[clock]
    start = read()
    action()
    return max(read() - start, 1) / 1e9
