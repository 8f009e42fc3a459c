"""What the codec keeps, and what it refuses."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

from flowpolicy.serving.messages import MAX_DEPTH, MessageError, decode, encode

DTYPES = ["?", "i1", "u1", "<i2", ">i4", "u8", "<f2", "<f4", ">f8"]


def array(**changes):
    parts = {"__ndarray__": True, "data": b"\0" * 24, "dtype": "<f4", "shape": [2, 3]}
    return msgpack.packb(
        {key.encode(): value for key, value in (parts | changes).items() if value is not ...}
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)])
def test_an_array_comes_back_with_its_values_and_is_ones_own(dtype, shape):
    rng = np.random.default_rng(0)
    given = np.asarray(100 * rng.random(shape)).astype(dtype)
    found = decode(encode({"x": given}))["x"]
    assert found.dtype == np.dtype(dtype).newbyteorder("=")
    assert found.shape == shape
    np.testing.assert_array_equal(found, given)
    assert found.flags.writeable
    assert found.flags.owndata or found.base.flags.owndata
    found[...] = 1


def test_a_tree_comes_back():
    tree = {"a": [1, 2.5, None, True, "é", b"\x00"], "b": {"c": {"d": -(2**40)}}, "e": []}
    assert decode(encode(tree)) == tree


@pytest.mark.parametrize("value", [np.float32(1.5), np.int64(-7), np.bool_(True), np.uint8(255)])
def test_a_numpy_scalar_keeps_its_dtype(value):
    found = decode(encode({"x": value}))["x"]
    assert found == value
    assert found.dtype == value.dtype


def test_a_non_contiguous_array_is_written_in_order():
    given = np.arange(12.0).reshape(3, 4).T[::2]
    np.testing.assert_array_equal(decode(encode(given)), given)


def test_openpi_reads_ours_and_we_read_openpis():
    theirs = pytest.importorskip("openpi_client.msgpack_numpy", reason="openpi-client is not installed")
    message = {"observation": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.int32(4), "s": "x"}
    for found in (decode(theirs.packb(message)), theirs.unpackb(encode(message))):
        assert found.keys() == message.keys()
        np.testing.assert_array_equal(found["observation"], message["observation"])
        assert found["n"] == 4
        assert found["n"].dtype == np.int32


@pytest.mark.parametrize(
    "dtype",
    ["O", "|O", "V8", "c8", "<c16", "S4", "<U3", "<M8[s]", "f16", "f4,f4", "(9999,)f4", "b2", "x", 7, None],
)
def test_a_dtype_that_no_policy_needs_is_refused(dtype):
    with pytest.raises(MessageError, match="dtype"):
        decode(array(dtype=dtype))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": b"\0" * 23}, "23 bytes"),
        ({"data": b"\0" * 25}, "25 bytes"),
        ({"data": "text"}, "lacks its data"),
        ({"data": ...}, "lacks its data"),
        ({"extra": 1}, "more than these"),
        ({"shape": [2, -3]}, "list of sizes"),
        ({"shape": [2, True]}, "list of sizes"),
        ({"shape": [2.0, 3]}, "list of sizes"),
        ({"shape": 6}, "list of sizes"),
        ({"shape": [2**62, 2**62]}, "absurd"),
        ({"shape": [0, 2**40], "data": b""}, "absurd"),
        ({"shape": [1] * 9 + [6]}, "absurd"),
    ],
)
def test_an_array_of_a_wrong_size_is_refused(changes, words):
    with pytest.raises(MessageError, match=words):
        decode(array(**changes))


def test_a_boolean_array_holds_nothing_but_booleans():
    found = decode(array(data=bytes(range(6)), dtype="|b1"))
    assert found.view(np.uint8).max() == 1
    np.testing.assert_array_equal(found.ravel(), [False, True, True, True, True, True])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "msgpack"),
        (b"\xc1", "msgpack"),
        (encode({"a": 1})[:-1], "msgpack"),
        (encode({"a": 1}) + b"\0", "msgpack"),
        (b"\x91" * 100_000, "msgpack"),
        (b"\xdd\xff\xff\xff\xff", "msgpack"),
        (b"\xdf\xff\xff\xff\xff", "msgpack"),
        (msgpack.packb(msgpack.ExtType(5, b"abc")), "msgpack"),
        (msgpack.packb(msgpack.Timestamp(1)), "extension|msgpack"),
        (b"\x82\xa1a\x01\xa1a\x02", "twice"),
        (b"\x81\x01\x02", "msgpack"),
        (msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}), "does not fit"),
        (msgpack.packb({b"__npgeneric__": True, b"data": [1], b"dtype": "<f4"}), "is none"),
    ],
)  # fmt: skip
def test_what_is_no_message_is_refused_in_one_sentence(data, words):
    with pytest.raises(MessageError, match=words) as refused:
        decode(data)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


def test_nesting_is_limited():
    def nested(depth):
        return 0 if depth == 0 else [nested(depth - 1)]

    assert decode(encode(nested(MAX_DEPTH))) == nested(MAX_DEPTH)
    with pytest.raises(MessageError, match="nested"):
        decode(encode(nested(MAX_DEPTH + 1)))


def test_many_small_lists_are_refused_before_they_fill_the_memory():
    inner = [[]] * 500
    with pytest.raises(MessageError, match="lists and maps"):
        decode(msgpack.packb([inner] * 500))


@pytest.mark.parametrize(
    "value", [np.array([object()]), np.array([1 + 2j]), np.array(["a"]), np.zeros(2, "f4,f4"), {1, 2}, 2**70]
)
def test_what_cannot_be_sent_is_refused(value):
    with pytest.raises(MessageError):
        encode({"x": value})


def test_broken_messages_are_refused_and_never_anything_else():
    rng = np.random.default_rng(1)
    valid = encode({"observation": np.ones((2, 3), np.float32), "k": [1, {"a": np.float64(2)}], "t": "text"})
    refused = 0
    for _ in range(3000):
        data = bytearray(valid)
        for position in rng.integers(0, len(data), rng.integers(1, 4)):
            data[position] = rng.integers(0, 256)
        if rng.random() < 0.3:
            del data[rng.integers(0, len(data)) :]
        try:
            decode(bytes(data))
        except MessageError:
            refused += 1
    assert refused > 1000
