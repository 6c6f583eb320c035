"""The wire codec: round trips, refusals of damaged and of hostile buffers, and no copy where none is needed."""

import json
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedofa.types.errors import ConfigError, WireError
from fedofa.update.codec import decode_packed, encode_and_view, encode_packed

EXACT_DTYPES = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float64"]
FLOAT_DTYPES = ["float32", "float16", "bfloat16"]
PREFIX_BYTES = 40


def one(array: np.ndarray, float_dtype: str = "float32") -> np.ndarray:
    """Sends one array and gives what arrives."""
    buffer = encode_packed("delta", {}, {"weights": {"a": array}}, float_dtype=float_dtype)
    return decode_packed(buffer, kind="delta").streams["weights"]["a"]


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    return hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


def forge(manifest: Any, body: bytes = b"", version: int = 1) -> bytes:
    """Packs any manifest, by the layout's description, with a checksum that is right."""
    text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    text += b" " * (-(PREFIX_BYTES + len(text)) % 64)
    checksum = xxhash.xxh3_128_digest(text + body)
    return struct.pack("<8sIIQ", b"\x89FDOFA\r\n", version, len(text), len(body)) + checksum + text + body


def entry(**changes: Any) -> dict[str, Any]:
    return {"name": "a", "dtype": "float32", "wire": "float32", "shape": [16], "offset": 0} | changes


def listing(*entries: Any) -> dict[str, Any]:
    return {"kind": "delta", "header": {}, "streams": {"weights": list(entries)}}


def small_buffer() -> bytes:
    weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float16)}
    return encode_packed("delta", {"round": 3}, {"weights": weights, "statistics": {"count": np.array(7)}})


# Round trips


@given(st.sampled_from(EXACT_DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, shapes())), st.sampled_from(FLOAT_DTYPES))
def test_other_dtypes_pass_unchanged_whatever_the_float_dtype(array: np.ndarray, float_dtype: str):
    received = one(array, float_dtype)
    assert received.dtype == array.dtype
    assert received.shape == array.shape
    assert received.tobytes() == array.tobytes()


@given(hnp.arrays(np.float32, shapes()))
def test_float32_is_exact(array: np.ndarray):
    received = one(array)
    assert received.dtype == np.float32
    assert received.shape == array.shape
    assert received.tobytes() == array.tobytes()


@given(hnp.arrays(np.float16, shapes()), st.sampled_from(["float32", "float16"]))
def test_float16_arrives_as_float32_with_its_values(array: np.ndarray, float_dtype: str):
    received = one(array, float_dtype)
    assert received.dtype == np.float32
    np.testing.assert_array_equal(received, array.astype(np.float32), strict=True)


@pytest.mark.parametrize(
    ("float_dtype", "relative", "smallest_step"), [("float16", 2.0**-11, 2.0**-24), ("bfloat16", 2.0**-8, 2.0**-133)]
)
@given(array=hnp.arrays(np.float32, shapes(), elements=st.floats(-65504, 65504, width=32)))
def test_16_bit_floats_round_to_nearest(array: np.ndarray, float_dtype: str, relative: float, smallest_step: float):
    received = one(array, float_dtype)
    assert received.dtype == np.float32
    assert received.shape == array.shape
    error = np.abs(received.astype(np.float64) - array.astype(np.float64))
    assert np.all(error <= np.maximum(relative * np.abs(array.astype(np.float64)), smallest_step / 2))


@given(hnp.arrays(np.uint32, st.integers(0, 50)))
def test_bfloat16_equals_torch_bit_for_bit(bits: np.ndarray):
    values = bits.view(np.float32)
    expected = torch.from_numpy(values.copy()).bfloat16().float().numpy()
    kept = np.isfinite(expected) | ~np.isfinite(values)
    received = one(values[kept], "bfloat16")
    nan = np.isnan(values[kept])
    assert np.array_equal(np.isnan(received), nan)
    assert received[~nan].tobytes() == expected[kept][~nan].tobytes()


