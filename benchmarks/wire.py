"""What packing and unpacking a subnet costs, beside a memcpy of the same bytes: `python benchmarks/wire.py`.

Every repetition times each operation once, in one process, in CPU seconds; ratios are taken within a repetition and the
median over the repetitions is printed. "fresh" lets the allocator map new pages for every large buffer, so that page
faults are paid by memcpy and codec alike; "reused" lets it hand out pages it already has, which leaves the memcpy
alone with its bytes and is the harder comparison. The last line holds the float32 ratios with fresh pages.
"""

import argparse
import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import xxhash

from fedofa.update.codec import decode_packed, encode_packed

_NUM_PARAMETERS = 8_000_000
_FLOAT_DTYPES = ("float32", "float16", "bfloat16")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_ALLOCATORS = {"fresh": 8 * 2**20, "reused": 32 * 2**20}  # from how many bytes on malloc maps new pages
_WIDTHS, _REDUCED_STAGES, _BLOCKS_PER_STAGE, _EXPAND, _KERNEL = (16, 24, 40, 80, 112, 160), (1, 3, 4), 4, 6, 7


def mobilenet_shapes() -> Iterator[tuple[int, ...]]:
    """Yields the parameter shapes of the largest MobileNetV3 subnet; the classifier fills up to 8.0 M parameters."""
    num_parameters = 0
    for shape in (*_convolution(16, 3, 3), *_convolution(16, 1, 3), *_convolution(16, 16, 1), *_stages()):
        num_parameters += int(np.prod(shape))
        yield shape
    for shape in (*_convolution(960, 160, 1), (1280, 960, 1, 1)):
        num_parameters += int(np.prod(shape))
        yield shape
    num_classes = (_NUM_PARAMETERS - num_parameters) // 1281
    yield from ((num_classes, 1280), (num_classes,))


def _stages() -> Iterator[tuple[int, ...]]:
    for stage, (stage_in, width) in enumerate(pairwise(_WIDTHS)):
        for block in range(_BLOCKS_PER_STAGE):
            block_in = width if block else stage_in
            middle = block_in * _EXPAND
            yield from _convolution(middle, block_in, 1)
            yield from _convolution(middle, 1, _KERNEL)
            if stage in _REDUCED_STAGES:
                yield from ((middle // 4, middle, 1, 1), (middle // 4,), (middle, middle // 4, 1, 1), (middle,))
            yield from _convolution(width, middle, 1)


def _convolution(out_channels: int, in_channels: int, kernel: int) -> list[tuple[int, ...]]:
    """Gives a convolution's weight and its norm's scale and shift."""
    return [(out_channels, in_channels, kernel, kernel), (out_channels,), (out_channels,)]


def cpu_seconds(operation: Callable[[], object]) -> float:
    start = time.process_time()
    result = operation()
    seconds = time.process_time() - start
    del result
    return seconds


def measure(weights: dict[str, np.ndarray], num_repetitions: int) -> dict[str, list[float]]:
    """Gives every operation's CPU seconds, one per repetition; the first two repetitions warm up and are dropped."""
    source = bytearray(encode_packed("payload", {}, {"weights": weights}))
    warm = bytearray(len(source))
    operations: dict[str, Callable[[], object]] = {
        "memcpy": lambda: bytes(source),
        "memcpy, warm target": lambda: np.copyto(np.frombuffer(warm, np.uint8), np.frombuffer(source, np.uint8)),
    }
    for float_dtype in _FLOAT_DTYPES:
        packed = encode_packed("payload", {}, {"weights": weights}, float_dtype=float_dtype)
        operations |= {
            f"{float_dtype} encode": lambda d=float_dtype: encode_packed(
                "payload", {}, {"weights": weights}, float_dtype=d
            ),
            f"{float_dtype} decode": lambda p=packed: decode_packed(p, kind="payload"),
            f"{float_dtype} checksum": lambda p=packed: xxhash.xxh3_128_digest(p),
        }
    seconds: dict[str, list[float]] = {name: [] for name in operations}
    for repetition in range(num_repetitions + 2):
        for name, operation in operations.items():
            elapsed = cpu_seconds(operation)
            if repetition >= 2:
                seconds[name].append(elapsed)
    for float_dtype in _FLOAT_DTYPES:
        columns = zip(*(seconds[f"{float_dtype} {part}"] for part in ("encode", "decode", "checksum")), strict=True)
        seconds[f"{float_dtype} encode + decode - 2 checksums"] = [e + d - 2 * c for e, d, c in columns]
    return seconds


def ratios_to_memcpy(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {
        name: statistics.median(a / b for a, b in zip(column, seconds["memcpy"], strict=True))
        for name, column in seconds.items()
    }


def set_allocator(mapped_from_bytes: int) -> None:
    """Tells glibc from which size on a buffer gets newly mapped pages, and to keep all others."""
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(_M_MMAP_THRESHOLD, mapped_from_bytes) and libc.mallopt(_M_TRIM_THRESHOLD, 2**30)):
        raise OSError("mallopt: expected to set glibc's thresholds, found that it refuses; run with glibc's malloc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=40)
    num_repetitions = parser.parse_args().repetitions
    rng = np.random.default_rng(0)
    weights = {
        f"blocks.{index}.weight": rng.normal(0, 0.05, shape).astype(np.float32)
        for index, shape in enumerate(mobilenet_shapes())
    }
    num_parameters = sum(array.size for array in weights.values())
    print(f"python {platform.python_version()}, numpy {np.__version__}, xxhash {xxhash.VERSION}")
    print(f"{os.cpu_count()} cores, load average {' '.join(f'{load:.2f}' for load in os.getloadavg())}")
    print(f"{len(weights)} float32 arrays, {num_parameters} parameters, {num_repetitions} repetitions")
    ratios = {}
    for allocator, mapped_from_bytes in _ALLOCATORS.items():
        set_allocator(mapped_from_bytes)
        seconds = measure(weights, num_repetitions)
        ratios[allocator] = ratios_to_memcpy(seconds)
        print(f"\n{allocator + ' pages':42}{'CPU ms':>8}{'x memcpy':>10}")
        for name, column in seconds.items():
            print(f"{name:42}{statistics.median(column) * 1e3:8.2f}{ratios[allocator][name]:10.2f}")
    fresh = ratios["fresh"]
    encode_decode, checksum = fresh["float32 encode + decode - 2 checksums"], fresh["float32 checksum"]
    print(f"\nencode_decode_ratio={encode_decode:.2f} checksum_ratio={checksum:.2f}")


if __name__ == "__main__":
    main()
