"""How much memory training a subnet under a plan takes: two steps are run here and every tensor's life is followed.

What it predicts is the growth of a process's resident memory beyond its floor (the interpreter and torch with its
kernels loaded), with `tune_allocator`: large tensors then go back to the operating system when they are freed.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fedofa.finetune.features import feature_bytes
from fedofa.finetune.recipe import LocalTraining
from fedofa.finetune.trainer import fine_tune
from fedofa.types.plan import FineTunePlan

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
_MMAP_BYTES = 1 << 16

_SLACK_FRACTION = 0.03
_SLACK_BYTES = 7 << 20
"""What live tensors do not show: the kernels' own scratch space, pages that are not full, small blocks that stay."""


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
    """What training takes above the engine's floor, in bytes.

    Args:
        weight_bytes: the model and the received copy of it.
        input_bytes: all examples of the client and their cached features, and where images are moved a micro-batch.
        step_bytes: the most that a step's tensors take at a time: activations, gradients, optimiser state, temporaries.
    """

    weight_bytes: int
    input_bytes: int
    step_bytes: int

    @property
    def total_bytes(self) -> int:
        """The figure that a budget is held against: all of it, and the slack of kernels and allocator."""
        live = self.weight_bytes + self.input_bytes + self.step_bytes
        return int(live * (1 + _SLACK_FRACTION)) + _SLACK_BYTES


def training_memory(
    model: nn.Module,
    plan: FineTunePlan,
    training: LocalTraining,
    num_examples: int,
    input_shape: tuple[int, int, int],
) -> TrainingMemory:
    """What training the model under the plan takes. Its weights stay as they are: the steps have length 0.

    Args:
        training: the recipe, of which batch size and optimiser matter.
        num_examples: of the client.
        input_shape: `(channels, height, width)` of one example.
    """
    batch = min(training.batch_size, num_examples)
    seen = min(batch, 2 * plan.micro_batch or batch)
    state = model.state_dict()
    received = {name: state[name].detach().numpy() for name in plan.trainable}
    recipe = LocalTraining(
        optimiser=training.optimiser,
        learning_rate=0.0,
        momentum=training.momentum,
        proximal_mu=training.proximal_mu,
        max_gradient_norm=training.max_gradient_norm,
        max_steps=2,
        batch_size=seen,
    )
    inputs = torch.zeros(seen, *input_shape)
    labels = torch.zeros(seen, dtype=torch.int64)
    with LiveBytes((inputs, labels, *model.parameters(), *model.buffers())) as live:
        fine_tune(model, plan, received, inputs, labels, recipe, torch.Generator().manual_seed(0))
    example = inputs[0].nbytes
    kept_features = feature_bytes(model, plan, input_shape)
    return TrainingMemory(
        weight_bytes=2 * sum(tensor.nbytes for tensor in state.values()),
        input_bytes=example * (num_examples + ((plan.micro_batch or batch) if training.max_shift else 0))
        + (num_examples - seen) * kept_features,
        step_bytes=live.peak,
    )


class LiveBytes(TorchDispatchMode):
    """Within the context, follows how many bytes the tensors hold that operations make; `peak` is the most at a time.

    Args:
        known: tensors that exist already and do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known = {tensor.untyped_storage()._cdata: tensor for tensor in known}
        self._finalizers: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in tree_iter(result):
            if isinstance(item, Tensor):
                self._follow(item.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._finalizers:
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        self._finalizers[key] = weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.live -= size
        del self._finalizers[key]