def test_bfloat16_equals_torch_for_every_upper_half_and_every_tie():
    upper = np.arange(2**16, dtype=np.uint32) << 16
    values = (upper[:, None] + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).view(np.float32)
    expected = torch.from_numpy(values.copy()).bfloat16().float().numpy()
    kept = ~np.isnan(values) & (np.isfinite(expected) | np.isinf(values))
    assert kept.sum() > 0.99 * 6 * (2**16 - 2 * 2**7)
    assert one(values[kept], "bfloat16").tobytes() == expected[kept].tobytes()


def test_bfloat16_keeps_nan_and_its_sign_whichever_bits_it_has():
    bits = np.array([0x7F800001, 0x7FFFFFFF, 0x7FC00000, 0xFF800001, 0xFFFFFFFF], np.uint32)
    received = one(bits.view(np.float32), "bfloat16")
    assert np.isnan(received).all()
    assert np.signbit(received).tolist() == [False, False, False, True, True]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("float_dtype", FLOAT_DTYPES)
def test_infinities_and_nan_pass_without_a_warning(float_dtype: str):
    array = np.array([np.inf, -np.inf, np.nan, 1e-45, 0.0], np.float32)
    received = one(array, float_dtype)
    np.testing.assert_array_equal(received[:3], array[:3])


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float32).reshape(3, 4).T,
        np.arange(12, dtype=np.int64)[::-3],
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(6, dtype=">f4"),
        np.arange(6, dtype=">i8"),
        np.broadcast_to(np.float32(2), (2, 3)),
    ],
    ids=["transposed", "strided", "fortran", "big-endian float", "big-endian int", "broadcast"],
)
def test_any_memory_layout_arrives_in_c_order_and_little_endian(array: np.ndarray):
    received = one(array)
    np.testing.assert_array_equal(received, array)
    assert received.flags.c_contiguous
    assert received.dtype == array.dtype.newbyteorder("<")


def test_kind_header_streams_and_their_order_survive():
    header = {"round": 3, "client": "kitchen-é", "nested": {"rates": [0.1, 1e-300, None, True]}, "": 2**70}
    streams = {"weights": {"z": np.zeros(2), "a": np.ones(1)}, "statistics": {}, "control": {"z": np.zeros(0)}}
    packed = decode_packed(encode_packed("payload", header, streams), kind="payload")
    assert packed.kind == "payload"
    assert packed.header == header
    assert {name: list(arrays) for name, arrays in packed.streams.items()} == {
        "weights": ["z", "a"],
        "statistics": [],
        "control": ["z"],
    }


@pytest.mark.parametrize("float_dtype", ["float32", "float16", "bfloat16"])
def test_what_the_sender_views_is_what_decoding_gives(float_dtype):
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(4, 6)).astype(np.float32)
    streams = {
        "weights": {"a": wide[:, :5], "b": wide.T, "scalar": np.array(2.5, np.float32), "none": np.zeros((0, 3))},
        "counts": {"n": np.arange(7), "flag": np.array([True, False])},
    }
    buffer, viewed = encode_and_view("payload", {"round": 1}, streams, float_dtype=float_dtype)
    assert buffer == encode_packed("payload", {"round": 1}, streams, float_dtype=float_dtype)
    decoded = decode_packed(buffer, kind="payload")
    assert (viewed.kind, viewed.header) == (decoded.kind, decoded.header)
    assert {name: list(arrays) for name, arrays in viewed.streams.items()} == {
        name: list(arrays) for name, arrays in decoded.streams.items()
    }
    for stream, arrays in decoded.streams.items():
        for name, array in arrays.items():
            found = viewed.streams[stream][name]
            assert found.dtype == array.dtype and not found.flags.writeable
            np.testing.assert_array_equal(found, array, strict=True)
    whole = np.frombuffer(buffer, np.uint8)
    assert np.shares_memory(viewed.streams["counts"]["n"], whole)
    assert np.shares_memory(viewed.streams["weights"]["a"], whole) == (float_dtype == "float32")


