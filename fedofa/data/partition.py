"""Splits a source's examples into a global test set, a calibration set and one train and test set per client."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedofa.data.cache import load_cached
from fedofa.data.extras import missing_extra, silenced_datasets
from fedofa.data.sources import ImageSet
from fedofa.types.errors import DatasetError

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

Indices = npt.NDArray[np.int64]

_FORMAT_VERSION = 2
_KINDS = ("iid", "dirichlet", "pathological", "natural")
_MINIMA = {
    "num_clients": 1,
    "classes_per_client": 1,
    "min_examples": 1,
    "test_examples": 1,
    "calibration_examples": 0,
    "seed": 0,
}


@dataclass(frozen=True, slots=True)
class PartitionSpec:
    """How to split a source among clients. Raises `DatasetError` for a setting outside its range.

    "iid" deals the examples out evenly. "dirichlet" draws each class's shares from a Dirichlet distribution of
    concentration `alpha` (arXiv 1905.12022); the draw is repeated a few times while some client gets fewer than
    `min_examples`, and when that does not help, the first draw's largest clients fill up those that are short.
    "pathological" gives each client `classes_per_client` classes (arXiv 2102.02079), and leaves out the classes that
    no client drew. "natural" makes each client one owner of examples (a subject, a writer, a device), see
    `partition_examples`.
    """

    kind: str
    num_clients: int
    alpha: float = 0.5  # "dirichlet" only: above 0, smaller is more skewed
    classes_per_client: int = 2  # "pathological" only
    min_examples: int = 2  # of each client, its own test examples included
    client_test_fraction: float = 0.2  # of each client's examples, in [0, 1)
    test_examples: int | None = 1000  # size of the global test set; None for the whole official test part
    calibration_examples: int = 0  # held by the server for batch-norm calibration
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise _refusal("kind", self.kind, f"expected one of {', '.join(_KINDS)}")
        for setting, minimum in _MINIMA.items():
            value = getattr(self, setting)
            if value is not None and value < minimum:
                raise _refusal(setting, value, f"must be at least {minimum}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise _refusal("alpha", self.alpha, "must be a finite number above 0, for example 0.5")
        if not 0 <= self.client_test_fraction < 1:
            raise _refusal("client_test_fraction", self.client_test_fraction, "must be at least 0 and below 1")


@dataclass(frozen=True, slots=True, eq=False)
class ClientIndices:
    """One client's examples as positions in the source, in random order; `train` and `test` are disjoint."""

    train: Indices  # `(num_train,)`
    test: Indices  # `(num_test,)`


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """Disjoint sets of positions in the source, each in random order."""

    global_test: Indices  # `(test_examples,)`
    calibration: Indices  # `(calibration_examples,)`
    clients: tuple[ClientIndices, ...]  # one per client
    owners: tuple[int, ...] = ()  # of each client, in a natural partition


