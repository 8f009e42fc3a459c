"""Messages of the policy server: msgpack that may hold numpy arrays, as openpi's client writes them.

An array is a map with the binary keys ``__ndarray__``, ``data``, ``dtype`` and ``shape``, a numpy scalar one
with ``__npgeneric__``, ``data`` and ``dtype``. The layout of the package msgpack-numpy (``nd``, ``type``,
``kind``, ``shape``, ``data``, as binary or text) is read too. A message comes from anyone who can reach the
port, so decoding it runs no code of the sender's, refuses what no policy needs, and cannot be made to use
much more memory than the message has bytes.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from flowpolicy.errors import FlowPolicyError

MAX_DEPTH = 8
MAX_CONTAINERS = 512
MAX_ITEMS = 512
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**31
"""Of an array, counting an empty dimension as one."""

_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"
_ELSEWHERE = (b"nd", "nd")  # msgpack-numpy's mark: true of an array, false of a scalar
_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
"""No objects, structures, strings, dates, complex numbers."""


class MessageError(FlowPolicyError):
    """Bytes that are no message of this protocol."""


def encode(message: Any) -> bytes:
    """A tree of dictionaries, lists, numbers, strings, bytes and numpy arrays as msgpack.

    Raises:
        MessageError: it holds something else, such as an array of objects.
    """
    try:
        packed: bytes = msgpack.packb(message, default=_packed)
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, MessageError):
            raise
        raise MessageError(f"The message cannot be written as msgpack: {error}.") from error
    return packed


def decode(data: bytes) -> Any:
    """The message of :func:`encode` or of openpi's client; its arrays are writable and own their memory.

    Raises:
        MessageError: anything else, in one sentence.
    """
    limits = _Limits()
    try:
        tree = msgpack.unpackb(
            data, list_hook=limits.items, object_pairs_hook=limits.pairs, max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS, max_ext_len=0,
        )  # fmt: skip
    except MessageError:
        raise
    # The library's own exceptions have no base of their own, and a hostile message reaches any of them.
    except Exception as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise MessageError(f"The message is not msgpack of this protocol ({reason[:100]}).") from error
    return _restored(tree, MAX_DEPTH)


class _Limits:
    """Counts lists and maps while they are read: one byte of msgpack can make a list of 56 bytes."""

    def __init__(self) -> None:
        self._left = MAX_CONTAINERS

    def items(self, items: list[Any]) -> list[Any]:
        self._left -= 1
        if self._left < 0:
            raise MessageError(f"The message has more than {MAX_CONTAINERS} lists and maps; send arrays.")
        return items

    def pairs(self, pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
        self.items(pairs)
        found = dict(pairs)
        if len(found) != len(pairs):
            raise MessageError("A map in the message has the same key twice.")
        return found


def _packed(value: Any) -> Any:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise MessageError(
            f"A message cannot hold a {type(value).__name__}; send numbers, strings or arrays."
        )
    if not _DTYPE.fullmatch(value.dtype.str):
        raise MessageError(f"A message cannot hold dtype {value.dtype}; send booleans, integers or floats.")
    if isinstance(value, np.ndarray):
        shape = list(value.shape)
        return {_ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": shape}
    return {_SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}


def _restored(value: Any, depth: int) -> Any:
    """The tree with its arrays, checked."""
    if isinstance(value, (dict, list)) and depth == 0:
        raise MessageError(f"The message is nested more than {MAX_DEPTH} levels deep.")
    if isinstance(value, list):
        return [_restored(item, depth - 1) for item in value]
    if isinstance(value, dict):
        if _ARRAY in value:
            return _array(value)
        if _SCALAR in value:
            return _scalar(value)
        if any(isinstance(value.get(mark), bool) for mark in _ELSEWHERE):
            return _from_msgpack_numpy(value)
        return {key: _restored(item, depth - 1) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    raise MessageError("The message holds a msgpack extension type; this protocol has none.")


def _array(parts: dict[Any, Any]) -> NDArray[Any]:
    if parts.keys() != {_ARRAY, b"data", b"dtype", b"shape"} or not isinstance(parts[b"data"], bytes):
        raise MessageError("An array in the message lacks its data, dtype or shape, or has more than these.")
    dtype, data, shape = _dtype(parts[b"dtype"]), parts[b"data"], parts[b"shape"]
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise MessageError("An array in the message has a shape that is no list of sizes.")
    if len(shape) > MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
        raise MessageError(f"An array in the message has the absurd shape {_short(shape)}.")
    wanted = math.prod(shape) * dtype.itemsize
    if len(data) != wanted:
        raise MessageError(
            f"An array in the message has {len(data)} bytes; its shape {_short(shape)} and dtype {dtype.str} "
            f"need {wanted}."
        )
    if dtype.kind == "b":  # a byte other than 0 and 1 is no boolean
        return np.asarray(np.frombuffer(data, np.uint8).reshape(shape) != 0)
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=True)


def _from_msgpack_numpy(parts: dict[Any, Any]) -> Any:
    """An array or scalar as the package msgpack-numpy writes it; never its pickled ones."""
    found = {key.decode("ascii", "replace") if isinstance(key, bytes) else key: parts[key] for key in parts}
    is_array = found["nd"]
    if found.keys() - {"kind"} != {"nd", "type", "data"} | ({"shape"} if is_array else set()):
        raise MessageError(
            "An array in msgpack-numpy's layout lacks its type, shape or data, or has more than these."
        )
    if found.get("kind", b"") not in (b"", "", None):  # structures, and pickled objects
        raise MessageError(
            "An array in msgpack-numpy's layout holds objects or structures; send booleans, integers or "
            "floats."
        )
    name = found["type"].decode("ascii", "replace") if isinstance(found["type"], bytes) else found["type"]
    shape = found["shape"] if is_array else []
    whole = _array({_ARRAY: True, b"data": found["data"], b"dtype": name, b"shape": shape})
    return whole if is_array else whole[()]


def _scalar(parts: dict[Any, Any]) -> Any:
    if parts.keys() != {_SCALAR, b"data", b"dtype"}:
        raise MessageError("A number in the message lacks its data or dtype, or has more than these.")
    dtype, value = _dtype(parts[b"dtype"]), parts[b"data"]
    if not isinstance(value, (bool, int, float)):
        raise MessageError("A number in the message is none.")
    try:
        if dtype.kind in "iu" and not np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
            raise OverflowError  # numpy 1 would wrap it around
        return dtype.newbyteorder("=").type(value)
    except (ValueError, OverflowError) as error:
        raise MessageError(f"A number in the message does not fit its dtype {dtype.str}.") from error


def _dtype(name: Any) -> np.dtype[Any]:
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise MessageError(
            f"The message has an array of dtype {_short(name)}; send booleans, integers or floats."
        )
    return np.dtype(name)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
