"""The seam between a plan and the layers: puts a plan onto a plain module for the time of a training run.

The model does not know of plans. Here its parameters are frozen or freed, its norms put into their mode, layers that
train in part put in place, memory-lean operations swapped in and its blocks checkpointed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedofa.finetune.ops.kept import Keeper
from fedofa.finetune.ops.swap import lean
from fedofa.finetune.plans import MICRO_BATCH_REFUSAL
from fedofa.finetune.recompute import recomputed
from fedofa.finetune.surgery import adapted
from fedofa.types.errors import ConfigError
from fedofa.types.plan import FineTunePlan


@contextmanager
def planned(
    model: nn.Module, plan: FineTunePlan, generator: torch.Generator | None = None
) -> Iterator[list[nn.Parameter]]:
    """Within the context the model trains as the plan says; afterwards every block computes as before.

    Args:
        model: the subnet; plan: what trains and how.
        generator: draws the directions in which compressed activations are rounded, and the first factors of weights
            of low rank; only such plans need it.

    Yields:
        What trains: the plan's trainable parameters in its order, of a weight that trains in part that part, and then
        the left and the right factor of each weight of low rank.

    Raises:
        ConfigError: when the plan names a parameter or block that the model does not have, or cannot be exact on it.
    """
    parameters = dict(model.named_parameters())
    unknown = [name for name in plan.changes if name not in parameters]
    if unknown:
        raise ConfigError(f"plan {plan.name!r} trains {unknown[:3]}, which this subnet does not have")
    trainable = set(plan.trainable)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trainable)
        parameter.grad = None
    model.train()
    use_channels_last(model)
    with ExitStack() as stack:
        stack.enter_context(_norms_in_mode(model, plan))
        keeper = Keeper(plan.kept, plan.kept_fraction, generator)
        parts = stack.enter_context(adapted(model, plan, keeper, generator))
        if plan.lean:
            stack.enter_context(lean(model, keeper, codes_swish=plan.kept != "float32"))
        else:
            stack.enter_context(_group_norms_asking(model))
        for segment in plan.recompute:
            stack.enter_context(recomputed([_block(model, name, plan) for name in segment]))
        whole = [[parameters[name]] for name in plan.trainable]
        own = [parts.get(name, given) for name, given in zip(plan.trainable, whole, strict=True)]
        yield list(itertools.chain(*own, *(parts[name] for name in plan.low_rank)))


@contextmanager
def _norms_in_mode(model: nn.Module, plan: FineTunePlan) -> Iterator[None]:
    """Batch norms in the plan's mode; their running statistics are the server's business and stay as they came."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if norms and plan.micro_batch and plan.statistics == "batch":
        raise ConfigError(f"plan {plan.name!r}: {MICRO_BATCH_REFUSAL}")
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.train(plan.statistics == "batch")
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@contextmanager
def _group_norms_asking(model: nn.Module) -> Iterator[None]:
    norms = (module for module in model.modules() if isinstance(module, nn.GroupNorm))
    hooks = [norm.register_forward_pre_hook(_want_input_gradient) for norm in norms]
    try:
        yield
    finally:
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


def _block(model: nn.Module, name: str, plan: FineTunePlan) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ConfigError(f"plan {plan.name!r} recomputes {name!r}, which this subnet does not have") from None