def test_the_layout_is_as_documented():
    body = np.array([1.5, -2], "<f4").tobytes() + bytes(56) + np.array([7], "<i8").tobytes()
    count = entry(name="n", dtype="int64", wire="int64", shape=[], offset=64)
    manifest = listing(entry(shape=[2]), count)
    packed = decode_packed(forge(manifest, body), kind="delta")
    assert packed.streams["weights"]["a"].tolist() == [1.5, -2]
    assert packed.streams["weights"]["n"] == 7
    arrays = {"a": np.array([1.5, -2], np.float32), "n": np.array(7)}
    assert encode_packed("delta", {}, {"weights": arrays}) == forge(
        json.dumps(manifest, separators=(",", ":")).encode(), body
    )


# No copy


@pytest.mark.parametrize("carrier", [bytes, bytearray, memoryview])
def test_decoding_views_the_buffer_and_is_read_only(carrier: Any):
    streams = {"weights": {"f": np.ones((3, 5), np.float32)}, "statistics": {"n": np.arange(9), "s": np.ones(4)}}
    buffer = carrier(encode_packed("delta", {}, streams))
    packed = decode_packed(buffer, kind="delta")
    for array in (array for arrays in packed.streams.values() for array in arrays.values()):
        assert np.shares_memory(array, np.frombuffer(buffer, np.uint8))
        assert not array.flags.writeable


@pytest.mark.parametrize("float_dtype", FLOAT_DTYPES)
def test_arrays_keep_the_buffer_alive_and_are_read_only(float_dtype: str):
    received = one(np.arange(1000, dtype=np.float32) % 256, float_dtype)
    assert not received.flags.writeable
    np.testing.assert_array_equal(received, np.arange(1000) % 256)


def test_the_codec_imports_no_torch():
    script = "import sys, fedofa.update.codec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0


# What the encoder refuses


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("float_dtype", "value", "remedy"), [("float16", 65520.0, "bfloat16 or float32"), ("bfloat16", 3.4e38, "float32")]
)
def test_a_finite_value_that_would_become_infinite_is_refused(float_dtype: str, value: float, remedy: str):
    array = np.array([np.inf, -value, 1], np.float32)
    with pytest.raises(WireError, match=rf"stream 'weights', array 'a'.*{float_dtype}, found 1 .*as {remedy}$"):
        one(array, float_dtype)


def test_the_largest_values_that_round_into_range_pass():
    assert one(np.array([65519.0], np.float32), "float16") == 65504
    largest = np.array([0x7F7F7FFF], np.uint32).view(np.float32)
    assert one(largest, "bfloat16") == np.array([0x7F7F0000], np.uint32).view(np.float32)


@pytest.mark.parametrize(
    "header",
    [
        {"a": float("nan")},
        {"a": [float("inf")]},
        {"a": (1, 2)},
        {1: "a"},
        {"a": {2: 3}},
        {"a": np.int64(1)},
        {"a": b""},
    ],
    ids=["nan", "infinity", "tuple", "integer key", "nested integer key", "numpy scalar", "bytes"],
)
def test_a_header_that_json_cannot_hold_is_refused(header: Any):
    with pytest.raises(WireError, match="header: expected JSON values"):
        encode_packed("delta", header, {})


@pytest.mark.parametrize(
    "value",
    [
        np.array(["a"]),
        np.array(["a"], np.dtypes.StringDType()),
        np.array(["2026"], "M8[s]"),
        np.array([None]),
        np.ones(2, complex),
        np.zeros(2, "i4,f4"),
        [1.0],
        np.float32(1),
    ],
)
def test_a_value_of_another_type_is_refused_with_its_stream_and_name(value: Any):
    with pytest.raises(WireError, match="stream 'weights', array 'a': expected"):
        encode_packed("delta", {}, {"weights": {"a": value}})


def test_names_that_are_not_strings_are_refused():
    for kind, streams in [("delta", {1: {}}), ("delta", {"weights": {2: np.ones(1)}}), (3, {})]:
        with pytest.raises(WireError, match="expected a string"):
            encode_packed(kind, {}, streams)  # pyright: ignore[reportArgumentType]


def test_a_manifest_beyond_its_bound_is_refused():
    with pytest.raises(WireError, match="at most 16777216 bytes"):
        encode_packed("delta", {"text": "x" * 2**24}, {})


