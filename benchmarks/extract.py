"""What cutting out a subnet costs beside the package `ofa`: `python benchmarks/extract.py`.

Both run in one process on one thread, on MobileNetV3 of width 1.0, for its largest subnet, its smallest and random
ones. `ofa` builds the subnet with `get_active_subnet`. Here the shared weights are the server's arrays, and a row is
one of:

- "payload + module": the subnet's task as the server ships it, and the subnet as a module in evaluation mode that runs
  on the payload's own weights. "again" has the subnet's slice map from an earlier cut, as a server that cuts the same
  subnets every round; every other row is of a subnet that was never cut before.
- "payload + module, ordered": of a supernet whose channels are gathered by a random ordering; `ofa` keeps its channels
  sorted in memory instead.
- "payload + own weights": the same with a module that has weights of its own to train.
- "own weights", "payload": each of the two by itself.
- "copy": the subnet's bytes copied from one array to another, which no cut can do without.

What depends on the space alone (a blueprint of each distinct part, a slice of each distinct tensor) is made by the
first subnets that need it; random ones are cut at the start until it is there, and what that takes is printed. Times
are CPU milliseconds in turns of a few repetitions each; ratios are of medians. "reused" lets the allocator keep the
pages that it has, "default" is glibc as it comes. The last line holds the ratios of "payload + module" with reused
pages.
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy is loaded, as every command of fedofa sets it

import numpy as np
import torch

from fedofa.finetune.plans import build_plan
from fedofa.finetune.recipe import LocalTraining
from fedofa.supernet.mobilenet_v3 import MobileNetV3Supernet
from fedofa.types.space import SubnetConfig
from fedofa.update.codec import decode_packed, encode_and_view, encode_packed
from fedofa.update.exchange import ClientTask, encode_task

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TURN, _WARM = 6, 2
_PREPARING = 400
"""Random subnets after which nearly every part of the space was met."""
_SIZES = ("largest", "smallest", "random")
_NORMALISATION = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


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


@dataclass(frozen=True, slots=True)
class Server:
    """What a server cuts from: the supernet's structure, the shared weights and a task's header."""

    supernet: MobileNetV3Supernet
    arrays: Mapping[str, np.ndarray]
    header: Mapping[str, Any]

    @classmethod
    def of(cls, supernet: MobileNetV3Supernet) -> "Server":
        """A server that asks for every subnet to be trained whole."""
        subnet, training = supernet.space.largest(), asdict(LocalTraining())
        plan = build_plan("full", supernet.block_costs(subnet))
        task = ClientTask(1, 0, subnet, plan, supernet.description(), training, _NORMALISATION, seed=0)
        return cls(supernet, supernet.state().tensors, decode_packed(encode_task(task, {}), kind="task").header)

    def _extract(self, subnet: SubnetConfig) -> dict[str, dict[str, np.ndarray]]:
        return {"weights": self.supernet.slice_map(subnet).extract(self.arrays)}

    def forget(self, *_: object) -> None:
        """No subnet was cut before; the slices of single tensors, which subnets share, stay."""
        self.supernet._slice_maps.clear()
        self.supernet._last_network = None

    def payload(self, subnet: SubnetConfig) -> object:
        """The task's bytes."""
        return encode_packed("task", self.header, self._extract(subnet))

    def own_weights(self, subnet: SubnetConfig) -> object:
        """A module with weights of its own."""
        return self.supernet.build(subnet, self.arrays)

    def payload_and_module(self, subnet: SubnetConfig) -> object:
        """The task's bytes and a module that runs on the weights in them."""
        payload, packed = encode_and_view("task", self.header, self._extract(subnet))
        return payload, self.supernet.attach(subnet, packed.streams["weights"])

    def payload_and_own_weights(self, subnet: SubnetConfig) -> object:
        """The task's bytes and a module with weights of its own."""
        return self.payload(subnet), self.own_weights(subnet)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: what is timed, and what is done before, untimed; both are given the subnet."""

    name: str
    run: Callable[[SubnetConfig], object]
    before: Callable[[SubnetConfig], object]


def rows_of(peer: Any, server: Server, ordered: Server) -> list[Row]:
    """The lines, `ofa`'s first."""

    def activate(subnet: SubnetConfig) -> None:
        peer.set_active_subnet(**{key: row for key, row in subnet.to_ofa().items() if key != "r"})

    source = np.ones(sum(array.nbytes for array in server.arrays.values()), np.uint8)
    target = np.empty_like(source)

    def copy(subnet: SubnetConfig) -> None:
        num_bytes = 4 * sum(item.numel for item in server.supernet.parameter_table(subnet))
        target[:num_bytes] = source[:num_bytes]

    return [
        Row("ofa get_active_subnet", lambda _: peer.get_active_subnet(), activate),
        Row("payload + module", server.payload_and_module, server.forget),
        Row("payload + module, again", server.payload_and_module, server.supernet.slice_map),
        Row("payload + module, ordered", ordered.payload_and_module, ordered.forget),
        Row("payload + own weights", server.payload_and_own_weights, server.forget),
        Row("own weights", server.own_weights, server.forget),
        Row("payload", server.payload, server.forget),
        Row("copy", copy, lambda _: None),
    ]