def load_partition(image_set: ImageSet, spec: PartitionSpec, cache_dir: Path) -> Partition:
    """Return `partition_examples` of the set, computed once per labels, split, owners and spec, kept in `cache_dir`.

    Raises `DatasetError` when the labels cannot be split as `spec` asks.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT_VERSION, asdict(spec)]).encode())
    digest.update(np.asarray(image_set.labels, dtype="<i8").tobytes())
    if image_set.split is not None:
        digest.update(image_set.split.tobytes())
    owners = image_set.owners if spec.kind == "natural" else None
    if owners is not None:
        digest.update(np.asarray(owners, dtype="<i8").tobytes())

    def build(path: Path) -> None:
        _save_partition(path, partition_examples(image_set.labels, image_set.split, spec, owners))

    return load_cached(cache_dir / f"partition-{digest.hexdigest()[:16]}.npz", _load_partition, build)


def partition_examples(
    labels: npt.NDArray[np.integer],
    split: npt.NDArray[np.integer] | None,
    spec: PartitionSpec,
    owners: npt.NDArray[np.integer] | None = None,
) -> Partition:
    """Split examples with `labels` `(num_examples,)` as `spec` says; the same arguments give the same partition.

    Global test and calibration set hold every class in proportion. With an official `split` (`(num_examples,)`,
    0 train and 1 test) the global test set comes from its test part and the rest from its train part; examples of
    the test part that are not drawn stay unused. A client with at least 2 examples has at least 1 to train on and,
    if `client_test_fraction` is above 0, at least 1 to test on.

    A natural partition needs `owners` `(num_examples,)`, numbers of those whom the examples come from. Owners with at
    least `min_examples` left to share out are put in an order drawn from the seed, which does not depend on
    `num_clients`; client `i` is the `i`-th of them, and those beyond `num_clients` take no part.

    Raises `DatasetError` when the examples do not suffice, or a pathological draw leaves a client short of
    `min_examples`.
    """
    _check_labels(labels, split)
    holdout_rng, order_rng, client_rng, owner_rng = (
        np.random.default_rng(seed) for seed in np.random.SeedSequence(spec.seed).spawn(4)
    )
    test_pool = np.arange(labels.size) if split is None else np.flatnonzero(split == 1)
    num_test = _num_test_examples(split, spec)
    global_test = _draw_stratified("test_examples", num_test, test_pool, labels, holdout_rng)
    train_pool = np.arange(labels.size) if split is None else np.flatnonzero(split == 0)
    train_pool = np.setdiff1d(train_pool, global_test)
    calibration = _draw_stratified("calibration_examples", spec.calibration_examples, train_pool, labels, holdout_rng)
    shared = order_rng.permutation(np.setdiff1d(train_pool, calibration))
    chosen: tuple[int, ...] = ()
    if spec.kind == "natural":
        chosen, shares = _share_among_owners(_checked_owners(owners, labels)[shared], spec, owner_rng)
    else:
        shares = _share_among_clients(labels[shared], spec)
    clients = tuple(_split_client(shared[share], spec.client_test_fraction, client_rng) for share in shares)
    return Partition(global_test, calibration, clients, chosen)


def _refusal(setting: str, found: object, problem: str) -> DatasetError:
    return DatasetError(f"partition setting {setting!r} is {found!r}: {problem}")


def _check_labels(labels: npt.NDArray, split: npt.NDArray | None) -> None:
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DatasetError(f"labels must be a row of integers, found {labels.dtype}{labels.shape}")
    if split is not None and (split.shape != labels.shape or not np.isin(split, (0, 1)).all()):
        raise DatasetError(f"split must hold 0 (train) or 1 (test) per label, {labels.shape}, found {split.shape}")


def _num_test_examples(split: npt.NDArray | None, spec: PartitionSpec) -> int:
    if spec.test_examples is not None:
        return spec.test_examples
    if split is None:
        raise _refusal("test_examples", None, "the source has no official test part to take whole; give a number")
    return int(np.count_nonzero(split))


def _checked_owners(owners: npt.NDArray | None, labels: npt.NDArray) -> npt.NDArray[np.integer]:
    if owners is None:
        problem = "the source states no ids of those whom its examples come from; use iid, dirichlet or pathological"
        raise _refusal("kind", "natural", problem)
    if owners.shape != labels.shape or owners.dtype.kind not in "iu":
        raise DatasetError(f"owners must be one integer per label, {labels.shape}, found {owners.dtype}{owners.shape}")
    return owners


def _share_among_owners(
    owners: npt.NDArray[np.integer], spec: PartitionSpec, rng: np.random.Generator
) -> tuple[tuple[int, ...], list[Indices]]:
    """Return the owner that each client is, and the positions in `owners` that it gets."""
    numbers, counts = np.unique(owners, return_counts=True)
    enough = numbers[counts >= spec.min_examples]
    if enough.size < spec.num_clients:
        problem = (
            f"there are {enough.size} ids with at least min_examples={spec.min_examples} examples to train on; set "
            f"fleet.num_clients to at most {enough.size}"
        )
        if enough.size < numbers.size:
            problem += f", or lower min_examples: {numbers.size} ids have any"
        raise _refusal("num_clients", spec.num_clients, problem)
    chosen = rng.permutation(enough)[: spec.num_clients]
    return tuple(chosen.tolist()), [np.flatnonzero(owners == owner) for owner in chosen]


def _draw_stratified(
    setting: str, num_examples: int, pool: Indices, labels: npt.NDArray[np.integer], rng: np.random.Generator
) -> Indices:
    """Draw `num_examples` of `pool`, each class by its share of the pool, rounded by the largest remainder."""
    if num_examples > pool.size:
        raise _refusal(
            setting, num_examples, f"only {pool.size} examples are there to draw from; use at most that many"
        )
    if num_examples == 0:
        return np.empty(0, dtype=np.int64)
    classes, counts = np.unique(labels[pool], return_counts=True)
    quotas, remainders = np.divmod(counts * num_examples, pool.size)
    by_remainder = np.lexsort((rng.permutation(classes.size), -remainders))  # equal remainders in random order
    quotas[by_remainder[: num_examples - quotas.sum()]] += 1
    drawn = [
        rng.choice(pool[labels[pool] == label], size=quota, replace=False)
        for label, quota in zip(classes, quotas, strict=True)
    ]
    return rng.permutation(np.concatenate(drawn))


def _share_among_clients(labels: npt.NDArray[np.integer], spec: PartitionSpec) -> list[Indices]:
    """Return the positions in `labels` that each client gets: at least `min_examples`, or a `DatasetError`."""
    if labels.size < spec.num_clients * spec.min_examples:
        problem = (
            f"with min_examples={spec.min_examples} they need {spec.num_clients * spec.min_examples} examples, but "
            f"{labels.size} are left to share out; lower num_clients or min_examples until their product fits"
        )
        raise _refusal("num_clients", spec.num_clients, problem)
    num_classes = np.unique(labels).size
    if spec.kind == "pathological" and spec.classes_per_client > num_classes:
        problem = f"the examples have {num_classes} classes; use at most that many"
        raise _refusal("classes_per_client", spec.classes_per_client, problem)
    try:
        shares = _run_partitioner(labels, spec, spec.min_examples)
    except ValueError as error:
        if spec.kind == "pathological":
            raise _overdrawn_class(spec) from error
        shares = _topped_up(_run_partitioner(labels, spec, min_examples=0), spec.min_examples)
    smallest = min(share.size for share in shares)
    if smallest < spec.min_examples:
        problem = f"the smallest of {spec.num_clients} clients got {smallest}; use at most that, or fewer clients"
        raise _refusal("min_examples", spec.min_examples, problem)
    return shares


def _overdrawn_class(spec: PartitionSpec) -> DatasetError:
    """Say what would do after the pathological partitioner gave up."""
    problem = (
        f"with {spec.classes_per_client} classes_per_client some class is drawn by more clients than it has "
        "examples; use fewer clients or classes_per_client"
    )
    return _refusal("num_clients", spec.num_clients, problem)


def _topped_up(shares: Sequence[Indices], min_examples: int) -> list[Indices]:
    """Move examples, one by one, from whichever share is the largest to those below `min_examples`.

    There are `len(shares) * min_examples` examples or more; each share is in random order.
    """
    positions = [share.tolist() for share in shares]
    sizes = np.array([share.size for share in shares])
    for short in np.flatnonzero(sizes < min_examples):
        while sizes[short] < min_examples:
            largest = int(sizes.argmax())
            positions[short].append(positions[largest].pop())
            sizes[short] += 1
            sizes[largest] -= 1
    return [np.array(share, dtype=np.int64) for share in positions]


def _run_partitioner(labels: npt.NDArray[np.integer], spec: PartitionSpec, min_examples: int) -> list[Indices]:
    """Return each client's positions in `labels`; a `ValueError` means that the partitioner found none."""
    partitioner = _build_partitioner(spec, min_examples)
    import datasets

    with silenced_datasets("split examples among clients"):
        partitioner.dataset = datasets.Dataset.from_dict({"label": labels, "position": np.arange(labels.size)})
        shares = (partitioner.load_partition(client) for client in range(spec.num_clients))
        return [np.array(share["position"], dtype=np.int64) for share in shares]


