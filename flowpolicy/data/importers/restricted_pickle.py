"""Pickles of numpy arrays and plain containers, read without running anything they ask for.

A pickle is a program. Here its few permitted names stand for inert placeholders: the file can describe an
array's type, shape and bytes, and the arrays are built afterwards from that description. numpy's own
reconstruction functions are never called, since a forged state could make them read foreign memory.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.causes import reading_error
from flowpolicy.data.memory import free_memory_bytes
from flowpolicy.errors import DataError

_MAX_DEPTH = 20
_COPIES = 3  # the file, what it unpickles to, and the arrays built from that


def load_arrays(path: Path) -> Any:
    """The content of a pickle file: numbers, text, lists, tuples, dictionaries and numeric arrays.

    Arrays of anything else are not built; a :class:`NotNumbers` stands for each.

    Raises:
        DataError: a missing, cut-off or damaged file, or one that asks for anything else.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder where a pickle file is expected; give the file itself.")
    try:
        size = path.stat().st_size
        if _COPIES * size > free_memory_bytes():
            raise DataError(f"{path} takes {_COPIES} times its {size} bytes of memory, more than is free.")
        content = path.read_bytes()
        check_memo(content)
        return _Builder().build(_Unpickler(io.BytesIO(content), encoding="latin1").load())
    except DataError:
        raise
    except _RefusedError as error:
        raise DataError(
            f"{path} asks for {error}, which is not allowed; only arrays and plain containers are."
        ) from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise reading_error(error, path, "is cut off, damaged or no pickle") from error


def check_memo(content: bytes) -> None:
    """Refuse numbers of the memo beyond any that so many bytes could need: their table would be allocated."""
    for operation, argument, _ in pickletools.genops(content):
        if operation.name.endswith("PUT") and isinstance(argument, int) and argument > len(content):
            raise _RefusedError(f"place {argument} of a memo")


class NotNumbers(str):
    """What an array holds instead of numbers, as ``objects``."""

    __slots__ = ()


class _RefusedError(Exception):
    """Names what a pickle asked for."""


class _NotNumbersError(_RefusedError):
    """Names what an array holds instead of numbers."""


class _Call:
    """A call of numpy's that a pickle asks for: written down and never made."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, *arguments: Any) -> None:
        self.name, self.arguments = name, arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Name:
    """What a permitted name stands for: an object that a pickle can call and cannot alter."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError("a state for a function")


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _RefusedError("an encoding other than latin1")
    return text.encode("latin1")


def _bytes(*content: Any) -> bytes:
    if content and not (len(content) == 1 and isinstance(content[0], bytes)):
        raise _RefusedError("bytes of another kind")
    return content[0] if content else b""


_NDARRAY = _Name(partial(_Call, "ndarray"))
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Name(partial(_Call, "dtype")),
    ("_codecs", "encode"): _Name(_encode),
    ("collections", "OrderedDict"): _Name(OrderedDict),
}
for _module in ("builtins", "__builtin__"):
    _ALLOWED[_module, "bytes"] = _Name(_bytes)
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _Name(partial(_Call, "_reconstruct"))
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _Name(partial(_Call, "scalar"))
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _Name(partial(_Call, "_frombuffer"))


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _RefusedError(f"'{module[:40]}.{name[:40]}'")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _RefusedError("an object outside the file")


class _Builder:
    """Replaces every description by what it describes, each shared part once."""

    def __init__(self) -> None:
        self._done: dict[int, Any] = {}

    def build(self, value: Any, depth: int = _MAX_DEPTH) -> Any:
        if value is None or isinstance(value, (bool, int, float, str, bytes)):
            return value
        if depth == 0:
            raise _RefusedError("containers nested too deeply")
        if id(value) not in self._done:
            self._done[id(value)] = self._container(value, depth - 1)
        return self._done[id(value)]

    def _container(self, value: Any, depth: int) -> Any:
        if isinstance(value, dict):
            return {self.build(k, depth): self.build(v, depth) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.build(item, depth) for item in value)
        if isinstance(value, _Call) and value.name == "scalar" and value.state is None:
            kind, data = value.arguments
            return np.frombuffer(_raw(data), _dtype(kind), count=1)[0]
        if isinstance(value, _Call) and value.name in ("_reconstruct", "_frombuffer"):
            try:
                return _array(value)
            except _NotNumbersError as error:
                return NotNumbers(error)
        raise _RefusedError(f"a value of type {type(value).__name__.lstrip('_')}")


def _array(call: _Call) -> NDArray[Any]:
    """The array that ``_reconstruct`` and its state describe, or ``_frombuffer`` by itself."""
    if call.name == "_frombuffer":
        data, kind, shape, order = call.arguments
        is_fortran = order == "F"
    elif call.arguments[0] is not _NDARRAY:
        raise _RefusedError("an array of another class")
    elif not isinstance(call.state, tuple) or len(call.state) != 5:
        raise _RefusedError("an array without content")
    else:
        _, shape, kind, is_fortran, data = call.state
    shape = (shape,) if isinstance(shape, int) else shape
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise _RefusedError("an array of impossible shape")
    if isinstance(data, list):
        raise _NotNumbersError("objects")
    flat = np.frombuffer(_raw(data), _dtype(kind))
    return flat.reshape(shape, order="F" if is_fortran else "C").copy()


def _raw(data: Any) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else bytes(memoryview(data))


def _dtype(call: Any) -> np.dtype[Any]:
    """The numeric type that a call of ``numpy.dtype`` and its state (version, byte order, ...) describe."""
    if not isinstance(call, _Call) or call.name != "dtype":
        raise _RefusedError("an array of unknown type")
    order = "="
    if call.state is not None:
        if not isinstance(call.state, tuple) or len(call.state) < 3 or call.state[2] is not None:
            raise _NotNumbersError("structures")
        order = call.state[1]
    code = call.arguments[0].decode("ascii") if isinstance(call.arguments[0], bytes) else call.arguments[0]
    if not isinstance(code, str) or code.lstrip("<>=|")[:1] not in tuple("fiub"):
        raise _NotNumbersError(f"type {str(code)[:20]!r}")
    dtype = np.dtype(code)
    return dtype.newbyteorder(">") if order == ">" else dtype
