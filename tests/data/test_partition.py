"""Partitions are disjoint, complete, stratified where promised, deterministic and skewed as asked."""

import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedofa.data import partition as partition_module
from fedofa.data.partition import Partition, PartitionSpec, load_partition, partition_examples
from fedofa.data.sources import ImageSet
from fedofa.types.errors import DatasetError

TENS = np.repeat(np.arange(10), 40)
TENS_SPLIT = np.tile([0, 0, 0, 1], 100).astype(np.uint8)


def all_sets(partition: Partition) -> list[np.ndarray]:
    clients = [indices for client in partition.clients for indices in (client.train, client.test)]
    return [partition.global_test, partition.calibration, *clients]


def client_sizes(partition: Partition) -> list[int]:
    return [client.train.size + client.test.size for client in partition.clients]


def class_table(partition: Partition, labels: np.ndarray) -> np.ndarray:
    """Examples per client and class, `(num_clients, num_classes)`."""
    rows = [np.concatenate([client.train, client.test]) for client in partition.clients]
    return np.stack([np.bincount(labels[row], minlength=labels.max() + 1) for row in rows])


def assert_same(left: Partition, right: Partition) -> None:
    assert len(left.clients) == len(right.clients)
    for one, other in zip(all_sets(left), all_sets(right), strict=True):
        assert one.dtype == other.dtype == np.int64
        np.testing.assert_array_equal(one, other)


def differs(left: Partition, right: Partition) -> bool:
    return not all(np.array_equal(one, other) for one, other in zip(all_sets(left), all_sets(right), strict=True))


