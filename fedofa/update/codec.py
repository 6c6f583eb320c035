"""The wire codec: one packed buffer with a small manifest, for a subnet's weights and for a client's delta alike.

All integers are little-endian. The buffer is prefix, manifest and body, one directly after the other:

====== ====== ==================================================================================================
offset bytes  content
====== ====== ==================================================================================================
0      8      magic, ``89 46 44 4F 46 41 0D 0A`` (``\\x89FDOFA\\r\\n``)
8      4      format version, unsigned: 1
12     4      manifest length m in bytes, unsigned: at most 16 MiB, and 40 + m is a multiple of 64
16     8      body length b in bytes, unsigned: the whole buffer has 40 + m + b bytes
24     16     XXH3 128-bit checksum (seed 0, canonical big-endian form) over manifest and body
40     m      manifest: ASCII JSON, padded with spaces at its end
40 + m b      body: the elements of every array
====== ====== ==================================================================================================

The manifest is an object with exactly these members; no object in it has the same key twice, no number is NaN or
infinite:

- ``kind``: a string, what the buffer is ("payload", "delta", ...).
- ``header``: an object of the sender's own.
- ``streams``: an object, stream name -> list of the stream's arrays. An array is an object with exactly the members
  ``name`` (unique in its stream), ``dtype`` (what decoding gives), ``wire`` (how the body holds it), ``shape`` (at most
  64 non-negative integers) and ``offset`` (in bytes, from the start of the body).

Arrays lie in the body in manifest order and C order, each at the first multiple of 64 that is not below the end of the
one before it; gaps hold zeros; the body ends where its last array ends. ``dtype`` and ``wire`` are the same, one of
bool (a byte, 0 or 1), int8 to int64, uint8 to uint64, float64 or float32, except that a float32 array may have the wire
float16 or bfloat16 (the upper half of a float32).

The checksum finds damage, not forgery: who sent a buffer is for its signature to say.
"""

import itertools
import json
import math
import reprlib
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import numpy as np
import xxhash

from fedofa.types.errors import ConfigError, WireError
from fedofa.update.new_bytes import new_bytes

_MAGIC = b"\x89FDOFA\r\n"
_VERSION = 1
_PREFIX = struct.Struct("<8sIIQ16s")
_ALIGNMENT_BYTES = 64
_ZEROS = bytes(_ALIGNMENT_BYTES)
_MAX_MANIFEST_BYTES = 16 * 2**20
_MAX_DIMENSIONS = 64
_WIDEST_ITEM_BYTES = 8

_DTYPE_NAMES = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "float32", "float64")
_PLAIN = np.dtype("<f4")
_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in _DTYPE_NAMES}
_NAMES = {(dtype.kind, dtype.itemsize): name for name, dtype in _DTYPES.items()} | {("f", 2): "float32"}
_FLOAT_WIRES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}
_WIRES = _DTYPES | _FLOAT_WIRES
_WIRES_OF = {name: (name,) for name in _DTYPES} | {"float32": tuple(_FLOAT_WIRES)}
_READ_OVER = frozenset({"bool", "float16", "bfloat16"})
_INFINITY_BITS = {"float16": 0x7C00, "bfloat16": 0x7F80}

_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DAMAGED = "it was damaged on its way; ask the sender for it again"
_FOREIGN = "encode_packed did not write it; do not trust the sender"


@dataclass(frozen=True, slots=True)
class Packed:
    """A decoded buffer. Its arrays are read-only."""

    kind: str  # "payload", "delta", ...
    header: Mapping[str, Any]  # JSON values only
    streams: Mapping[str, Mapping[str, np.ndarray]]  # stream ("weights", "statistics", ...) -> name -> array


class _Entry(NamedTuple):
    """One array as the manifest describes it, checked against the body."""

    name: str
    dtype: str
    wire: str
    shape: tuple[int, ...]
    offset: int
    end: int


