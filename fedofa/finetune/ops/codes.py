"""Bits and bytes that stand for an activation function's derivative, so that its input need not be kept."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

CHUNK = 1 << 16
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


def chunks(count: int) -> Iterator[slice]:
    """Ranges of values that are handled at a time; what is computed between lies in buffers that all of them use."""
    return (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def chunk_buffer(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer for one chunk of that many values: fresh memory for every chunk would cost more than the work on it."""
    return torch.empty(min(count, CHUNK), dtype=dtype, device=device)


def pack_bits(values: Tensor) -> Tensor:
    """Booleans `(count,)` as `(ceil(count / 8),)` bytes, the first as the lowest bit."""
    packed = torch.empty(-(-values.numel() // 8), dtype=torch.uint8, device=values.device)
    words = chunk_buffer(len(packed), torch.int64, values.device)
    for part in chunks(values.numel()):
        _pack_chunk(values[part], words, packed[part.start // 8 : -(-part.stop // 8)])
    return packed


def _pack_chunk(values: Tensor, words: Tensor, packed: Tensor) -> None:
    """Pack booleans into `packed`; `words` is a buffer of as many values."""
    spare = -values.numel() % 8
    padded = torch.nn.functional.pad(values, (0, spare)) if spare else values
    words = words[: len(packed)]
    torch.mul(padded.view(torch.uint8).view(torch.int64), _GATHER, out=words)
    packed.copy_(torch.bitwise_right_shift(words, 56, out=words))


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The inverse of `pack_bits`."""
    return torch.index_select(bit_table(torch.bool, packed.device), 0, packed.int()).view(-1)[:count]


@lru_cache(maxsize=8)
def bit_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight bits of every byte, `(256, 8)`, the lowest first."""
    return (torch.arange(256, device=device).view(256, 1) >> torch.arange(8, device=device) & 1).to(dtype)


def pack_inside(result: Tensor, upper: float | None) -> Tensor:
    """One bit a value: whether it lies strictly between 0 and `upper`, given that none lies outside.

    Args:
        result: `dense`, of any shape; what a clamp to [0, upper] gave, or to [0, infinity) for None.
    """
    values = flat(result)
    packed = torch.empty(-(-values.numel() // 8), dtype=torch.uint8, device=values.device)
    inside, below = (chunk_buffer(values.numel(), torch.bool, values.device) for _ in range(2))
    rest, words = (
        chunk_buffer(values.numel(), values.dtype, values.device),
        chunk_buffer(len(packed), torch.int64, values.device),
    )
    for part in chunks(values.numel()):
        size = part.stop - part.start
        inside[:size].copy_(values[part])
        if upper is not None:
            below[:size].copy_(torch.sub(values[part], upper, out=rest[:size]))
            torch.bitwise_and(inside[:size], below[:size], out=inside[:size])
        _pack_chunk(inside[:size], words, packed[part.start // 8 : -(-part.stop // 8)])
    return packed


def gradient_inside(grad: Tensor, packed: Tensor, slope: float) -> Tensor:
    """The result's gradient times `slope` where the bit is set, 0 elsewhere; `grad` lies as the packed result did."""
    out = torch.empty_like(grad)
    source, target, table = flat(grad), flat(out), bit_table(grad.dtype, grad.device) * slope
    numbers = chunk_buffer(len(packed), torch.int32, grad.device)
    factors = chunk_buffer(8 * len(packed), grad.dtype, grad.device).view(-1, 8)
    for part in chunks(source.numel()):
        codes = packed[part.start // 8 : -(-part.stop // 8)]
        bits = factors[: len(codes)]
        torch.index_select(table, 0, numbers[: len(codes)].copy_(codes), out=bits)
        torch.mul(source[part], bits.view(-1)[: part.stop - part.start], out=target[part])
    return out


def pack_swish(x: Tensor) -> Tensor:
    """One byte a value: where in [-3, 3) it lies to one of 254 cells; 0 below, 255 above.

    Args:
        x: `dense`, the input of a hard swish.
    """
    values = flat(x)
    packed = torch.empty(values.numel(), dtype=torch.uint8, device=values.device)
    cells = chunk_buffer(values.numel(), values.dtype, values.device)
    for part in chunks(values.numel()):
        cell = torch.add(values[part], 3, out=cells[: part.stop - part.start])
        packed[part] = cell.mul_(_SWISH_CELLS / 6).add_(1).clamp_(0, 255)
    return packed


def gradient_swish(grad: Tensor, packed: Tensor) -> Tensor:
    """The gradient of a hard swish's input, with the derivative at the middle of the cell that the input lies in.

    The derivative is right to 1/254; it is exactly 0 below -3 and 1 from 3 on. `grad` lies as the packed input did.
    """
    out = torch.empty_like(grad)
    source, target = flat(grad), flat(out)
    cells = chunk_buffer(source.numel(), grad.dtype, grad.device)
    for part in chunks(source.numel()):
        middle = cells[: part.stop - part.start].copy_(packed[part]).sub_(0.5).mul_(6 / _SWISH_CELLS).sub_(3)
        torch.ops.aten.hardswish_backward.out(source[part], middle, out=target[part])
    return out
