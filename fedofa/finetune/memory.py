"""How much memory training a subnet under a plan takes: two steps are run here and every tensor's life is followed.

What it predicts is the growth of a process's resident memory beyond its floor (the interpreter and torch with its
kernels loaded), with `tune_allocator`: large tensors then go back to the operating system when they are freed.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fedofa.finetune.plans import build_plan
from fedofa.finetune.trainer import LocalTraining, fine_tune, label_objective, largest_batch, run_steps
from fedofa.supernet.base import fill_skeleton
from fedofa.supernet.mbconv import StageSpec
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec, MobileNetV3Supernet
from fedofa.types.plan import FineTunePlan

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
_MMAP_BYTES = 1 << 16
_PAGE_BYTES = 1 << 12
_CHUNK_BYTES = 96
"""What glibc spends on a small aligned block: its header and the alignment to 64 bytes."""

def tune_allocator() -> bool:
    """Have glibc give every freed tensor of 64 KB or more back at once, in this process; False where it is not glibc.

    Its own threshold grows to 32 MB with the tensors that it sees, after which up to a quarter more memory stays
    resident. The environment variable MALLOC_MMAP_THRESHOLD_=65536 does the same from the start of a process.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _MMAP_BYTES))


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """What training takes above the engine's floor (see `warm_up`), in bytes.

    Args:
        weight_bytes: the model and the received copy of it.
        input_bytes: all examples of the client.
        step_bytes: the most that a step's tensors take at a time: activations, gradients, optimiser state, temporaries;
            or that the delta takes beside gradients and state, after the last step.
        num_modules: layers of the model, containers included, which are objects of the interpreter.
        num_kernels: distinct convolutions that the steps run, for each of which machine code is made.
    """

    weight_bytes: int
    input_bytes: int
    step_bytes: int
    num_modules: int
    num_kernels: int

    @property
    def engine_bytes(self) -> int:
        """What no tensor shows."""
        return _BASE_BYTES + self.num_modules * _MODULE_BYTES + self.num_kernels * _KERNEL_BYTES

    @property
    def total_bytes(self) -> int:
        """The figure that a budget is held against."""
        return self.weight_bytes + self.input_bytes + self.step_bytes + self.engine_bytes


_BASE_BYTES, _MODULE_BYTES, _KERNEL_BYTES = 4 << 20, 8 << 10, 24 << 10


def warm_up() -> None:
    """Train a tiny network for a step, so that what this process then holds is the engine's floor.

    The first step of a process loads the kernels of torch and of the libraries below it and sets up their buffers,
    whatever the network is.
    """
    stage = StageSpec(8, 2, "h_swish", True)
    spec = MobileNetV3Spec(
        *(3, 2, 8, 2, 8, 1, (stage,), 16, 16), kernels=(3, 5), depths=(1,), resolutions=(16,), norm="group"
    )
    supernet = MobileNetV3Supernet(spec)
    subnet = supernet.space.largest()
    tensors = {item.name: torch.zeros(item.shape) for item in supernet.slice_map(subnet)}
    received = {name: tensor.numpy().copy() for name, tensor in tensors.items()}
    model = fill_skeleton(supernet.structure(subnet), tensors)
    plan = build_plan("full", supernet.block_costs(subnet), lean=True)
    inputs, labels = torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64)
    fine_tune(model, plan, received, inputs, labels, LocalTraining(max_steps=2), torch.Generator().manual_seed(0))


def training_memory(
    structure: nn.Module,
    plan: FineTunePlan,
    training: LocalTraining,
    num_examples: int,
    input_shape: tuple[int, int, int],
) -> TrainingMemory:
    """What training a model under the plan takes. Nothing is computed: one step runs on shapes alone.

    Args:
        structure: the model on the meta device, as `Supernet.structure` gives it.
        training: the recipe, of which batch size and optimiser matter.
        num_examples: of the client.
        input_shape: `(channels, height, width)` of one example.
    """
    batch = largest_batch(num_examples, training.batch_size)
    seen = min(batch, 2 * plan.micro_batch or batch)
    recipe = replace(training, optimiser="sgd", learning_rate=0.0, momentum=0.0, max_steps=1, batch_size=seen)
    inputs = torch.zeros(seen, *input_shape, device="meta")
    objective = label_objective(torch.zeros(seen, dtype=torch.int64, device="meta"), training.label_smoothing)
    with LiveBytes((inputs, *structure.parameters(), *structure.buffers())) as live:
        run_steps(structure, plan, inputs, recipe, torch.Generator().manual_seed(0), objective)
    state = structure.state_dict()
    example = inputs[0].nbytes
    unseen = example * (batch - seen) * (2 if training.max_shift or input_shape[0] > 1 else 1)
    slots = 2 if training.optimiser == "adamw" else int(training.momentum > 0)
    trained = sum(resident_bytes(state[name].nbytes) for name in plan.trainable)
    return TrainingMemory(
        weight_bytes=2 * sum(resident_bytes(tensor.nbytes) for tensor in state.values()),
        input_bytes=resident_bytes(example * num_examples),
        step_bytes=max(live.peak + unseen + slots * trained, (2 + slots) * trained),
        num_modules=sum(1 for _ in structure.modules()),
        num_kernels=len(live.kernels),
    )


def resident_bytes(size: int) -> int:
    """What an allocation of that size takes: whole pages and one for its header from `_MMAP_BYTES` on, else a block."""
    if size + _CHUNK_BYTES < _MMAP_BYTES:
        return size + _CHUNK_BYTES
    return -(-(size + _CHUNK_BYTES) // _PAGE_BYTES) * _PAGE_BYTES


_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


class LiveBytes(TorchDispatchMode):
    """Within the context, follows how many bytes the tensors hold that operations make; `peak` is the most at a time.

    A tensor counts with what glibc takes for it (`resident_bytes`). `kernels` are the distinct convolutions that ran.

    Args:
        known: tensors that exist already and do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.kernels: set[tuple[Any, ...]] = set()
        self._known = {tensor.untyped_storage()._cdata: tensor for tensor in known}
        self._finalizers: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._fused_sgd_.default and args[0][0].is_meta:
            return None  # changes parameters in place; it has no meta kernel
        if func in _CONVOLUTIONS:
            shapes = (tuple(item.shape) if isinstance(item, Tensor) else str(item) for item in args)
            self.kernels.add((func, *shapes))
        result = func(*args, **(kwargs or {}))
        for item in tree_iter(result):
            if isinstance(item, Tensor):
                self._follow(item.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._finalizers:
            return
        size = resident_bytes(storage.nbytes())
        self.live += size
        self.peak = max(self.peak, self.live)
        self._finalizers[key] = weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.live -= size
        del self._finalizers[key]
