"""How a Flower message crosses between two processes: small parts through a pipe, large ones in memory files."""

import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import NamedTuple, cast

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.message import make_message
from flwr.common.serde import message_from_proto, message_to_proto, recorddict_from_proto, recorddict_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedofa.types.errors import WireError

INLINE_LIMIT_BYTES = 64 * 1024
"""Byte strings up to this size go through the pipe: a memory file costs more than it saves."""

_HAS_MEMORY_FILES = hasattr(os, "memfd_create")


@dataclass(frozen=True, slots=True)
class Parcel:
    """One message and one client's state as byte strings, ready to send; large arrays stay apart and can be shared."""

    message: bytes
    """Protobuf of the message; the arrays named in `arrays` are empty in it."""
    state: bytes
    """Protobuf of the client's `Context.state`; empty when it holds no record."""
    arrays: dict[tuple[str, str], bytes]
    """(record name, array name) -> the data of an array above `INLINE_LIMIT_BYTES`."""

    def blobs(self) -> list[bytes]:
        """Every byte string of the parcel, in the order in which it is sent."""
        return [self.message, self.state, *self.arrays.values()]


def encode_parcel(message: Message, state: bytes) -> Parcel:
    """Pack a message with content or an error; `message` stays as it is and its large arrays are not copied."""
    if message.has_error():
        return Parcel(message_to_proto(message).SerializeToString(), state, {})
    content, arrays = _take_out_large_arrays(message.content)
    hollow = make_message(metadata=message.metadata, content=content)
    return Parcel(message_to_proto(hollow).SerializeToString(), state, arrays)


def decode_message(parcel: Parcel) -> Message:
    """The message of a parcel, with ordinary bytes in every array."""
    message = message_from_proto(ProtoMessage.FromString(parcel.message))
    for (record_name, array_name), data in parcel.arrays.items():
        record = cast(ArrayRecord, message.content[record_name])  # `.array_records` would make a reference cycle
        record[array_name].data = data
    return message


def encode_state(state: RecordDict) -> bytes:
    """A client's state as protobuf; empty when it holds no record."""
    return recorddict_to_proto(state).SerializeToString()


def decode_state(state: bytes) -> RecordDict:
    """The inverse of `encode_state`; damaged bytes raise protobuf's `DecodeError`."""
    return recorddict_from_proto(ProtoRecordDict.FromString(state))


def assume_identity(run_id: int, node_id: int) -> None:
    """Make `Message(content, dst_node_id=..., ...)` work in this process, as the given node.

    Flower's `Message` reads run and sender from this private class, which only Flower's own runtimes fill in:
    the one place where this project touches it.
    """
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id


def _take_out_large_arrays(content: RecordDict) -> tuple[RecordDict, dict[tuple[str, str], bytes]]:
    """A copy of `content` whose large arrays are empty, and their data by (record name, array name)."""
    hollow, taken = RecordDict(), {}
    for name, record in content.items():
        hollow[name] = record
        if not isinstance(record, ArrayRecord):
            continue
        large = {key: array for key, array in record.items() if len(array.data) > INLINE_LIMIT_BYTES}
        if large:
            taken.update({(name, key): array.data for key, array in large.items()})
            hollow[name] = emptied = ArrayRecord()
            for key, array in record.items():
                emptied[key] = Array(array.dtype, array.shape, array.stype, b"") if key in large else array
    return hollow, taken


class Handle(NamedTuple):
    """Where another process finds a byte string: an open memory file of the process that holds it."""

    pid: int
    fd: int
    size_bytes: int
    serial: int
    """Never used twice by one process, unlike `fd`: equal handles mean equal bytes."""


@dataclass(slots=True)
class _HeldBlob:
    blob: bytes
    num_holders: int = 0
    handle: Handle | None = None


@dataclass(slots=True)
class MemoryFiles:
    """Anonymous memory files of this process: one per distinct `bytes` object above `INLINE_LIMIT_BYTES`.

    A file comes into being when its handle is first asked for and goes with its last holder. It has no name and is
    closed on exec, so it cannot outlive this process. Not thread-safe. Where the system has no memory files, nothing
    gets a handle and everything goes through the pipe.
    """

    _held: dict[int, _HeldBlob] = field(default_factory=dict)
    _serials: Iterable[int] = field(default_factory=itertools.count)

    def hold(self, blobs: Iterable[bytes]) -> None:
        """Count one more holder of each large byte string."""
        for blob in blobs:
            if _HAS_MEMORY_FILES and len(blob) > INLINE_LIMIT_BYTES:
                self._held.setdefault(id(blob), _HeldBlob(blob)).num_holders += 1

    def release(self, blobs: Iterable[bytes]) -> None:
        """Take back one `hold` of each."""
        for blob in blobs:
            held = self._held.get(id(blob))
            if held is None:
                continue
            held.num_holders -= 1
            if held.num_holders == 0:
                del self._held[id(blob)]
                _close_file(held)

    def handle(self, blob: bytes) -> Handle | None:
        """Where others find a held byte string, or None if it is to be sent inline; `OSError` if memory is short."""
        held = self._held.get(id(blob))
        if held is None:
            return None
        if held.handle is None:
            held.handle = Handle(os.getpid(), _create_file(blob), len(blob), next(iter(self._serials)))
        return held.handle

    def clear(self) -> None:
        """Close every file, whoever holds it."""
        for held in self._held.values():
            _close_file(held)
        self._held.clear()


def _create_file(blob: bytes) -> int:
    fd = os.memfd_create("fedofa-payload")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(blob)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _close_file(held: _HeldBlob) -> None:
    if held.handle is not None:
        os.close(held.handle.fd)


def _read_file(handle: Handle) -> bytes:
    path = f"/proc/{handle.pid}/fd/{handle.fd}"
    with open(path, "rb") as file:
        data = file.read(handle.size_bytes)
    if len(data) != handle.size_bytes:
        raise WireError(f"{path}: expected {handle.size_bytes} bytes, found {len(data)}; the parcel is dropped")
    return data


def send_parcel(connection: Connection, parcel: Parcel, files: MemoryFiles) -> None:
    """Send a parcel; its large byte strings must be held in `files` until the other side has answered.

    A header says which arrays were taken out and where each byte string is (a handle, or null for inline). Only the
    header decides: nothing inside a message can pass for a handle.
    """
    blobs = parcel.blobs()
    handles = [files.handle(blob) for blob in blobs]
    connection.send_bytes(json.dumps({"arrays": list(parcel.arrays), "handles": handles}).encode())
    for blob, handle in zip(blobs, handles, strict=True):
        if handle is None:
            connection.send_bytes(blob)


def receive_parcel(connection: Connection, recent: dict[Handle, bytes]) -> Parcel:
    """Receive what `send_parcel` sent; blocks until it is complete.

    `recent` holds the files read for the previous parcel: those are not read again. It is left with this parcel's.
    `EOFError` or `OSError` means that the other side is gone, `WireError` that a memory file is truncated.
    """
    header = json.loads(connection.recv_bytes())
    handles = [None if fields is None else Handle(*fields) for fields in header["handles"]]
    for stale in recent.keys() - set(handles):
        del recent[stale]
    blobs: list[bytes] = []
    for handle in handles:
        if handle is None:
            blobs.append(connection.recv_bytes())
            continue
        if handle not in recent:
            recent[handle] = _read_file(handle)
        blobs.append(recent[handle])
    places = [(record_name, array_name) for record_name, array_name in header["arrays"]]
    return Parcel(blobs[0], blobs[1], dict(zip(places, blobs[2:], strict=True)))
