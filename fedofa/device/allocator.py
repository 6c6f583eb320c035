"""The C library's memory allocator: what a tensor takes, and the time of large passes depends on it.

glibc gives the top of its heap back to the operating system whenever enough of it is free, and takes the largest
tensors from the system one by one. A subnet whose activations are large then has all its pages given back and mapped
anew in every pass: a forward pass takes up to half as long again, a step of shrinking on images of 96 pixels a tenth
longer. Whether it happens depends on what the process has allocated before. Where memory counts and not time, every
freed tensor goes back at once.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
_TRIM_BYTES = (1 << 31) - 1  # the most that mallopt takes
_MMAP_BYTES = (1 << 30, 32 << 20)
"""Sizes from which a tensor is taken from the system, by preference: before 2.35 glibc takes at most the second."""
_OWN_MAPPING_BYTES = 1 << 16
"""Allocations from this size on have pages of their own, with `tune_allocator`."""
_PAGE_BYTES = 1 << 12
_CHUNK_BYTES = 96
"""What glibc spends on a small aligned block: its header and the alignment to 64 bytes."""


def keep_freed_memory() -> bool:
    """Have glibc keep up to 2 GB of freed memory for later passes, in this process; False where it is not glibc.

    The environment variables MALLOC_TRIM_THRESHOLD_=2147483647 and MALLOC_MMAP_THRESHOLD_=1073741824 do the same from
    the start of a process.
    """
    return any(_set(_M_MMAP_THRESHOLD, size) for size in _MMAP_BYTES) and _set(_M_TRIM_THRESHOLD, _TRIM_BYTES)


def tune_allocator() -> bool:
    """Have glibc give every freed tensor of 64 KB or more back at once, in this process; False where it is not glibc.

    Its own threshold grows to 32 MB with the tensors that it sees, after which up to a quarter more memory stays
    resident. The environment variable MALLOC_MMAP_THRESHOLD_=65536 does the same from the start of a process.
    """
    return _set(_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES) and _set(_M_TRIM_THRESHOLD, _OWN_MAPPING_BYTES)


def _set(parameter: int, value: int) -> bool:
    """Whether the C library is glibc and takes a value for a parameter of its allocator."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    return mallopt is not None and bool(mallopt(parameter, value))


def resident_bytes(size: int) -> int:
    """What an allocation takes under `tune_allocator`: whole pages and its header from 64 KB on, else a block."""
    if size + _CHUNK_BYTES < _OWN_MAPPING_BYTES:
        return size + _CHUNK_BYTES
    return -(-(size + _CHUNK_BYTES) // _PAGE_BYTES) * _PAGE_BYTES