def encode_packed(
    kind: str,
    header: Mapping[str, Any],
    streams: Mapping[str, Mapping[str, np.ndarray]],
    *,
    float_dtype: str = "float32",
) -> bytes:
    """Packs arrays of any shapes, and a header of JSON values, into one buffer.

    Args:
        kind: what the buffer is; `decode_packed` must be told the same.
        header: JSON values only: string keys, lists rather than tuples, finite numbers.
        streams: stream -> name -> array, of bool, integers or floats.
        float_dtype: "float32", "float16" or "bfloat16": how float32 and float16 arrays are sent. They come out as
            float32. Arrays of any other dtype, float64 too, come out as they are.

    Raises:
        ConfigError: `float_dtype` is none of the three.
        WireError: the header is not JSON, a name is not a string, an array's dtype is not supported, or a finite value
            does not fit `float_dtype` (values that are already infinite or NaN pass).
    """
    return _encode(kind, header, streams, float_dtype)[0]


def encode_and_view(
    kind: str,
    header: Mapping[str, Any],
    streams: Mapping[str, Mapping[str, np.ndarray]],
    *,
    float_dtype: str = "float32",
) -> tuple[bytes, Packed]:
    """Packs like `encode_packed`, and gives what `decode_packed` makes of the buffer, without reading it again.

    So the sender has the arrays as the receiver gets them, in memory that nobody writes to, for one copy in all.
    """
    buffer, layout = _encode(kind, header, streams, float_dtype)
    body = memoryview(buffer)[len(buffer) - layout.body_bytes :]
    views = {
        stream: {entry.name: _from_wire(entry, body, stream) for entry in entries}
        for stream, entries in layout.entries.items()
    }
    return buffer, Packed(kind, dict(header), views)


def decode_packed(buffer: bytes | bytearray | memoryview, *, kind: str) -> Packed:
    """Checks a buffer of `encode_packed` from end to end and gives its arrays back.

    Arrays that were sent as they are (all but float16 and bfloat16) are read-only views: nothing is copied, they keep
    `buffer` alive, and they change with it when it is not immutable. They are 64-byte aligned where the buffer is.

    Raises:
        WireError: the buffer is truncated, damaged, of another version or kind, or its manifest does not describe it.
    """
    view = memoryview(buffer)
    manifest_bytes = _check_prefix(view)
    body = view[_PREFIX.size + manifest_bytes :]
    manifest = _decode_manifest(view[_PREFIX.size : _PREFIX.size + manifest_bytes])
    if manifest["kind"] != kind:
        _refuse("packed buffer", f"kind {kind!r}", _shown(manifest["kind"]), "pass it to the code that takes its kind")
    streams: dict[str, dict[str, np.ndarray]] = {}
    end = 0
    for stream, entries in manifest["streams"].items():
        where = f"packed buffer, stream {_shown(stream)}"
        if type(entries) is not list:
            _refuse(where, "a list of arrays", _shown(entries), _FOREIGN)
        arrays = streams[stream] = {}
        for position, fields in enumerate(entries):
            entry = _check_entry(fields, _aligned(end), len(body), f"{where}, array {position}")
            if entry.name in arrays:
                _refuse(where, "every name once", f"{_shown(entry.name)} twice", _FOREIGN)
            arrays[entry.name] = _from_wire(entry, body, where)
            end = entry.end
    if end != len(body):
        _refuse("packed buffer, body", f"{end} bytes, where its last array ends", f"{len(body)} bytes", _FOREIGN)
    return Packed(manifest["kind"], manifest["header"], streams)


class _Layout(NamedTuple):
    """What a buffer is going to hold: its arrays by stream, their elements in the same order, and its bytes."""

    entries: dict[str, list[_Entry]]
    elements: list[np.ndarray]
    body_bytes: int


def _encode(
    kind: str, header: Mapping[str, Any], streams: Mapping[str, Mapping[str, np.ndarray]], float_dtype: str
) -> tuple[bytes, _Layout]:
    if float_dtype not in _FLOAT_WIRES:
        raise ConfigError(f"float_dtype: expected one of {', '.join(_FLOAT_WIRES)}, found {float_dtype!r}; choose one")
    layout = _lay_out(streams, float_dtype)
    manifest = _encode_manifest(kind, header, layout.entries)
    head_bytes = _PREFIX.size + len(manifest)
    buffer, memory = new_bytes(head_bytes + layout.body_bytes)
    memory[_PREFIX.size : head_bytes] = manifest
    checksum = xxhash.xxh3_128(manifest)
    _write_body(layout, memory[head_bytes:], checksum)
    _PREFIX.pack_into(memory, 0, _MAGIC, _VERSION, len(manifest), layout.body_bytes, checksum.digest())
    return buffer, layout


