"""The examples that settings ask for: a source with its path and settings of its own, split as asked."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from conf.schema import DataConf
from fedofa.data.federation import FederatedData, load_federation
from fedofa.data.partition import PartitionSpec


def load_examples(data: DataConf, seed: int, **split: Any) -> FederatedData:
    """The source of `data`, shared out; memory-mapped and cached, so that processes share its pages.

    Args:
        seed: of the run; with one seed all commands have the same global test set.
        split: what `PartitionSpec` has beside the seed and the sizes that `data` states.

    Raises:
        DatasetError: for a source that is unknown or missing, settings that do not suit it, an impossible split.
    """
    spec = PartitionSpec(
        **split, test_examples=data.test_examples, calibration_examples=data.calibration_examples, seed=seed
    )
    common = {field.name for field in fields(DataConf)}
    own = {name: value for name, value in asdict(data).items() if name not in common}
    path = Path(data.path).expanduser() if data.path else None
    return load_federation(data.name, path, Path(data.cache_dir).expanduser(), spec, own)
