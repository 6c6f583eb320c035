"""`fedofa predictor`: trains an accuracy predictor from a file of subnets and their accuracies."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import PredictorConf
from fedofa.search.accuracy import encode_predictor
from fedofa.search.learning import HeldOut, train_predictor
from fedofa.supernet.families import build_supernet
from fedofa.types.encoding import Encoding
from fedofa.types.errors import DatasetError, FedofaError
from fedofa.types.space import SearchSpace, SubnetConfig
from server.checkpoint import replace_file

_SUMMARY = "summary.json"


def run_predictor(conf: PredictorConf) -> HeldOut:
    """Train a predictor, write `conf.output`, and return how it does on held-out pairs.

    Raises:
        FedofaError: saying in one line which pair or setting is wrong.
    """
    settings = {**conf.supernet, "in_channels": conf.in_channels, "num_classes": conf.num_classes}
    encoding = Encoding(build_supernet(settings).space)
    subnets, accuracies = [], []
    for subnet, accuracy in read_pairs(Path(conf.pairs), encoding):
        subnets.append(subnet)
        accuracies.append(accuracy)
    rows = encoding.rows(subnets)
    predictor, held_out = train_predictor(
        encoding,
        rows,
        np.array(accuracies),
        kind=conf.kind,
        held_out_fraction=conf.held_out_fraction,
        seed=conf.seed,
    )
    output = Path(conf.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(output, encode_predictor(predictor, asdict(held_out)))
    return held_out


def read_pairs(path: Path, encoding: Encoding) -> Iterator[tuple[SubnetConfig, float]]:
    """The pairs of a file with a JSON object a line, `{"subnet": {...}, "accuracy": 0.93}`, or of a run's folder.

    A run's pairs are the subnets of its `summary.json`: of `fedofa shrink`, the `num_watched` random ones.

    Raises:
        DatasetError: naming the file and the entry that is no pair of this space.
    """
    folder = path.is_dir()
    path = path / _SUMMARY if folder else path
    try:
        text = path.read_text()
        entries: list[Any] = json.loads(text)["subnets"] if folder else [s for s in text.splitlines() if s.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"pairs: {path} cannot be read: {error!r}") from error
    for number, entry in enumerate(entries, start=1):
        try:
            value = entry if folder else json.loads(entry)
            subnet = _watched(value, encoding.space) if folder else SubnetConfig.from_json(value["subnet"])
            encoding.space.check(subnet)
            yield subnet, float(value["accuracy"])
        except (FedofaError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error) if isinstance(error, FedofaError) else repr(error)
            raise DatasetError(
                f"pairs: {path}, entry {number}: expected a subnet and its accuracy: {reason}"
            ) from error


def _watched(row: Mapping[str, Any], space: SearchSpace) -> SubnetConfig:
    """The subnet of a summary's row, which holds the chosen values and null where there is no such position."""
    values = {
        name: [space.axis(name).values[0] if value is None else value for value in chosen]
        for name, chosen in row["choices"].items()
    }
    return space.subnet(**values)