def test_an_unknown_float_dtype_is_refused():
    with pytest.raises(ConfigError, match="float32, float16, bfloat16, found 'float8'"):
        encode_packed("delta", {}, {}, float_dtype="float8")


# What the decoder refuses: damage


def test_a_flip_of_any_bit_is_refused():
    good = small_buffer()
    for position in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[position] ^= 1 << bit
            with pytest.raises(WireError):
                decode_packed(bad, kind="delta")


def test_truncation_at_every_byte_is_refused():
    good = small_buffer()
    for length in range(len(good)):
        with pytest.raises(WireError, match=r"expected .*, found .*ask the sender for it again"):
            decode_packed(good[:length], kind="delta")


def test_trailing_bytes_are_refused():
    with pytest.raises(WireError, match=r"\(trailing bytes\)"):
        decode_packed(small_buffer() + b"\0", kind="delta")


def test_another_kind_is_refused():
    with pytest.raises(WireError, match="expected kind 'payload', found 'delta'"):
        decode_packed(small_buffer(), kind="payload")


def test_another_version_is_refused():
    with pytest.raises(WireError, match="expected format version 1, found 2"):
        decode_packed(forge(listing(), version=2), kind="delta")


@pytest.mark.parametrize(
    "view",
    [memoryview(bytes(640))[::2], memoryview(bytes(640)).cast("f"), memoryview(bytes(640)).cast("B", (40, 16))],
    ids=["strided", "of floats", "of two dimensions"],
)
def test_a_view_that_is_not_contiguous_bytes_is_refused(view: memoryview):
    with pytest.raises(WireError, match="expected contiguous bytes"):
        decode_packed(view, kind="delta")


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes):
    with pytest.raises(WireError):
        decode_packed(noise, kind="delta")


# What the decoder refuses: manifests that lie, with a checksum that is right

HOSTILE_ENTRIES: dict[str, list[Any]] = {
    "not an object": [3],
    "member missing": [{key: value for key, value in entry().items() if key != "offset"}],
    "member too many": [entry(strides=[4])],
    "name not a string": [entry(name=1)],
    "name twice": [entry(), entry(shape=[0], offset=64)],
    "dtype unknown": [entry(dtype="object", wire="object", shape=[8])],
    "dtype of numpy's but not ours": [entry(dtype="S8", wire="S8", shape=[8])],
    "dtype not a string": [entry(dtype=["float32"], wire="float32")],
    "dtype of the wire only": [entry(dtype="float16", wire="float16", shape=[32])],
    "wire unknown": [entry(wire="float8")],
    "wire of another dtype": [entry(dtype="int32", wire="float32")],
    "float64 narrowed": [entry(dtype="float64", wire="float16", shape=[32])],
    "shape not a list": [entry(shape=16)],
    "length negative": [entry(shape=[-16])],
    "lengths negative, product positive": [entry(shape=[-4, -4])],
    "length a bool": [entry(shape=[True, 16])],
    "length a float": [entry(shape=[16.0])],
    "length null": [entry(shape=[None])],
    "too many dimensions": [entry(shape=[1] * 64 + [16])],
    "size that wraps around 64 bits": [entry(shape=[2**32, 2**32])],
    "size of a thousand digits": [entry(shape=[10**1000])],
    "empty array of impossible lengths": [entry(shape=[0, 2**40, 2**40])],
    "end beyond the body": [entry(shape=[17])],
    "much memory": [entry(wire="float16", shape=[2**40])],
    "offset negative": [entry(shape=[32], offset=-64)],
    "offset beyond the body": [entry(offset=2**63)],
    "offset a float": [entry(offset=0.0)],
    "offset a bool": [entry(offset=False)],
    "offset unaligned": [entry(shape=[15], offset=4)],
    "gap": [entry(shape=[0], offset=64)],
    "overlap": [entry(), entry(name="b", offset=0)],
    "overlap of an empty array": [entry(), entry(name="b", shape=[0], offset=0)],
    "body beyond its last array": [entry(shape=[15])],
    "no array for a body": [],
    "bool byte of 2": [entry(dtype="bool", wire="bool", shape=[64])],
}