def measure(rows: list[Row], subnets: Callable[[], Iterator[SubnetConfig]], num_turns: int) -> dict[str, float]:
    """Median CPU milliseconds of every row, over the same subnets."""
    seconds: dict[str, list[float]] = {row.name: [] for row in rows}
    sources = {row.name: subnets() for row in rows}
    for _ in range(num_turns):
        for row in rows:
            for repetition in range(_WARM + _TURN):
                subnet = next(sources[row.name])
                row.before(subnet)
                start = time.process_time()
                result = row.run(subnet)
                elapsed = time.process_time() - start
                del result
                if repetition >= _WARM:
                    seconds[row.name].append(elapsed)
    return {name: statistics.median(column) * 1e3 for name, column in seconds.items()}


def subnets_of(supernet: MobileNetV3Supernet, size: str) -> Iterator[SubnetConfig]:
    """The largest or the smallest again and again, or random ones, the same for every caller."""
    rng = np.random.default_rng(1)
    while True:
        yield supernet.space.sample(rng) if size == "random" else getattr(supernet.space, size)()


def prepare(server: Server) -> None:
    """Cut random subnets until what depends on the space alone is there."""
    start, rng = time.process_time(), np.random.default_rng(0)
    server.payload_and_module(server.supernet.space.smallest())
    first = time.process_time() - start
    for _ in range(_PREPARING):
        server.payload_and_module(server.supernet.space.sample(rng))
    print(f"first cut of all {first * 1e3:.1f} ms; {_PREPARING} random ones {time.process_time() - start:.1f} s")


def shuffled() -> MobileNetV3Supernet:
    """A supernet with a random channel ordering."""
    supernet, rng = MobileNetV3Supernet.published(generator=torch.Generator().manual_seed(0)), np.random.default_rng(0)
    supernet.set_ordering({group: rng.permutation(size) for group, size in supernet.channel_groups().items()})
    return supernet


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
    server, ordered = Server.of(supernet), Server.of(shuffled())
    prepare(server)
    prepare(ordered)
    rows, ratios = rows_of(peer, server, ordered), {}
    for allocator in ("default", "reused"):
        if allocator == "reused":
            keep_pages()
        for size in _SIZES:
            times = measure(rows, partial(subnets_of, supernet, size), num_turns)
            print(f"\n{f'{size}, {allocator} pages':32}{'CPU ms':>8}{'x ofa':>8}")
            for name, milliseconds in times.items():
                print(f"{name:32}{milliseconds:8.2f}{milliseconds / times['ofa get_active_subnet']:8.2f}")
            ratios[size] = times["payload + module"] / times["ofa get_active_subnet"]
    print("\n" + " ".join(f"extract_{size}_ratio={ratio:.3f}" for size, ratio in ratios.items()))


if __name__ == "__main__":
    main()