def _lay_out(streams: Mapping[str, Mapping[str, np.ndarray]], float_dtype: str) -> _Layout:
    """Gives every array its place."""
    layout: dict[str, list[_Entry]] = {}
    elements: list[np.ndarray] = []
    end = 0
    for stream, arrays in streams.items():
        _check_name(stream, "a stream's name")
        entries = layout[stream] = []
        for name, array in arrays.items():
            if type(name) is not str:
                _check_name(name, f"the name of an array in stream {stream!r}")
            dtype, wire, values = _to_wire(array, float_dtype, stream, name)
            elements.append(values)
            start = _aligned(end)
            end = start + array.size * _WIRES[wire].itemsize
            entries.append(_Entry(name, dtype, wire, array.shape, start, end))
    return _Layout(layout, elements, end)


def _write_body(layout: _Layout, body: memoryview, checksum: xxhash.xxh3_128) -> None:
    """Writes every array to its place and the gaps between, and adds all of it to the checksum while it is at hand."""
    end = 0
    for entry, values in zip(itertools.chain.from_iterable(layout.entries.values()), layout.elements, strict=True):
        body[end : entry.offset] = _ZEROS[: entry.offset - end]
        np.ndarray(entry.shape, _WIRES[entry.wire], body, entry.offset)[...] = values
        checksum.update(body[end : entry.end])
        end = entry.end


def _to_wire(array: np.ndarray, float_dtype: str, stream: str, name: str) -> tuple[str, str, np.ndarray]:
    """Gives dtype, wire and the elements, in any order of bytes and memory: `array` itself but for a 16-bit float."""
    if type(array) is np.ndarray and array.dtype is _PLAIN and float_dtype == "float32":  # nearly all
        return "float32", "float32", array
    dtype = _NAMES.get((array.dtype.kind, array.dtype.itemsize)) if isinstance(array, np.ndarray) else None
    if dtype is None:
        _refuse_array(array, f"stream {stream!r}, array {name!r}")
    wire = float_dtype if dtype == "float32" else dtype
    if wire in _INFINITY_BITS:
        flat = np.ascontiguousarray(array, dtype=_PLAIN).reshape(-1)
        return dtype, wire, _narrow(flat, wire, f"stream {stream!r}, array {name!r}").reshape(array.shape)
    return dtype, wire, array


def _refuse_array(array: Any, where: str) -> NoReturn:
    if not isinstance(array, np.ndarray):
        _refuse(where, "a numpy array", type(array).__name__, "convert it first")
    _refuse(where, f"dtype {', '.join(_DTYPES)} or float16", str(array.dtype), "convert it first")


def _narrow(values: np.ndarray, wire: str, where: str) -> np.ndarray:
    """Rounds float32 values to a 16-bit float; refuses a finite value that would become infinite."""
    with np.errstate(all="ignore"):
        narrow = values.astype("<f2") if wire == "float16" else _bfloat16_bits(values)
    infinite = (narrow.view("<u2") & 0x7FFF) == _INFINITY_BITS[wire]
    if infinite.any():
        overflowing = values[infinite & np.isfinite(values)]
        if overflowing.size:
            found = f"{overflowing.size} outside it, the first {overflowing[0]:g}"
            remedy = "bfloat16 or float32" if wire == "float16" else "float32"
            _refuse(where, f"finite values within the range of {wire}", found, f"send it as {remedy}")
    return narrow


