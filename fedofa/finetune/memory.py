"""How much memory training a subnet under a plan takes: two steps are run here and every tensor's life is followed.

What it predicts is the growth of a process's resident memory beyond its floor (the interpreter and torch with its
kernels loaded), with `device.allocator.tune_allocator`: large tensors then go back to the operating system when they
are freed.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fedofa.device.allocator import resident_bytes
from fedofa.finetune.engine import use_channels_last
from fedofa.finetune.features import feature_bytes
from fedofa.finetune.holding import held_bytes, hold
from fedofa.finetune.inputs import ImageForm
from fedofa.finetune.plans import build_plan
from fedofa.finetune.recipe import LocalTraining, batch_bounds, largest_batch
from fedofa.finetune.trainer import fine_tune, label_objective, run_steps
from fedofa.supernet.mbconv import StageSpec
from fedofa.supernet.mobilenet_v3 import MobileNetV3Spec, MobileNetV3Supernet
from fedofa.supernet.resnet import ResidualStageSpec, ResNetSpec, ResNetSupernet
from fedofa.types.plan import FineTunePlan


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """What training takes above the engine's floor (see `warm_up`), in bytes.

    Args:
        weight_bytes: the received tensors, and the model's copies of some.
        input_bytes: all examples of the client as they are stored, and their cached features.
        step_bytes: the most that a step's tensors take at a time: activations, gradients, optimiser state, temporaries.
        num_kernels: distinct convolutions that a process runs, of every size of batch.
        resizes: whether maps are resized, as in lite residual branches.
    """

    weight_bytes: int
    input_bytes: int
    step_bytes: int
    num_kernels: int
    resizes: bool

    @property
    def engine_bytes(self) -> int:
        """What no tensor shows: kernels, and the rest of the process."""
        return PROCESS_BYTES + self.num_kernels * KERNEL_BYTES + self.resizes * RESIZING_BYTES

    @property
    def total_bytes(self) -> int:
        """The figure that a budget is held against."""
        return self.weight_bytes + self.input_bytes + self.step_bytes + self.engine_bytes


KERNEL_BYTES = 1 << 16
"""For every shape of a convolution oneDNN makes machine code and a description, 30 KB on average; small blocks that are
allocated in between keep glibc's heap from shrinking, so that about as much again stays free in it."""
PROCESS_BYTES = (9 << 19) + (1 << 18)
"""The interpreter's objects for the model and for autograd's graph, free blocks in the heap, code that runs first; and
the 64 pages by which the kernel's count of a process's memory may lag."""
RESIZING_BYTES = 3 << 20
"""What a process's first lite residual branch brings into memory, of which `warm_up` has none."""


def warm_up() -> None:
    """Train two tiny networks for a step, so that what this process then holds is the engine's floor.

    The first step of a process loads the kernels of torch and of the libraries below it and sets up their buffers,
    whatever the network is. Between the two there is every kind of layer: depthwise and dense convolutions, both norms,
    squeeze-excite, both poolings.
    """
    stages = (StageSpec(8, 2, "h_swish", True), StageSpec(8, 1, "relu6", False))
    inverted = MobileNetV3Spec(
        *(3, 2, 8, 2, 8, 1, stages, 16, 16), kernels=(3, 5), depths=(1,), resolutions=(16,), norm="group"
    )
    residual = ResNetSpec(
        *(3, 2, 16, 2, (ResidualStageSpec(32, 1, 1), ResidualStageSpec(32, 1, 2))),
        expands=(0.25,),
        depths=(0, 1),
        widths=(1.0,),
        resolutions=(32,),
        norm="batch",
    )
    for supernet in (MobileNetV3Supernet(inverted), ResNetSupernet(residual)):
        subnet = supernet.space.largest()
        received = {item.name: np.zeros(item.shape, np.float32) for item in supernet.slice_map(subnet)}
        plan = build_plan("full", supernet.block_costs(subnet), statistics="frozen", lean=True)
        model = hold(supernet.structure(subnet), received, plan)
        side = supernet.resolution(subnet) or 0
        inputs, labels = torch.zeros(2, 3, side, side), torch.zeros(2, dtype=torch.int64)
        fine_tune(model, plan, received, inputs, labels, LocalTraining(max_steps=2), torch.Generator().manual_seed(0))


def training_memory(
    structure: nn.Module,
    plan: FineTunePlan,
    training: LocalTraining,
    num_examples: int,
    form: ImageForm,
) -> TrainingMemory:
    """What training a model under the plan takes. Nothing is computed: one step runs on shapes alone, of a copy.

    Structures share their parameters on the meta device, which a plan would freeze and lay out for all of them.

    Args:
        structure: the model on the meta device, as `Supernet.structure` gives it.
        training: the recipe, of which batch size and optimiser matter.
        num_examples: of the client.
        form: of the examples as the client has them.
    """
    structure = copy.deepcopy(structure)
    batch = largest_batch(num_examples, training.batch_size)
    seen = min(batch, 2 * plan.micro_batch or batch)
    recipe = replace(training, optimiser="sgd", learning_rate=0.0, momentum=0.0, max_steps=1, batch_size=seen)
    inputs = form.on_meta(seen)
    objective = label_objective(torch.zeros(seen, dtype=torch.int64, device="meta"), training.label_smoothing)
    use_channels_last(structure)
    with LiveBytes((*inputs.tensors.values(), *structure.parameters(), *structure.buffers())) as live:
        run_steps(structure, plan, inputs, recipe, torch.Generator().manual_seed(0), objective)
    state = structure.state_dict()
    slots = 2 if training.optimiser == "adamw" else int(training.momentum > 0 and not plan.sums_in_momentum)
    shapes = {name: tuple(state[name].shape) for name in plan.changes}
    trained = sum(resident_bytes(4 * plan.num_trained(name, shape)) for name, shape in shapes.items())
    unseen = (num_examples - seen) * feature_bytes(structure, plan, form.input_shape)
    return TrainingMemory(
        weight_bytes=held_bytes(state, plan),
        input_bytes=resident_bytes(form.stored_bytes * num_examples) + unseen,
        step_bytes=live.peak + slots * trained,
        num_kernels=len(live.kernels) * len(set(part_sizes(plan, training, num_examples))),
        resizes=live.resizes,
    )