@st.composite
def requests(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray | None, PartitionSpec]:
    """Labels of 2 to 5 unequal classes, with and without a split, and a spec that they can satisfy."""
    counts = draw(st.lists(st.integers(20, 60), min_size=2, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    split = (rng.permutation(labels.size) % 4 == 0).astype(np.uint8) if draw(st.booleans()) else None
    spec = PartitionSpec(
        kind=draw(st.sampled_from(["iid", "dirichlet", "pathological"])),
        num_clients=draw(st.integers(1, 5)),
        alpha=draw(st.floats(1.0, 100.0)),
        classes_per_client=draw(st.integers(1, 2)),
        min_examples=1,
        client_test_fraction=draw(st.floats(0, 0.99)),
        test_examples=draw(st.integers(1, 10)),
        calibration_examples=draw(st.integers(0, 6)),
        seed=draw(st.integers(0, 2**32)),
    )
    return labels, split, spec


@settings(max_examples=60, deadline=None)
@given(requests())
def test_sets_are_disjoint_and_as_large_as_asked(request_: tuple[np.ndarray, np.ndarray | None, PartitionSpec]) -> None:
    labels, split, spec = request_
    partition = partition_examples(labels, split, spec)
    everything = np.concatenate(all_sets(partition))
    assert np.unique(everything).size == everything.size
    assert partition.global_test.size == spec.test_examples
    assert partition.calibration.size == spec.calibration_examples
    assert len(partition.clients) == spec.num_clients
    if split is not None:
        assert (split[partition.global_test] == 1).all()
        assert (split[np.concatenate(all_sets(partition)[1:])] == 0).all()
    if spec.kind != "pathological":
        num_unused = 0 if split is None else np.count_nonzero(split) - spec.test_examples
        assert everything.size == labels.size - num_unused


@settings(max_examples=60, deadline=None)
@given(requests())
def test_clients_can_train_and_test(request_: tuple[np.ndarray, np.ndarray | None, PartitionSpec]) -> None:
    labels, split, spec = request_
    for client in partition_examples(labels, split, spec).clients:
        assert client.train.size >= 1
        size = client.train.size + client.test.size
        if spec.client_test_fraction == 0 or size == 1:
            assert client.test.size == 0
        else:
            assert 1 <= client.test.size <= size - 1
            assert abs(client.test.size - size * spec.client_test_fraction) <= 1


@pytest.mark.parametrize("test_fraction", [0.01, 0.99])
def test_client_of_two_examples_trains_on_one_and_tests_on_the_other(test_fraction: float) -> None:
    spec = PartitionSpec("iid", 5, client_test_fraction=test_fraction, test_examples=10)
    partition = partition_examples(np.arange(20) % 2, None, spec)
    assert [(client.train.size, client.test.size) for client in partition.clients] == [(1, 1)] * 5


@settings(max_examples=60, deadline=None)
@given(requests())
def test_held_out_sets_are_stratified(request_: tuple[np.ndarray, np.ndarray | None, PartitionSpec]) -> None:
    labels, split, spec = request_
    partition = partition_examples(labels, split, spec)
    pool = np.arange(labels.size) if split is None else np.flatnonzero(split == 1)
    shares = np.bincount(labels[pool], minlength=labels.max() + 1) / pool.size
    drawn = np.bincount(labels[partition.global_test], minlength=labels.max() + 1)
    assert (np.abs(drawn - shares * spec.test_examples) < 1).all()


@settings(max_examples=30, deadline=None)
@given(requests())
def test_same_request_gives_the_same_partition(
    request_: tuple[np.ndarray, np.ndarray | None, PartitionSpec],
) -> None:
    labels, split, spec = request_
    first = partition_examples(labels, split, spec)
    assert_same(first, partition_examples(labels.astype(np.uint8), split, dataclasses.replace(spec)))


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological"])
def test_seed_changes_every_part(kind: str) -> None:
    spec = PartitionSpec(kind, 4, alpha=10.0, test_examples=20, calibration_examples=10, seed=1)
    first = partition_examples(TENS, None, spec)
    second = partition_examples(TENS, None, dataclasses.replace(spec, seed=2))
    for one, other in zip(all_sets(first), all_sets(second), strict=True):
        assert not np.array_equal(np.sort(one), np.sort(other))


def test_client_test_fraction_leaves_the_shares_alone() -> None:
    spec = PartitionSpec("dirichlet", 4, alpha=1.0, test_examples=20)
    some = partition_examples(TENS, None, spec)
    none = partition_examples(TENS, None, dataclasses.replace(spec, client_test_fraction=0.0))
    np.testing.assert_array_equal(class_table(some, TENS), class_table(none, TENS))


@pytest.mark.parametrize(("test_examples", "expected"), [(30, [10, 10, 10]), (31, [10, 10, 11]), (32, [10, 11, 11])])
def test_equal_classes_get_equal_shares_up_to_rounding(test_examples: int, expected: list[int]) -> None:
    labels = np.repeat(np.arange(3), 40)
    spec = PartitionSpec("iid", 2, test_examples=test_examples)
    partition = partition_examples(labels, None, spec)
    assert sorted(np.bincount(labels[partition.global_test])) == expected


def test_largest_remainder_decides_the_rounding() -> None:
    labels = np.repeat([0, 1, 2], [53, 31, 16])  # shares of 10: 5.3, 3.1 and 1.6
    partition = partition_examples(labels, None, PartitionSpec("iid", 2, test_examples=10))
    np.testing.assert_array_equal(np.bincount(labels[partition.global_test]), [5, 3, 2])


def test_whole_official_test_part_can_be_the_global_test_set() -> None:
    partition = partition_examples(TENS, TENS_SPLIT, PartitionSpec("iid", 3, test_examples=100))
    np.testing.assert_array_equal(np.sort(partition.global_test), np.flatnonzero(TENS_SPLIT))


def test_global_test_set_does_not_depend_on_the_rest_of_the_spec() -> None:
    spec = PartitionSpec("iid", 3, test_examples=50)
    other = dataclasses.replace(spec, kind="dirichlet", num_clients=5, calibration_examples=20)
    first, second = partition_examples(TENS, None, spec), partition_examples(TENS, None, other)
    np.testing.assert_array_equal(first.global_test, second.global_test)


def test_iid_clients_are_equal_in_size() -> None:
    sizes = client_sizes(partition_examples(TENS, None, PartitionSpec("iid", 7, test_examples=100)))
    assert max(sizes) - min(sizes) <= 1


def test_pathological_clients_have_their_number_of_classes() -> None:
    spec = PartitionSpec("pathological", 10, classes_per_client=3, test_examples=100)
    table = class_table(partition_examples(TENS, None, spec), TENS)
    np.testing.assert_array_equal(np.count_nonzero(table, axis=1), np.full(10, 3))


def test_small_alpha_skews_labels_more_than_iid() -> None:
    def mean_largest_class_fraction(spec: PartitionSpec) -> float:
        table = class_table(partition_examples(TENS, None, spec), TENS)
        return float((table.max(axis=1) / table.sum(axis=1)).mean())

    spec = PartitionSpec("dirichlet", 5, alpha=0.1, test_examples=50, min_examples=1)
    skewed = mean_largest_class_fraction(spec)
    mild = mean_largest_class_fraction(dataclasses.replace(spec, alpha=100.0))
    even = mean_largest_class_fraction(dataclasses.replace(spec, kind="iid"))
    assert skewed > 2 * mild
    assert skewed > 2 * even


def test_min_examples_is_kept() -> None:
    spec = PartitionSpec("dirichlet", 5, alpha=0.3, test_examples=50, min_examples=45)
    without = dataclasses.replace(spec, min_examples=1)
    assert min(client_sizes(partition_examples(TENS, None, without))) < 45
    assert min(client_sizes(partition_examples(TENS, None, spec))) >= 45


def test_partitioning_is_silent_and_restores_progress_bars(
    capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    import datasets

    datasets.enable_progress_bars()
    partition_examples(TENS, None, PartitionSpec("dirichlet", 50, alpha=0.01, test_examples=50, min_examples=5))
    partition_examples(TENS, None, PartitionSpec("pathological", 2, classes_per_client=1, test_examples=50))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("kind", "random", "'random'.*iid, dirichlet, pathological"),
        ("num_clients", 0, "at least 1"),
        ("alpha", 0.0, "above 0"),
        ("alpha", -1.0, "above 0"),
        ("alpha", float("nan"), "finite"),
        ("alpha", float("inf"), "finite"),
        ("classes_per_client", 0, "at least 1"),
        ("min_examples", 0, "at least 1"),
        ("client_test_fraction", 1.0, "below 1"),
        ("client_test_fraction", -0.1, "at least 0"),
        ("client_test_fraction", float("nan"), "below 1"),
        ("test_examples", 0, "at least 1"),
        ("calibration_examples", -1, "at least 0"),
        ("seed", -1, "at least 0"),
    ],
)
def test_setting_out_of_range_is_refused(setting: str, value: object, message: str) -> None:
    arguments = {"kind": "dirichlet", "num_clients": 10, setting: value}
    with pytest.raises(DatasetError, match=f"'{setting}' is .*{message}"):
        PartitionSpec(**arguments)


@pytest.mark.parametrize(
    ("changes", "split", "message"),
    [
        ({"test_examples": 401}, None, "'test_examples' is 401: only 400"),
        ({"test_examples": 101}, TENS_SPLIT, "'test_examples' is 101: only 100"),
        ({"calibration_examples": 301}, None, "'calibration_examples' is 301: only 300"),
        ({"num_clients": 151}, None, "'num_clients' is 151: .*min_examples=2 they need 302 examples, but 300 are left"),
        ({"num_clients": 2, "min_examples": 151}, None, "'num_clients' is 2: .*need 302"),
        ({"kind": "pathological", "classes_per_client": 11}, None, "'classes_per_client' is 11: .* 10 classes"),
        ({"kind": "pathological", "num_clients": 150, "classes_per_client": 10}, None, "'num_clients' is 150: .*class"),
        ({"kind": "pathological", "min_examples": 75}, None, "'min_examples' is 75: the smallest of 4 clients got"),
    ],
)
def test_impossible_partition_is_refused(changes: dict, split: np.ndarray | None, message: str) -> None:
    spec = PartitionSpec(**{"kind": "iid", "num_clients": 4, "test_examples": 100, **changes})
    with pytest.raises(DatasetError, match=message):
        partition_examples(TENS, split, spec)


@pytest.mark.parametrize(("num_clients", "alpha", "min_examples"), [(4, 0.5, 74), (4, 0.5, 75), (30, 0.001, 2)])
def test_what_no_draw_reaches_is_filled_up_from_the_largest(num_clients: int, alpha: float, min_examples: int) -> None:
    spec = PartitionSpec("dirichlet", num_clients, alpha=alpha, test_examples=100, min_examples=min_examples)
    partition = partition_examples(TENS, None, spec)
    assert min(client_sizes(partition)) == min_examples
    everything = np.concatenate(all_sets(partition))
    np.testing.assert_array_equal(np.sort(everything), np.arange(TENS.size))
    assert_same(partition, partition_examples(TENS, None, spec))


def test_filling_up_leaves_the_other_clients_alone() -> None:
    spec = PartitionSpec("dirichlet", 30, alpha=0.05, test_examples=100, min_examples=3, client_test_fraction=0.0)
    sizes = np.array(client_sizes(partition_examples(TENS, None, spec)))
    drawn = np.array(client_sizes(partition_examples(TENS, None, dataclasses.replace(spec, min_examples=1))))
    assert (sizes >= 3).all()
    assert (sizes[drawn >= 3] <= drawn[drawn >= 3]).all(), "they only give"
    assert np.count_nonzero(sizes == drawn) > 10


@pytest.mark.parametrize(
    ("labels", "split", "message"),
    [
        (np.zeros((4, 2), int), None, "row of integers, found int64"),
        (np.zeros(4), None, "row of integers, found float64"),
        (np.zeros(4, int), np.zeros(3, int), r"\(4,\), found \(3,\)"),
        (np.zeros(4, int), np.full(4, 2), "split must hold 0"),
    ],
)
def test_malformed_labels_are_refused(labels: np.ndarray, split: np.ndarray | None, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        partition_examples(labels, split, PartitionSpec("iid", 1, test_examples=1))


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", None)
    with pytest.raises(DatasetError, match=r"flwr-datasets.*fedofa\[simulation\]"):
        partition_examples(TENS, None, PartitionSpec("iid", 1, test_examples=1))


OWNERS = np.random.default_rng(5).integers(0, 12, TENS.size)


def test_natural_clients_are_owners_and_hold_all_of_theirs() -> None:
    spec = PartitionSpec("natural", 12, test_examples=50, calibration_examples=20)
    partition = partition_examples(TENS, TENS_SPLIT, spec, OWNERS)
    assert sorted(partition.owners) == list(range(12))
    held_out = np.concatenate([partition.global_test, partition.calibration])
    for owner, client in zip(partition.owners, partition.clients, strict=True):
        everything = np.concatenate([client.train, client.test])
        expected = np.setdiff1d(np.flatnonzero((owner == OWNERS) & (TENS_SPLIT == 0)), held_out)
        np.testing.assert_array_equal(np.sort(everything), expected)


def test_fewer_natural_clients_are_the_first_in_an_order_drawn_from_the_seed() -> None:
    spec = PartitionSpec("natural", 12, test_examples=50)
    whole = partition_examples(TENS, None, spec, OWNERS)
    fewer = partition_examples(TENS, None, dataclasses.replace(spec, num_clients=5), OWNERS)
    assert fewer.owners == whole.owners[:5]
    for one, other in zip(fewer.clients, whole.clients, strict=False):
        np.testing.assert_array_equal(one.train, other.train)
    other_seed = partition_examples(TENS, None, dataclasses.replace(spec, seed=1), OWNERS)
    assert whole.owners != other_seed.owners != tuple(range(12))


def test_owners_with_too_few_examples_take_no_part() -> None:
    owners = np.zeros(TENS.size, int)
    owners[:40:20], owners[50:350] = 1, 2
    spec = PartitionSpec("natural", 2, min_examples=3, test_examples=1)
    assert sorted(partition_examples(TENS, None, spec, owners).owners) == [0, 2]
    with pytest.raises(DatasetError) as caught:
        partition_examples(TENS, None, dataclasses.replace(spec, num_clients=3), owners)
    message = str(caught.value)
    assert "'num_clients' is 3: there are 2 ids with at least min_examples=3" in message
    assert "set fleet.num_clients to at most 2, or lower min_examples: 3 ids have any" in message


@pytest.mark.parametrize(
    ("owners", "changes", "message"),
    [
        (None, {}, "'kind' is 'natural': the source states no ids"),
        (OWNERS[:-1], {}, "owners must be one integer per label"),
        (OWNERS, {"num_clients": 13}, "'num_clients' is 13: there are 12 ids .* at most 12$"),
        (OWNERS, {"test_examples": None}, "'test_examples' is None: the source has no official test part"),
    ],
)
def test_impossible_natural_partition_is_refused(owners: np.ndarray | None, changes: dict, message: str) -> None:
    spec = PartitionSpec(**{"kind": "natural", "num_clients": 4, "test_examples": 20, **changes})
    with pytest.raises(DatasetError, match=message):
        partition_examples(TENS, None, spec, owners)


def test_no_number_of_test_examples_takes_the_whole_official_part() -> None:
    partition = partition_examples(TENS, TENS_SPLIT, PartitionSpec("iid", 3, test_examples=None))
    np.testing.assert_array_equal(np.sort(partition.global_test), np.flatnonzero(TENS_SPLIT))


DIGESTS = {
    "iid": "ff69df01fe12d938",
    "dirichlet": "ffed33f2533fc20e",
    "pathological": "a853ff4528299c58",
}


@pytest.mark.parametrize("kind", DIGESTS)
def test_partitions_stay_what_they_were(kind: str) -> None:
    """A digest of every index, so that a published figure can be had again."""
    spec = PartitionSpec(kind, 4, alpha=1.0, test_examples=50, calibration_examples=10, seed=3)
    digest = hashlib.sha256()
    for indices in all_sets(partition_examples(TENS, TENS_SPLIT, spec)):
        digest.update(indices.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == DIGESTS[kind]


SPEC = PartitionSpec("dirichlet", 3, alpha=1.0, test_examples=20, calibration_examples=10)


def image_set(labels: np.ndarray = TENS, split: np.ndarray | None = None) -> ImageSet:
    images = np.zeros((labels.size, 1, 1, 1), dtype=np.uint8)
    return ImageSet("tens", tuple("0123456789"), images, labels, split, (0.0,), (1.0,))


def forbid_partitioning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> Partition:
        raise AssertionError("partitioned again")

    monkeypatch.setattr(partition_module, "partition_examples", refuse)


def test_cached_partition_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_partition(image_set(), SPEC, tmp_path)
    assert_same(first, partition_examples(TENS, None, SPEC))
    forbid_partitioning(monkeypatch)
    assert_same(load_partition(image_set(), SPEC, tmp_path), first)


def test_client_without_test_examples_survives_the_cache(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, client_test_fraction=0.0, calibration_examples=0)
    expected = load_partition(image_set(), spec, tmp_path)
    assert [client.test.size for client in expected.clients] == [0, 0, 0]
    assert_same(load_partition(image_set(), spec, tmp_path), expected)


def test_cache_tells_specs_labels_and_splits_apart(tmp_path: Path) -> None:
    first = load_partition(image_set(), SPEC, tmp_path)
    assert differs(first, load_partition(image_set(), dataclasses.replace(SPEC, alpha=2.0), tmp_path))
    assert differs(first, load_partition(image_set(TENS[::-1]), SPEC, tmp_path))
    assert differs(first, load_partition(image_set(split=TENS_SPLIT), SPEC, tmp_path))
    assert len([path for path in tmp_path.iterdir() if path.suffix == ".npz" and path.name[0] != "."]) == 4


def test_cache_tells_owners_apart(tmp_path: Path) -> None:
    spec = PartitionSpec("natural", 3, test_examples=20)
    sets = [
        dataclasses.replace(image_set(), owner_names=tuple("abcdefghijkl"), owners=owners)
        for owners in (OWNERS, OWNERS[::-1].copy())
    ]
    first, second = (load_partition(each, spec, tmp_path) for each in sets)
    assert differs(first, second)
    again = load_partition(sets[0], spec, tmp_path)
    assert_same(again, first)
    assert again.owners == first.owners == partition_examples(TENS, None, spec, OWNERS).owners


def drop_an_array(path: Path) -> None:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file if name != "test_sizes"}
    np.savez(path, allow_pickle=False, **arrays)


def flip_a_bit_of_an_index(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"train.npy") + 300] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a partition"),
        drop_an_array,
        flip_a_bit_of_an_index,
    ],
)
def test_damaged_partition_is_computed_again(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    expected = load_partition(image_set(), SPEC, tmp_path)
    (path,) = (path for path in tmp_path.glob("*.npz") if path.name[0] != ".")
    damage(path)
    assert_same(load_partition(image_set(), SPEC, tmp_path), expected)
