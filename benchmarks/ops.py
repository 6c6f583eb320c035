"""Every lean operation beside torch's own: `python benchmarks/ops.py`, one thread.

For each row both run in turn in this process, forward and backward, and the faster half of the repetitions counts.
Kept bytes are those of distinct storages that autograd keeps, parameters and the input left out. `time` is lean over
stock: above 1 the lean operation is the slower one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedofa.finetune.ops.swap import lean
from fedofa.supernet.layers import ConvNormAct, MeanPool, SqueezeExcite
from fedofa.supernet.network import ConvSpec

_REPETITIONS = 12


@dataclass(frozen=True, slots=True)
class Case:
    """One row: a module, its input's shape, and the names of what trains (all whose name contains one of them)."""

    name: str
    module: nn.Module
    shape: tuple[int, int, int, int]
    trains: tuple[str, ...]
    codes_swish: bool = False


def cases() -> Iterator[Case]:
    """The rows of the table."""
    everything, biases = ("weight", "bias"), ("bias",)
    for side, channels in ((14, 144), (28, 72)):
        for kernel in (3, 5, 7):
            for stride in (1, 2):
                conv = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)
                yield Case(
                    f"depthwise {kernel}x{kernel}/{stride}, {side} px", conv, (8, channels, side, side), ("weight",)
                )
                yield Case(f"... frozen, {side} px", conv, (8, channels, side, side), ())
    for trains in (("weight",), ()):
        yield Case(f"pointwise, trains {trains}", nn.Conv2d(96, 24, 1, bias=False), (8, 96, 28, 28), trains)
        yield Case(f"3x3, trains {trains}", nn.Conv2d(32, 32, 3, 1, 1, bias=False), (8, 32, 28, 28), trains)
    shape = (8, 96, 28, 28)
    for act in (nn.ReLU(), nn.ReLU6(), nn.Hardswish(), nn.Hardsigmoid()):
        yield Case(type(act).__name__, act, shape, (), codes_swish=True)
    for trains in (everything, biases, ()):
        yield Case(f"frozen batch norm, trains {trains}", nn.BatchNorm2d(96).eval(), shape, trains)
        yield Case(f"group norm, trains {trains}", nn.GroupNorm(12, 96), shape, trains)
    yield Case("average pool", nn.AvgPool2d(2), shape, ())
    yield Case("max pool", nn.MaxPool2d(3, 2, 1), shape, ())
    yield Case("squeeze-excite", squeeze_excite(96), shape, everything)
    for trains in (everything, biases, ()):
        unit = filled(ConvNormAct(ConvSpec("unit", 96, 96, 1, activation="relu6"), "batch", 1e-5)).eval()
        yield Case(f"pointwise, frozen batch norm, relu6, trains {trains}", unit, shape, trains)
        linear = nn.Sequential(MeanPool(), nn.Flatten(), nn.Linear(96, 100))
        yield Case(f"mean pool, linear, trains {trains}", linear, shape, trains)
    residual = filled(ConvNormAct(ConvSpec("unit", 96, 96, 3, depthwise=True, residual=True), "batch", 1e-5)).eval()
    yield Case(f"residual 3x3 depthwise, frozen batch norm, trains {biases}", residual, shape, biases)
    for kind in ("group", "batch"):
        for act in ("relu", "h_swish"):
            for trains in (everything, biases):
                spec = ConvSpec("unit", 96, 96, 5, depthwise=True, activation=act)
                unit = filled(ConvNormAct(spec, kind, 1e-5)).eval()
                yield Case(f"5x5 depthwise, {kind} norm, {act}, trains {trains}", unit, shape, trains)


def squeeze_excite(channels: int) -> nn.Module:
    """A squeeze-excite of reduction 4."""
    reduce = ConvSpec("reduce", channels, channels // 4, bias=True, norm=False, activation="relu")
    expand = ConvSpec("expand", channels // 4, channels, bias=True, norm=False, activation="h_sigmoid")
    return filled(SqueezeExcite(reduce, expand, "group", 1e-5))


def filled(module: nn.Module) -> nn.Module:
    """The module with tensors in place of its meta ones."""
    module = module.to_empty(device="cpu")
    for tensor in (*module.parameters(), *module.buffers()):
        nn.init.uniform_(tensor, 0.1, 1.0)
    return module


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps of a forward pass."""
    own = {item.untyped_storage().data_ptr() for item in (x, *module.parameters(), *module.buffers())}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = module(x * 1.0)  # not a leaf: as in a network, the input is kept by nobody else
    sizes = {item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in alive}
    del result
    return sum(size for pointer, size in sizes.items() if pointer not in own)


def step_of(module: nn.Module, x: Tensor) -> Callable[[], float]:
    """Gives the CPU seconds of one forward and backward pass."""
    with torch.no_grad():
        grad = torch.randn_like(module(x))

    def step() -> float:
        began = time.thread_time()
        torch.autograd.backward(module(x), grad)
        return time.thread_time() - began

    return step


def measure(case: Case) -> tuple[int, int, float, float]:
    """Stock and lean kept bytes, stock and lean CPU seconds."""
    module = case.module
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(any(part in name for part in case.trains))
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    x = torch.randn(case.shape).contiguous(memory_format=torch.channels_last).requires_grad_()
    contexts = (nullcontext, lambda: lean(module, codes_swish=case.codes_swish))
    kept, seconds = [], ([], [])
    for context in contexts:
        with context():
            kept.append(kept_bytes(module, x))
    step = step_of(module, x)
    for _ in range(_REPETITIONS):
        for context, times in zip(contexts, seconds, strict=True):
            with context():
                step()
                times.append(step())
    halves = [sorted(times)[: _REPETITIONS // 2] for times in seconds]
    return kept[0], kept[1], sum(halves[0]) / len(halves[0]), sum(halves[1]) / len(halves[1])


def main() -> None:
    """Print the table; the last line names how many rows are slower by more than a tenth."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    slower = []
    print(f"{'operation':66} {'stock KB':>9} {'lean KB':>9} {'stock ms':>9} {'lean ms':>9} {'time':>6}")
    for case in cases():
        stock_bytes, lean_bytes, stock, ours = measure(case)
        ratio = ours / stock
        row = f"{stock_bytes / 1e3:9.1f} {lean_bytes / 1e3:9.1f} {stock * 1e3:9.2f} {ours * 1e3:9.2f} {ratio:6.2f}"
        print(f"{case.name:66} {row}", flush=True)
        slower += [case.name] if ratio > 1.1 else []
    print(f"rows_slower_than_stock={len(slower)}", "; ".join(slower))


if __name__ == "__main__":
    main()
