"""A source and its partition together: every client's examples, the global test set and the calibration set."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedofa.data.partition import Indices, Partition, PartitionSpec, load_partition
from fedofa.data.readers.base import Image
from fedofa.data.sources import ImageSet, load_source
from fedofa.types.errors import DatasetError


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Labelled images in memory."""

    images: Image  # `(num_examples, channels, height, width)`, uint8 pixels or float32 measurements
    labels: npt.NDArray[np.int64]  # `(num_examples,)`


@dataclass(frozen=True, slots=True, eq=False)
class ClientData:
    """What one client holds; `test` may be empty."""

    train: Examples
    test: Examples


@dataclass(frozen=True, eq=False)
class FederatedData:
    """Copies out of `image_set` what is asked for, and only that.

    Processes that share a federation each call `load_federation`: they then share the mapped pages, where a pickled
    federation would carry a copy of every image.
    """

    image_set: ImageSet
    partition: Partition

    @property
    def num_clients(self) -> int:
        """How many clients share the training examples."""
        return len(self.partition.clients)

    def client(self, index: int) -> ClientData:
        """Copy the examples of client `index`; raises `DatasetError` unless `0 <= index < num_clients`."""
        if not 0 <= index < self.num_clients:
            raise DatasetError(
                f"client index {index} is out of range: {self.image_set.name!r} is shared among {self.num_clients} "
                f"clients, use 0 to {self.num_clients - 1}"
            )
        indices = self.partition.clients[index]
        return ClientData(train=self._gather(indices.train), test=self._gather(indices.test))

    @cached_property
    def global_test(self) -> Examples:
        """The global test set, copied on first use."""
        return self._gather(self.partition.global_test)

    @cached_property
    def calibration(self) -> Examples:
        """The server's calibration set, copied on first use; empty when none was asked for."""
        return self._gather(self.partition.calibration)

    def _gather(self, indices: Indices) -> Examples:
        return Examples(images=self.image_set.images[indices], labels=self.image_set.labels[indices])


def load_federation(
    name: str, path: Path | None, cache_dir: Path, spec: PartitionSpec, settings: Mapping[str, Any] | None = None
) -> FederatedData:
    """Load the source `name` by `load_source`, split it by `load_partition`, both cached under `cache_dir`.

    `settings` are the source's own.

    Raises `DatasetError` for an unknown or missing source, or a partition that is impossible.
    """
    image_set = load_source(name, path, cache_dir, settings)
    return FederatedData(image_set, load_partition(image_set, spec, cache_dir))