def _bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Gives the bfloat16 bits of flat float32 values, rounded to nearest even; NaN stays NaN, quiet, with its sign."""
    bits = values.view("<u4")
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = bits[nan] >> 16 | 0x40
    return rounded.astype("<u2")


def _from_wire(entry: _Entry, body: memoryview, where: str) -> np.ndarray:
    """Views the array's elements in the body; only a 16-bit float is copied, into float32."""
    array = np.ndarray(entry.shape, _WIRES[entry.wire], body, entry.offset)
    if entry.wire in _READ_OVER:
        array = _read_over(array, entry, where)
    elif body.readonly:  # and so is the array
        return array
    array.flags.writeable = False
    return array


def _read_over(array: np.ndarray, entry: _Entry, where: str) -> np.ndarray:
    """A bool array that is checked, or the float32 values of a 16-bit float."""
    if entry.wire == "bool" and array.view(np.uint8).max(initial=0) > 1:
        _refuse(f"{where}, array {_shown(entry.name)}", "bool bytes of 0 or 1", "others", _FOREIGN)
    if entry.wire == "float16":
        array = array.astype("<f4")
    elif entry.wire == "bfloat16":
        bits = array.astype("<u4")
        bits <<= 16
        array = bits.view("<f4")
    return array


def _encode_manifest(kind: str, header: Mapping[str, Any], entries: Mapping[str, list[_Entry]]) -> bytes:
    _check_name(kind, "kind")
    plain = dict(header)
    try:
        text = _compact(plain)
        unchanged = json.loads(text) == plain
    except (TypeError, ValueError, RecursionError) as error:
        _refuse("header", "JSON values", str(error), "convert it first")
    if not unchanged:
        found = "values that JSON changes, such as tuples or keys that are not strings"
        _refuse("header", "JSON values", found, "make them lists and strings")
    members = (
        f"{_compact(stream)}:[{','.join([_described(item) for item in items])}]" for stream, items in entries.items()
    )
    manifest = f'{{"kind":{_compact(kind)},"header":{text},"streams":{{{",".join(members)}}}}}'.encode("ascii")
    manifest += b" " * (_aligned(_PREFIX.size + len(manifest)) - _PREFIX.size - len(manifest))
    if len(manifest) > _MAX_MANIFEST_BYTES:
        _refuse("manifest", f"at most {_MAX_MANIFEST_BYTES} bytes", f"{len(manifest)}", "send large values as arrays")
    return manifest


def _described(entry: _Entry) -> str:
    """One array of the manifest as JSON."""
    return f"{_head(*entry[:4])}{entry.offset}}}"


@lru_cache(maxsize=8192)
def _head(name: str, dtype: str, wire: str, shape: tuple[int, ...]) -> str:
    """An array's description up to its offset, kept: the subnets of a space have many arrays alike."""
    fields = {"name": name, "dtype": dtype, "wire": wire, "shape": shape, "offset": 0}
    return _compact(fields).removesuffix("0}")


def _compact(value: Any) -> str:
    return _ENCODER.encode(value)


def _check_prefix(view: memoryview) -> int:
    """Checks magic, version, lengths and checksum; gives the manifest's length in bytes."""
    where = "packed buffer"
    if view.format != "B" or view.ndim != 1 or not view.c_contiguous:
        _refuse(where, "contiguous bytes", f"{view.ndim} dimensions of format {view.format!r}", "pass bytes(buffer)")
    if len(view) < _PREFIX.size:
        _refuse(where, f"a prefix of {_PREFIX.size} bytes", f"{len(view)} bytes in all", _DAMAGED)
    magic, version, manifest_bytes, body_bytes, checksum = _PREFIX.unpack_from(view)
    if magic != _MAGIC:
        _refuse(where, f"{_MAGIC!r} at its start", repr(magic), "check that it is a packed buffer; if so, " + _DAMAGED)
    if version != _VERSION:
        _refuse(where, f"format version {_VERSION}", str(version), "run the same release of fedofa on both ends")
    if manifest_bytes > _MAX_MANIFEST_BYTES:
        _refuse(where, f"a manifest of at most {_MAX_MANIFEST_BYTES} bytes", str(manifest_bytes), _DAMAGED)
    if (_PREFIX.size + manifest_bytes) % _ALIGNMENT_BYTES:
        found = f"at byte {_PREFIX.size + manifest_bytes}"
        _refuse(where, f"its body at a multiple of {_ALIGNMENT_BYTES} bytes", found, _DAMAGED)
    expected_bytes = _PREFIX.size + manifest_bytes + body_bytes
    if len(view) != expected_bytes:
        state = "truncated" if len(view) < expected_bytes else "trailing bytes"
        _refuse(where, f"{expected_bytes} bytes, as its prefix says", f"{len(view)} ({state})", _DAMAGED)
    actual = xxhash.xxh3_128_digest(view[_PREFIX.size :])
    if actual != checksum:
        _refuse(where, f"checksum {checksum.hex()}, as its prefix says", actual.hex(), _DAMAGED)
    return manifest_bytes