def part_sizes(plan: FineTunePlan, training: LocalTraining, num_examples: int) -> Iterator[int]:
    """How many examples go through the network at a time."""
    bounds = list(batch_bounds(num_examples, training.batch_size))
    for start, end in bounds[: training.max_steps or len(bounds)]:
        size = plan.micro_batch or end - start
        yield from (min(size, end - first) for first in range(start, end, size))


_CONVOLUTION = torch.ops.aten.convolution.default
_CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default
_CONVOLUTIONS = (_CONVOLUTION, _CONVOLUTION_BACKWARD)
_NORM_BACKWARD = torch.ops.aten.native_batch_norm_backward.default
_RESIZES = (torch.ops.aten.upsample_bilinear2d.default, torch.ops.aten.upsample_bilinear2d.vec)
_LANES = 16
"""Channels that oneDNN puts side by side in its own layouts, for registers of 512 bits."""
_SMALL = 20480
"""Values of one example up to which torch 2.13 prefers its own convolution."""


def scratch_bytes(func: Callable[..., Any], args: tuple[Any, ...]) -> int:
    """What torch 2.13's kernels for an operation take beside its arguments and its results, as its profiler shows it.

    oneDNN copies a convolution's weight, and its input where channels are not innermost, into layouts of its own. The
    weight's gradient is computed in such a layout, in which the channels of every group are filled up to 16 on both
    sides (256 times the gradient of a depthwise convolution), and copied. The gradient of batch norm copies its input.
    One small example goes to torch's own convolution instead, which takes what `_column_bytes` says.
    """
    if func is _CONVOLUTION:
        x, weight = args[:2]
        if _is_small(x, weight, args[8]):
            return _column_bytes(x, weight, args[3], args[4], args[5])
        given = 0 if x.is_contiguous(memory_format=torch.channels_last) else x.nbytes
        return given + weight.nbytes * _filled(weight.shape[0]) // weight.shape[0]
    if func is _CONVOLUTION_BACKWARD and args[-1][1]:
        x, weight, groups = args[1], args[2], args[-2]
        if _is_small(x, weight, groups):
            return _column_bytes(x, weight, args[4], args[5], args[6])
        kernel = weight.shape[2:].numel() * weight.element_size()
        return groups * _filled(weight.shape[0] // groups) * _filled(weight.shape[1]) * kernel + weight.nbytes
    return args[0].nbytes if func is _NORM_BACKWARD else 0


def _is_small(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether torch runs a convolution without oneDNN: of one example and one group, with few values (`_SMALL`)."""
    return len(x) == 1 and groups == 1 and min(weight.shape[2:]) <= 3 and x.numel() <= _SMALL


def _column_bytes(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> int:
    """Every position's window of the input, side by side, as torch's own convolution lays them out, and the weight
    in that order. A pointwise one's weight is in that order, and with stride 1 its input is laid out so already.
    """
    kernel = weight.shape[2:]
    if kernel.numel() == 1 and all(step == 1 for step in stride):
        return 0
    reach = [spread * (side - 1) + 1 for spread, side in zip(dilation, kernel, strict=True)]
    sizes = zip(x.shape[2:], reach, stride, padding, strict=True)
    positions = math.prod((size + 2 * zeros - own) // step + 1 for size, own, step, zeros in sizes)
    ordered = weight.nbytes if kernel.numel() > 1 else 0
    return positions * math.prod(weight.shape[1:]) * x.element_size() + ordered


def _channels_innermost(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _filled(channels: int) -> int:
    return -(-channels // _LANES) * _LANES


class LiveBytes(TorchDispatchMode):
    """Within the context, follows how many bytes the tensors hold that operations make; `peak` is the most at a time.

    A tensor counts with what glibc takes for it (`resident_bytes`). `kernels` are the distinct convolutions that ran;
    `resizes` says whether a map was resized.

    Args:
        known: tensors that exist already and do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.kernels: set[tuple[Any, ...]] = set()
        self.resizes = False
        self._known = {tensor.untyped_storage()._cdata: tensor for tensor in known}
        self._finalizers: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._fused_sgd_.default and args[0][0].is_meta:
            return None  # changes parameters in place; it has no meta kernel
        if func is torch.ops.aten.batch_norm_update_stats.default and args[0].is_meta:
            return self._followed([args[0].new_empty(args[0].shape[1]) for _ in range(2)])  # it has none either
        if func in _CONVOLUTIONS:
            shapes = (tuple(item.shape) if isinstance(item, Tensor) else str(item) for item in args)
            self.kernels.add((func, *shapes))
        self.resizes = self.resizes or func in _RESIZES
        result = func(*args, **(kwargs or {}))
        if func is _CONVOLUTION and result.is_meta and any(map(_channels_innermost, args[:2])):
            result = result.contiguous(memory_format=torch.channels_last)  # as on a CPU; meta convolutions forget it
        self._followed(result)
        self.peak = max(self.peak, self.live + scratch_bytes(func, args))
        return result

    def _followed(self, result: Any) -> Any:
        """The result of an operation, whose tensors count from now on."""
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
