"""A received subnet as a module that trains: what stays frozen is read where it was received, the rest is copied.

Received tensors stay until the delta is taken against them, so that a copy of what does not change would only take
memory. Dense convolutions above 1 x 1 are copied all the same, since training lays them out anew
(`engine.use_channels_last`), and so are matrices, since libraries that multiply them may round by where they begin.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fedofa.device.allocator import resident_bytes
from fedofa.supernet.base import fill_skeleton
from fedofa.supernet.views import view_arrays
from fedofa.types.plan import FineTunePlan


def hold(module: nn.Module, received: Mapping[str, np.ndarray], plan: FineTunePlan) -> nn.Module:
    """Put the received tensors into a module, for training under the plan; whatever it had before is let go.

    Args:
        module: the subnet's, or its structure on the meta device.
        received: its parameters and buffers by name, float32; nothing writes to them.
    """
    tensors = view_arrays(received)
    own = {name: tensor if is_shared(name, tensor, plan) else _copy(tensor) for name, tensor in tensors.items()}
    return fill_skeleton(module, own)


def is_shared(name: str, tensor: Tensor, plan: FineTunePlan) -> bool:
    """Whether a tensor stays where it was received: a frozen depthwise or pointwise convolution's weight."""
    if name in plan.changes or tensor.dim() != 4:
        return False
    _, channels, height, width = tensor.shape
    return channels == 1 or height == width == 1


def held_bytes(state: Mapping[str, Tensor], plan: FineTunePlan) -> int:
    """What received tensors take, and the copies of those that are not shared.

    Args:
        state: the module's, shapes are enough.
    """
    return sum(
        resident_bytes(tensor.nbytes) * (1 if is_shared(name, tensor, plan) else 2) for name, tensor in state.items()
    )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
