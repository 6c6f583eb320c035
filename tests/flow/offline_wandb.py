"""Reads the history out of a W&B offline file: a seven-byte header, then records as in LevelDB's log format."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _HEADER, _FULL, _LAST = 32768, 7, 1, 4


def records(path: Path) -> Iterator[Record]:
    data, at, parts = path.read_bytes(), _HEADER, b""
    while at + _HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER:  # the rest of a block that no record's header fits in
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in (_FULL, _LAST):
            yield Record.FromString(parts)
            parts = b""


def history(path: Path) -> list[tuple[int, dict]]:
    """(step, values) of every logged row."""
    rows = []
    for record in records(path):
        if record.HasField("history"):
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            rows.append((record.history.step.num, values))
    return rows
