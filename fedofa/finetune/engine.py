"""The seam between a plan and the layers: puts a plan onto a plain module for the time of a training run.

The model does not know of plans. Here its parameters are frozen or freed, its norms put into their mode and its blocks
checkpointed; memory-lean operations are to be swapped in at the same place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fedofa.types.errors import ConfigError
from fedofa.types.plan import FineTunePlan


@contextmanager
def planned(model: nn.Module, plan: FineTunePlan) -> Iterator[list[nn.Parameter]]:
    """Within the context the model trains as the plan says; afterwards every block computes as before.

    Yields:
        The trainable parameters, in the plan's order.

    Raises:
        ConfigError: when the plan names a parameter or block that the model does not have.
    """
    parameters = dict(model.named_parameters())
    unknown = [name for name in plan.trainable if name not in parameters]
    if unknown:
        raise ConfigError(f"plan {plan.name!r} trains {unknown[:3]}, which this subnet does not have")
    trainable = set(plan.trainable)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trainable)
        parameter.grad = None
    model.train()
    use_channels_last(model)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # running statistics are the server's business and stay as they came
        norm.train(plan.statistics == "batch")
    hooks = [
        module.register_forward_pre_hook(_want_input_gradient)
        for module in model.modules()
        if isinstance(module, nn.GroupNorm)
    ]
    checkpointed = []
    try:
        for name in dict.fromkeys(plan.recompute):
            checkpointed.append(_checkpoint_block(model, name, plan))
        yield [parameters[name] for name in plan.trainable]
    finally:
        for block in checkpointed:
            del block.forward  # the instance's override; the class's forward shows again
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for hook in hooks:
            hook.remove()


def _want_input_gradient(norm: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Ask for the gradient of a group norm's input where only its affine trains.

    Nobody needs it, but torch 2.13's backward of group norm crashes on a CPU when it is not asked for and channels are
    innermost. It costs one norm: the first that trains, behind frozen layers.
    """
    (x,) = inputs
    trains = any(parameter.requires_grad for parameter in norm.parameters())
    return (x.detach().requires_grad_(),) if torch.is_grad_enabled() and trains and not x.requires_grad else inputs


def use_channels_last(model: nn.Module) -> None:
    """Put a module's convolutions into the layout that all training and scoring uses: channels innermost.

    Depthwise convolutions are about twice as fast in it on a CPU. There is one layout, since another one may round
    otherwise, and a module that was scored before would then train to other bits. `Module.to` would also
    change the strides of weights of one input channel, and with them the rounding.
    """
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _checkpoint_block(model: nn.Module, name: str, plan: FineTunePlan) -> nn.Module:
    """Recompute one block's activations in the backward pass; `torch.utils.checkpoint` restores the random state."""
    try:
        block = model.get_submodule(name)
    except AttributeError:
        raise ConfigError(f"plan {plan.name!r} recomputes {name!r}, which this subnet does not have") from None
    block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return block
