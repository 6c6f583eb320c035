"""The known sources by name; what `data.name` may be."""

from collections.abc import Callable, Mapping

from fedofa.data.readers.base import Source
from fedofa.data.readers.cifar10 import open_cifar10
from fedofa.data.readers.fashion_mnist import open_fashion_mnist
from fedofa.data.readers.folder import open_folder
from fedofa.data.readers.har import open_har
from fedofa.data.readers.hf import open_hf
from fedofa.data.readers.mnist5k import open_mnist5k

SOURCES: Mapping[str, Callable[..., Source]] = {
    "cifar10": open_cifar10,
    "fashion_mnist": open_fashion_mnist,
    "folder": open_folder,
    "har": open_har,
    "hf": open_hf,
    "mnist5k": open_mnist5k,
}
"""Each takes the path of its files (None for none), then its own settings by keyword."""