def _decode_manifest(text: memoryview) -> dict[str, Any]:
    """Parses the manifest and checks its outermost members."""
    where = "packed buffer, manifest"
    try:
        manifest = _parse_json(str(text, "ascii"))
    except (ValueError, RecursionError) as error:
        _refuse(where, "ASCII JSON without NaN, infinities or repeated keys", str(error)[:200], _FOREIGN)
    _check_members(manifest, {"kind": str, "header": dict, "streams": dict}, where)
    return manifest


def _check_entry(fields: Any, start: int, body_bytes: int, where: str) -> _Entry:
    """Checks one array of the manifest; `start` is where in the body it has to begin."""
    _check_members(fields, {"name": str, "dtype": str, "wire": str, "shape": list, "offset": int}, where)
    dtype, wire, shape, offset = fields["dtype"], fields["wire"], fields["shape"], fields["offset"]
    if wire not in _WIRES_OF.get(dtype, ()):
        _refuse(where, "a dtype and wire of this format", f"{_shown(dtype)} and {_shown(wire)}", _FOREIGN)
    if len(shape) > _MAX_DIMENSIONS or not all(type(length) is int and length >= 0 for length in shape):
        _refuse(where, f"a shape of at most {_MAX_DIMENSIONS} non-negative integers", _shown(shape), _FOREIGN)
    if math.prod(filter(None, shape)) * _WIDEST_ITEM_BYTES > sys.maxsize:
        _refuse(where, "a shape that can be addressed", _shown(shape), _FOREIGN)
    if offset != start:
        _refuse(where, f"offset {start}, after the array before it", _shown(offset), _FOREIGN)
    end = offset + math.prod(shape) * _WIRES[wire].itemsize
    if end > body_bytes:
        _refuse(where, f"its end within the body's {body_bytes} bytes", f"its end at byte {end}", _FOREIGN)
    return _Entry(fields["name"], dtype, wire, tuple(shape), offset, end)


def _check_members(value: Any, types: dict[str, type], where: str) -> None:
    """Checks that `value` is a JSON object with exactly these members, of these types."""
    if type(value) is not dict:
        _refuse(where, "an object", _shown(value), _FOREIGN)
    if value.keys() != types.keys():
        _refuse(where, f"the members {', '.join(types)}", _shown(list(value)), _FOREIGN)
    for member, expected in types.items():
        if type(value[member]) is not expected:
            _refuse(f"{where}, {member}", expected.__name__, _shown(value[member]), _FOREIGN)


def _check_name(name: Any, where: str) -> None:
    if not isinstance(name, str):
        _refuse(where, "a string", repr(name), "convert it first")


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique_members, parse_float=_finite_float, parse_constant=_finite_float)


def _unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("an object has the same key twice")
    return members


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"a number is not finite: {text[:40]}")
    return value


def _aligned(position: int) -> int:
    """Gives the first multiple of the alignment that is not below `position`, in bytes."""
    return -(-position // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _shown(value: Any) -> str:
    """Shows a foreign value in a message, of bounded length."""
    shortener = reprlib.Repr()
    shortener.maxstring = 120
    return shortener.repr(value)


def _refuse(where: str, expected: str, found: str, action: str) -> NoReturn:
    raise WireError(f"{where}: expected {expected}, found {found}; {action}")
