"""What runs operators and networks while a device is profiled: eager torch or ONNX Runtime, batch 1."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, final

import numpy as np
import torch
from torch import nn

from fedofa.device.allocator import keep_freed_memory
from fedofa.device.operators import Operator
from fedofa.supernet.layers import Linear, build_part
from fedofa.types.errors import ConfigError

Run = Callable[[], object]


class Engine(ABC):
    """Prepares operators for timing.

    Args:
        threads: that a forward pass may use.
    """

    package: str

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @property
    def name(self) -> str:
        """Package and version."""
        return f"{self.package} {version(self.package)}"

    @abstractmethod
    def prepare(self, operators: Sequence[Operator]) -> Run:
        """A forward pass of operators one after the other, with random weights and input; a run returns the result."""


@final
class TorchEngine(Engine):
    """Eager torch in a process that keeps freed memory for later passes (see `allocator`)."""

    package = "torch"

    def prepare(self, operators: Sequence[Operator]) -> Run:
        keep_freed_memory()
        torch.set_num_threads(self.threads)
        chain = nn.Sequential()
        for operator in operators:
            if operator.is_classifier:
                chain.append(nn.Flatten())
            chain.append(_module(operator))
        first = operators[0]
        x = torch.rand(1, first.in_channels, first.in_side, first.in_side)
        chain.eval()

        def run() -> torch.Tensor:
            with torch.inference_mode():
                return chain(x)

        return run


def _module(operator: Operator) -> nn.Module:
    if operator.is_classifier:
        module: nn.Module = Linear(operator.in_channels, operator.out_channels, device="meta")
    else:
        module = build_part(operator.part, operator.norm, 1e-5)
    module = module.to_empty(device="cpu")
    values = torch.rand(4093, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            repeats = -(-tensor.numel() // len(values))
            tensor.copy_(values.repeat(repeats)[: tensor.numel()].view(tensor.shape))
    return module


@final
class OnnxRuntimeEngine(Engine):
    """ONNX Runtime on the CPU, as exported subnets run."""

    package = "onnxruntime"

    def prepare(self, operators: Sequence[Operator]) -> Run:
        import onnxruntime

        from fedofa.device.onnx_graphs import build_graph

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        model = build_graph(operators)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        first = operators[0]
        shape = (1, first.in_channels, first.in_side, first.in_side)
        feed: dict[str, Any] = {"input": np.random.default_rng(0).random(shape, np.float32)}
        return lambda: session.run(None, feed)


ENGINES: dict[str, type[Engine]] = {"torch": TorchEngine, "onnxruntime": OnnxRuntimeEngine}


def build_engine(name: str, threads: int) -> Engine:
    """The engine of that name.

    Raises:
        ConfigError: for an unknown engine, one that is not installed, or a number of threads below 1.
    """
    if name not in ENGINES:
        raise ConfigError(f"engine: expected one of {list(ENGINES)}, found {name!r}")
    if threads < 1:
        raise ConfigError(f"threads: expected at least 1, found {threads}")
    engine = ENGINES[name](threads)
    try:
        _ = engine.name
    except PackageNotFoundError as error:
        raise ConfigError(
            f"engine={name}: the package is not installed; pip install -c constraints.txt 'fedofa[onnx]'"
        ) from error
    return engine
