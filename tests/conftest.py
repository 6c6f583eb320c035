"""Shared by all tests: one torch thread, and a stand-in for torchvision so that the peer package `ofa` imports."""

import importlib.machinery
import sys
import types

import pytest
import torch

torch.set_num_threads(1)


class _Stub(types.ModuleType):
    """A module that has every attribute: an empty class. `ofa` names torchvision's transforms but need not run them."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@pytest.fixture(scope="session")
def ofa_networks():
    """The peer's network classes."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        for name in (
            "torchvision",
            "torchvision.transforms",
            "torchvision.datasets",
            "torchvision.transforms.functional",
        ):
            stub = _Stub(name)
            stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
            stub.__path__ = []
            sys.modules[name] = stub
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, stub)
    return pytest.importorskip(
        "ofa.imagenet_classification.elastic_nn.networks", reason="the peer `ofa` is missing; `make test` installs it"
    )
