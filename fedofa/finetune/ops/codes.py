"""Bits and bytes that stand for an activation function's derivative, so that its input need not be kept."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

_CHUNK = 1 << 17
"""Values handled at a time, a multiple of 8: temporaries stay in a core's cache."""
_GATHER = 0x0102040810204080
"""Multiplied with eight bytes of 0 or 1 it collects them as bits in the uppermost byte, the first as the lowest bit."""
_SWISH_CELLS = 254


def dense(x: Tensor) -> Tensor:
    """The tensor itself where its values lie in memory without gaps, contiguous or channels innermost; else a copy."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def flat(x: Tensor) -> Tensor:
    """The values of a `dense` tensor in the order in which they lie in memory, as a view."""
    return x.as_strided((x.numel(),), (1,))


def like(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The tensor itself where it lies in memory with these strides, else a copy that does."""
    if x.stride() == stride:
        return x
    return torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device).copy_(x)


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))


def pack_bits(values: Tensor) -> Tensor:
    """Booleans `(count,)` as `(ceil(count / 8),)` bytes, the first as the lowest bit."""
    spare = -values.numel() % 8
    padded = torch.nn.functional.pad(values, (0, spare)) if spare else values
    return (padded.view(torch.uint8).view(torch.int64) * _GATHER >> 56).to(torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The inverse of `pack_bits`."""
    return torch.index_select(_bit_table(torch.bool, packed.device), 0, packed.int()).view(-1)[:count]


@lru_cache(maxsize=8)
def _bit_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight bits of every byte, `(256, 8)`, the lowest first."""
    return (torch.arange(256, device=device).view(256, 1) >> torch.arange(8, device=device) & 1).to(dtype)


def pack_inside(result: Tensor, upper: float | None) -> Tensor:
    """One bit a value: whether it lies strictly between 0 and `upper`, given that none lies outside.

    Args:
        result: `dense`, of any shape; what a clamp to [0, upper] gave, or to [0, infinity) for None.
    """
    values = flat(result)
    packed = torch.empty(-(-values.numel() // 8), dtype=torch.uint8, device=values.device)
    for part in _chunks(values.numel()):
        inside = values[part].to(torch.bool)
        if upper is not None:
            inside &= (values[part] - upper).to(torch.bool)
        packed[part.start // 8 : -(-part.stop // 8)] = pack_bits(inside)
    return packed


def gradient_inside(grad: Tensor, packed: Tensor, slope: float) -> Tensor:
    """The result's gradient times `slope` where the bit is set, 0 elsewhere; `grad` lies as the packed result did."""
    out = torch.empty_like(grad)
    source, target, table = flat(grad), flat(out), _bit_table(grad.dtype, grad.device) * slope
    for part in _chunks(source.numel()):
        bits = torch.index_select(table, 0, packed[part.start // 8 : -(-part.stop // 8)].int()).view(-1)
        torch.mul(source[part], bits[: part.stop - part.start], out=target[part])
    return out


def pack_swish(x: Tensor) -> Tensor:
    """One byte a value: where in [-3, 3) it lies to one of 254 cells; 0 below, 255 above.

    Args:
        x: `dense`, the input of a hard swish.
    """
    values = flat(x)
    packed = torch.empty(values.numel(), dtype=torch.uint8, device=values.device)
    for part in _chunks(values.numel()):
        packed[part] = (values[part] + 3).mul_(_SWISH_CELLS / 6).add_(1).clamp_(0, 255)
    return packed


def gradient_swish(grad: Tensor, packed: Tensor) -> Tensor:
    """The gradient of a hard swish's input, with the derivative at the middle of the cell that the input lies in.

    The derivative is right to 1/254; it is exactly 0 below -3 and 1 from 3 on. `grad` lies as the packed input did.
    """
    out = torch.empty_like(grad)
    source, target = flat(grad), flat(out)
    for part in _chunks(source.numel()):
        middle = packed[part].to(grad.dtype).sub_(0.5).mul_(6 / _SWISH_CELLS).sub_(3)
        target[part] = torch.ops.aten.hardswish_backward(source[part], middle)
    return out
