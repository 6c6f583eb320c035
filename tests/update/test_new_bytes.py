"""Bytes that are written in place are bytes like others once they are written, and nobody else's."""

import pytest

from fedofa.update.new_bytes import new_bytes


@pytest.mark.parametrize("size", [0, 1, 2, 63, 64, 100_003, 5_000_000])
def test_holds_what_was_written(size: int) -> None:
    expected = (bytes(range(256)) * (size // 256 + 1))[:size]
    buffer, memory = new_bytes(size)
    assert len(memory) == size and not memory.readonly
    memory[:] = expected
    assert type(buffer) is bytes
    assert buffer == expected and hash(buffer) == hash(expected)
    assert memoryview(buffer).readonly


def test_short_bytes_are_no_others() -> None:
    """Python keeps one object for each byte, which must not be the one that is written to."""
    letters = [bytes([value]) for value in range(256)]
    for value in range(256):
        buffer, memory = new_bytes(1)
        memory[0] = value ^ 0xFF
        assert buffer == bytes([value ^ 0xFF])
        assert letters[value] == value.to_bytes(1, "big")


def test_refuses_what_there_is_no_room_for() -> None:
    with pytest.raises(MemoryError):
        new_bytes(2**62)
