"""`fedofa predictor`: trains an accuracy predictor from a file of subnets and their accuracies."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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
from server.pairs import FILE as PAIRS
from server.structure import describe_structure

_SUMMARY = "summary.json"


def run_predictor(conf: PredictorConf) -> HeldOut:
    """Train a predictor, write `conf.output`, and return how it does on held-out pairs.

    Raises:
        FedofaError: saying in one line which pair or setting is wrong.
    """
    structure = describe_structure(conf.supernet, conf.in_channels, conf.num_classes)
    encoding = Encoding(build_supernet(structure).space)
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

    A run's pairs are those of its `pairs.jsonl`, where it has one, else the subnets of its `summary.json`: of
    `fedofa shrink`, the `num_watched` random ones. Pairs that state a round are brought to the last one's level.

    Raises:
        DatasetError: naming the file and the entry that is no pair of this space.
    """
    folder = path.is_dir()
    if folder and (path / PAIRS).exists():
        path, folder = path / PAIRS, False
    path = path / _SUMMARY if folder else path
    try:
        text = path.read_text()
        entries: list[Any] = json.loads(text)["subnets"] if folder else [s for s in text.splitlines() if s.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"pairs: {path} cannot be read: {error!r}") from error
    pairs = []
    for number, entry in enumerate(entries, start=1):
        try:
            value = entry if folder else json.loads(entry)
            subnet = _watched(value, encoding.space) if folder else SubnetConfig.from_json(value["subnet"])
            encoding.space.check(subnet)
            pairs.append((subnet, float(value["accuracy"]), int(value.get("round", 0))))
        except (FedofaError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error) if isinstance(error, FedofaError) else repr(error)
            raise DatasetError(
                f"pairs: {path}, entry {number}: expected a subnet and its accuracy: {reason}"
            ) from error
    yield from _levelled(pairs)


def _levelled(pairs: Sequence[tuple[SubnetConfig, float, int]]) -> Iterator[tuple[SubnetConfig, float]]:
    """Pairs of several rounds with each round's mean moved to the last one's.

    The supernet learns from round to round and every round has a cohort of its own, but the same random subnets in the
    mean: what is left is what the subnets differ by.
    """
    by_round: dict[int, list[float]] = {}
    for _, accuracy, number in pairs:
        by_round.setdefault(number, []).append(accuracy)
    means = {number: sum(found) / len(found) for number, found in by_round.items()}
    last = means[max(means)] if means else 0.0
    for subnet, accuracy, number in pairs:
        yield subnet, accuracy + (last - means[number])


def _watched(row: Mapping[str, Any], space: SearchSpace) -> SubnetConfig:
    """The subnet of a summary's row, which holds the chosen values and null where there is no such position."""
    values = {
        name: [space.axis(name).values[0] if value is None else value for value in chosen]
        for name, chosen in row["choices"].items()
    }
    return space.subnet(**values)
