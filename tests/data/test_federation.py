"""A federation hands out each client's own images, and costs little once cached."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedofa.data.federation import FederatedData, load_federation
from fedofa.data.partition import PartitionSpec
from fedofa.types.errors import DatasetError

REPOSITORY = Path(__file__).resolve().parents[2]
SPEC = PartitionSpec("dirichlet", 20, alpha=0.5, test_examples=500, calibration_examples=100)


@pytest.fixture(scope="module")
def federation(warm_cache_dir: Path) -> FederatedData:
    return load_federation("mnist5k", None, warm_cache_dir, SPEC)


def test_every_client_gets_its_own_digits(federation: FederatedData) -> None:
    assert federation.num_clients == 20
    num_examples = 0
    for index in range(federation.num_clients):
        client = federation.client(index)
        indices = federation.partition.clients[index]
        for examples, positions in ((client.train, indices.train), (client.test, indices.test)):
            assert examples.images.shape == (positions.size, 1, 28, 28)
            np.testing.assert_array_equal(examples.images, federation.image_set.images[positions])
            np.testing.assert_array_equal(examples.labels, federation.image_set.labels[positions])
            num_examples += positions.size
    assert num_examples == 5000 - 500 - 100


def test_server_sets_are_stratified(federation: FederatedData) -> None:
    np.testing.assert_array_equal(np.bincount(federation.global_test.labels), np.full(10, 50))
    np.testing.assert_array_equal(np.bincount(federation.calibration.labels), np.full(10, 10))
    test_images = federation.image_set.images[federation.partition.global_test]
    np.testing.assert_array_equal(federation.global_test.images, test_images)


def test_examples_are_copies_that_may_be_written(federation: FederatedData) -> None:
    train = federation.client(0).train
    assert not isinstance(train.images, np.memmap)
    train.images[:] = 0
    train.labels[:] = 0
    assert federation.client(0).train.images.any()


@pytest.mark.parametrize("index", [-1, 20])
def test_index_out_of_range_names_the_range(federation: FederatedData, index: int) -> None:
    with pytest.raises(DatasetError, match=rf"client index {index} .*'mnist5k' .*20 clients, use 0 to 19"):
        federation.client(index)


def test_official_split_is_honoured(write_pack: Callable[..., Path], tmp_path: Path) -> None:
    spec = PartitionSpec("iid", 2, test_examples=4)
    federation = load_federation("cifar10", write_pack(), tmp_path / "cache", spec)
    greys = federation.global_test.images.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(np.sort(greys), np.arange(8, 12) * 20, atol=1)
    assert federation.calibration.images.shape == (0, 3, 8, 8)


def test_cached_load_imports_nothing_heavy(federation: FederatedData, warm_cache_dir: Path) -> None:
    program = f"""
import pathlib, sys
from fedofa.data.federation import load_federation
from fedofa.data.partition import PartitionSpec
federation = load_federation("mnist5k", None, pathlib.Path(sys.argv[1]), {SPEC!r})
print(federation.client(3).train.labels.sum())
heavy = ("flwr_datasets", "datasets", "flwr", "torch", "mlxtend", "pandas", "PIL")
print(*(name for name in heavy if name in sys.modules))
"""
    command = [sys.executable, "-c", program, str(warm_cache_dir)]
    output = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True).stdout
    assert output == f"{federation.client(3).train.labels.sum()}\n\n"


def test_partitioning_itself_imports_no_torch(tmp_path: Path) -> None:
    program = """
import sys
import numpy as np
from fedofa.data.partition import PartitionSpec, partition_examples
partition_examples(np.arange(40) % 4, None, PartitionSpec("dirichlet", 2, test_examples=4))
print("datasets" in sys.modules, "torch" in sys.modules, "flwr" in sys.modules)
"""
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True).stdout
    assert output == "True False False\n"
