"""What a client says of its device beside its introduction: what was measured on it, and how fast its link is."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from fedofa.types.errors import ProfileError, WireError

MAX_DEVICE_BYTES = 4 * 2**20
MAX_PROBE_BYTES = 16 * 2**20
"""Bytes that a server may ask for to measure the link."""
_COUNT_BYTES = 8


def read_device(path: Path) -> bytes:
    """The device's file as it is sent; the server checks what is in it.

    Raises:
        ProfileError: when it cannot be read, or is larger than any profile.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ProfileError(f"device profile {path} cannot be read: {error}; `fedofa profile` makes one") from error
    if len(content) > MAX_DEVICE_BYTES:
        raise ProfileError(
            f"device profile {path}: expected at most {MAX_DEVICE_BYTES:,} bytes, found {len(content):,}"
        )
    return content


def device_checksum(content: bytes) -> str:
    """32 hex digits over a device's file."""
    return hashlib.sha256(content).hexdigest()[:32]


def encode_probe(payload: bytes, wanted: int) -> bytes:
    """A message that measures a link: how many bytes its answer has, then bytes that only take their time."""
    return wanted.to_bytes(_COUNT_BYTES, "little") + payload


def answer_probe(buffer: bytes) -> bytes:
    """The answer to such a message.

    Raises:
        WireError: when it asks for nothing, or for too much.
    """
    wanted = int.from_bytes(buffer[:_COUNT_BYTES], "little")
    if len(buffer) < _COUNT_BYTES or wanted > MAX_PROBE_BYTES:
        raise WireError(f"link probe: expected at most {MAX_PROBE_BYTES:,} bytes to be wanted, found {wanted:,}")
    return noise(wanted)


def noise(count: int) -> bytes:
    """Bytes that nothing on the way can make fewer."""
    return np.random.default_rng(0).bytes(count)
