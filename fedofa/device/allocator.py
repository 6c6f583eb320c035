"""The C library's memory allocator: what a tensor takes, and the time of large passes depends on it.

glibc gives the top of its heap back to the operating system whenever enough of it is free, and takes the largest
tensors from the system one by one. A subnet whose activations are large then has all its pages given back and mapped
anew in every pass: a forward pass takes up to half as long again, a step of shrinking on images of 96 pixels twice as
long. Whether it happens depends on what the process has allocated before.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
_TRIM_BYTES = (1 << 31) - 1  # the most that mallopt takes
_MMAP_BYTES = (1 << 30, 32 << 20)
"""Sizes from which a tensor is taken from the system, by preference: before 2.35 glibc takes at most the second."""
_PAGE_BYTES = 1 << 12
_CHUNK_BYTES = 96

OWN_MAPPING_BYTES = 1 << 16
"""Allocations from this size on have pages of their own, with `fedofa.finetune.memory.tune_allocator`."""


def keep_freed_memory() -> bool:
    """Have glibc keep up to 2 GB of freed memory for later passes, in this process; False where it is not glibc.

    The environment variables MALLOC_TRIM_THRESHOLD_=2147483647 and MALLOC_MMAP_THRESHOLD_=1073741824 do the same from
    the start of a process.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    if not any(mallopt(_M_MMAP_THRESHOLD, size) for size in _MMAP_BYTES):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES))


def resident_bytes(size: int) -> int:
    """What an allocation takes: from `OWN_MAPPING_BYTES` on whole pages and one for its header, else a block."""
    if size + _CHUNK_BYTES < OWN_MAPPING_BYTES:
        return size + _CHUNK_BYTES
    return -(-(size + _CHUNK_BYTES) // _PAGE_BYTES) * _PAGE_BYTES
