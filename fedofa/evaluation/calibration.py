"""Batch-norm calibration: the statistics of any subnet from a stream of images, in one pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _Moments:
    """Running mean and variance of one norm's input, over batches: mean of variances plus variance of means."""

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm = norm
        self.count = 0
        self.mean = torch.zeros(norm.num_features, dtype=torch.float64)
        self.squares = torch.zeros(norm.num_features, dtype=torch.float64)  # sum of squared deviations from the mean
        self.hook = norm.register_forward_pre_hook(self._observe)

    def _observe(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().transpose(0, 1).flatten(1)
        count = x.shape[1]
        variance, mean = torch.var_mean(x, dim=1, correction=0)
        mean, total = mean.double().cpu(), self.count + count
        shift = mean - self.mean
        self.squares += variance.double().cpu() * count + shift.square() * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def write(self) -> None:
        """Put the statistics into the norm; the variance is the population's."""
        if self.count and self.norm.running_mean is not None and self.norm.running_var is not None:
            self.norm.running_mean.copy_(self.mean)
            self.norm.running_var.copy_(self.squares / self.count)


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> bool:
    """Replace every batch norm's running statistics by those of the batches; False where there is no batch norm.

    Each layer normalises by the current batch's statistics while it is observed, as Once-for-All does (section 3.3);
    the pooled variance is the mean of the batches' variances plus the variance of their means.

    Args:
        batches: `(batch, channels, height, width)`, normalised and at the subnet's resolution; at least 2 a batch.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return False
    moments = [_Moments(norm) for norm in norms]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 0.0
    try:
        for batch in batches:
            model(batch)
    finally:
        for norm, item, momentum in zip(norms, moments, momenta, strict=True):
            item.hook.remove()
            norm.momentum = momentum
    for item in moments:
        item.write()
    model.eval()
    return True
