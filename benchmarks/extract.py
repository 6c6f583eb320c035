"""What cutting out a subnet costs beside the package `ofa`: `python benchmarks/extract.py`.

Both run in one process on one thread, on MobileNetV3 of width 1.0, for its largest and its smallest subnet. `ofa`
builds the subnet with `get_active_subnet`; here it is built with weights of its own, and its tensors are packed for the
wire besides. The slice map is made at a subnet's first cut and kept, as in a server that cuts the same subnets from new
weights every round; "anew" makes it again. Times are CPU seconds in turns of a few repetitions each; ratios are of
medians. "reused" lets the allocator keep the pages that it has, "default" is glibc as it comes. The last line holds the
ratios with reused pages.
"""

import argparse
import ctypes
import importlib.machinery
import os
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from fedofa.supernet.base import assemble
from fedofa.supernet.mobilenet_v3 import MobileNetV3Supernet
from fedofa.types.space import SubnetConfig
from fedofa.update.codec import encode_packed

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TURN, _WARM = 6, 2


class _Stub(types.ModuleType):
    """A module that has every attribute; `ofa` names torchvision's transforms and runs none of them here."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def build_peer() -> Any:
    """The package's MobileNetV3 of width 1.0."""
    for name in ("torchvision", "torchvision.transforms", "torchvision.datasets", "torchvision.transforms.functional"):
        stub = sys.modules[name] = _Stub(name)
        stub.__spec__, stub.__path__ = importlib.machinery.ModuleSpec(name, None), []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, stub)
    from ofa.imagenet_classification.elastic_nn.networks import OFAMobileNetV3

    elastic: dict[str, Any] = {"ks_list": [3, 5, 7], "expand_ratio_list": [3, 4, 6], "depth_list": [2, 3, 4]}
    return OFAMobileNetV3(dropout_rate=0, **elastic)


def build_anew(supernet: MobileNetV3Supernet, subnet: SubnetConfig) -> object:
    """The subnet as a module, with every slice of the supernet forgotten before."""
    supernet.set_ordering(supernet.ordering)
    return supernet.build(subnet)


def build_and_encode(supernet: MobileNetV3Supernet, subnet: SubnetConfig) -> object:
    """The subnet as a module, and its packed bytes."""
    tensors = supernet.cut(subnet)
    packed = encode_packed("payload", {}, {"weights": {name: tensor.numpy() for name, tensor in tensors.items()}})
    return assemble(supernet.skeleton(subnet), tensors), packed


def measure(operations: dict[str, Callable[[], object]], num_turns: int) -> dict[str, float]:
    """Median CPU milliseconds of every operation."""
    seconds: dict[str, list[float]] = {name: [] for name in operations}
    for _ in range(num_turns):
        for name, operation in operations.items():
            for repetition in range(_WARM + _TURN):
                start = time.process_time()
                result = operation()
                elapsed = time.process_time() - start
                del result
                if repetition >= _WARM:
                    seconds[name].append(elapsed)
    return {name: statistics.median(column) * 1e3 for name, column in seconds.items()}


def keep_pages() -> None:
    """Tells glibc to give no memory back."""
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20) and libc.mallopt(_M_TRIM_THRESHOLD, 2**30)):
        raise OSError("mallopt: expected to set glibc's thresholds, found that it refuses; run with glibc's malloc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=6)
    num_turns = parser.parse_args().turns
    torch.set_num_threads(1)
    peer = build_peer()
    supernet = MobileNetV3Supernet.published(generator=torch.Generator().manual_seed(0))
    print(f"python {platform.python_version()}, torch {torch.__version__}, ofa {version('ofa')}")
    print(f"{os.cpu_count()} cores, load average {' '.join(f'{load:.2f}' for load in os.getloadavg())}")
    ratios = {}
    for allocator in ("default", "reused"):
        if allocator == "reused":
            keep_pages()
        for size in ("largest", "smallest"):
            subnet = getattr(supernet.space, size)()
            peer.set_active_subnet(**{key: row for key, row in subnet.to_ofa().items() if key != "r"})
            operations: dict[str, Callable[[], object]] = {
                "ofa get_active_subnet": peer.get_active_subnet,
                "fedofa build": lambda subnet=subnet: supernet.build(subnet),
                "fedofa build, slices anew": lambda subnet=subnet: build_anew(supernet, subnet),
                "fedofa build + encode": lambda subnet=subnet: build_and_encode(supernet, subnet),
            }
            times = measure(operations, num_turns)
            print(f"\n{f'{size}, {allocator} pages':32}{'CPU ms':>8}{'x ofa':>8}")
            for name, milliseconds in times.items():
                print(f"{name:32}{milliseconds:8.2f}{milliseconds / times['ofa get_active_subnet']:8.2f}")
            ratios[size] = times["fedofa build + encode"] / times["ofa get_active_subnet"]
    print(f"\nextract_largest_ratio={ratios['largest']:.3f} extract_smallest_ratio={ratios['smallest']:.3f}")


if __name__ == "__main__":
    main()
