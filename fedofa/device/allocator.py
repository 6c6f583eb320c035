"""The C library's memory allocator: what a tensor takes, and the time of a large subnet's forward pass depends on it.

glibc gives the top of its heap back to the operating system whenever enough of it is free. A subnet whose activations
are large then has all its pages given back and mapped anew in every pass, which takes up to half as long again; whether
it happens depends on what the process has allocated before.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
_PAGE_BYTES = 1 << 12
_CHUNK_BYTES = 96

OWN_MAPPING_BYTES = 1 << 16
"""Allocations from this size on have pages of their own, with `fedofa.finetune.memory.tune_allocator`."""
_TRIM_BYTES, _MMAP_BYTES = 1 << 30, 32 << 20  # glibc takes at most 32 MB for the second


def keep_freed_memory() -> bool:
    """Have glibc keep up to 1 GB of freed memory for later passes, in this process; False where it is not glibc.

    The environment variables MALLOC_TRIM_THRESHOLD_=1073741824 and MALLOC_MMAP_THRESHOLD_=33554432 do the same from the
    start of a process.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES))


def resident_bytes(size: int) -> int:
    """What an allocation takes: from `OWN_MAPPING_BYTES` on whole pages and one for its header, else a block."""
    if size + _CHUNK_BYTES < OWN_MAPPING_BYTES:
        return size + _CHUNK_BYTES
    return -(-(size + _CHUNK_BYTES) // _PAGE_BYTES) * _PAGE_BYTES