def _build_partitioner(spec: PartitionSpec, min_examples: int) -> "Partitioner":
    try:
        from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, PathologicalPartitioner
    except ImportError as error:
        raise missing_extra("flwr-datasets", "split examples among clients") from error
    if spec.kind == "iid":
        return IidPartitioner(spec.num_clients)
    if spec.kind == "dirichlet":
        return DirichletPartitioner(spec.num_clients, "label", float(spec.alpha), min_examples, seed=spec.seed)
    return PathologicalPartitioner(
        spec.num_clients, "label", spec.classes_per_client, "first-deterministic", seed=spec.seed
    )


def _split_client(indices: Indices, test_fraction: float, rng: np.random.Generator) -> ClientIndices:
    num_test = 0
    if indices.size > 1 and test_fraction > 0:
        num_test = min(max(1, round(indices.size * test_fraction)), indices.size - 1)
    shuffled = rng.permutation(indices)
    return ClientIndices(train=shuffled[num_test:], test=shuffled[:num_test])


def _save_partition(path: Path, partition: Partition) -> None:
    """Write the client sets end to end, with their sizes beside them."""
    trains = [client.train for client in partition.clients]
    tests = [client.test for client in partition.clients]
    with open(path, "wb") as file:
        np.savez(
            file,
            global_test=partition.global_test,
            calibration=partition.calibration,
            train=np.concatenate(trains),
            train_sizes=[train.size for train in trains],
            test=np.concatenate(tests),
            test_sizes=[test.size for test in tests],
            owners=np.array(partition.owners, dtype=np.int64),
        )


def _load_partition(path: Path) -> Partition:
    """Read what `_save_partition` wrote; the checksums inside an .npz make a damaged one raise."""
    with np.load(path, allow_pickle=False) as file:
        trains = np.split(file["train"], np.cumsum(file["train_sizes"])[:-1])
        tests = np.split(file["test"], np.cumsum(file["test_sizes"])[:-1])
        clients = tuple(ClientIndices(train, test) for train, test in zip(trains, tests, strict=True))
        owners = tuple(file["owners"].tolist())
        return Partition(file["global_test"], file["calibration"], clients, owners)