@pytest.mark.parametrize("entries", HOSTILE_ENTRIES.values(), ids=HOSTILE_ENTRIES.keys())
def test_an_array_that_lies_is_refused(entries: list[Any]):
    body = b"\x02" * 64
    honest = [entry(dtype="uint8", wire="uint8", shape=[64])]
    assert decode_packed(forge(listing(*honest), body), kind="delta").streams["weights"]["a"].tobytes() == body
    with pytest.raises(WireError, match="packed buffer") as refusal:
        decode_packed(forge(listing(*entries), body), kind="delta")
    assert len(str(refusal.value)) < 600


HOSTILE_MANIFESTS: dict[str, Any] = {
    "empty": b"",
    "not JSON": b"{",
    "not ASCII": b'{"kind":"delta","header":{"\xc3\xa9":1},"streams":{}}',
    "not an object": [],
    "member missing": {"kind": "delta", "header": {}},
    "member too many": {"kind": "delta", "header": {}, "streams": {}, "more": 1},
    "kind not a string": {"kind": 1, "header": {}, "streams": {}},
    "kind very long": {"kind": "x" * 10**6, "header": {}, "streams": {}},
    "header not an object": {"kind": "delta", "header": [], "streams": {}},
    "streams not an object": {"kind": "delta", "header": {}, "streams": []},
    "stream not a list": {"kind": "delta", "header": {}, "streams": {"weights": {}}},
    "member twice": b'{"kind":"payload","kind":"delta","header":{},"streams":{}}',
    "stream twice": b'{"kind":"delta","header":{},"streams":{"weights":[],"weights":[]}}',
    "key of the header twice": b'{"kind":"delta","header":{"a":1,"a":2},"streams":{}}',
    "NaN": b'{"kind":"delta","header":{"a":NaN},"streams":{}}',
    "infinity": b'{"kind":"delta","header":{"a":-Infinity},"streams":{}}',
    "infinity by its exponent": b'{"kind":"delta","header":{"a":1e999},"streams":{}}',
    "integer too long to parse": b'{"kind":"delta","header":{"a":' + b"1" * 5000 + b'},"streams":{}}',
    "nested too deep": b'{"kind":"delta","header":{"a":' + b"[" * 10**6 + b"]" * 10**6 + b'},"streams":{}}',
}


@pytest.mark.parametrize("manifest", HOSTILE_MANIFESTS.values(), ids=HOSTILE_MANIFESTS.keys())
def test_a_manifest_that_is_not_one_is_refused(manifest: Any):
    with pytest.raises(WireError, match="packed buffer") as refusal:
        decode_packed(forge(manifest), kind="delta")
    assert len(str(refusal.value)) < 600


def test_a_manifest_length_beyond_its_bound_is_refused_before_anything_is_read():
    prefix = struct.pack("<8sIIQ16s", b"\x89FDOFA\r\n", 1, 2**24 + 24, 0, bytes(16))
    with pytest.raises(WireError, match="a manifest of at most 16777216 bytes, found 16777240"):
        decode_packed(prefix, kind="delta")


def test_an_unaligned_body_is_refused():
    text = json.dumps(listing()).encode()
    text += b" " * (1 - (PREFIX_BYTES + len(text)) % 2)
    prefix = struct.pack("<8sIIQ", b"\x89FDOFA\r\n", 1, len(text), 0) + xxhash.xxh3_128_digest(text)
    with pytest.raises(WireError, match="its body at a multiple of 64 bytes"):
        decode_packed(prefix + text, kind="delta")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300)
@given(st.sampled_from(list(entry())), JSON_VALUES, st.binary(max_size=80))
def test_any_change_of_an_array_is_refused_or_reads_the_body_only(member: str, value: Any, body: bytes):
    try:
        packed = decode_packed(forge(listing(entry(**{member: value})), body), kind="delta")
    except WireError:
        return
    (array,) = packed.streams["weights"].values()
    assert array.nbytes <= 2 * len(body)
