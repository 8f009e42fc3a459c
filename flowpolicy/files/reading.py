"""Files that may come from a stranger, read so that nothing is built or allocated on their word.

A small file is bounded before it is read and checked as plain JSON before anything looks into it. A file of
tensors says what it holds in its header: that is compared with what is expected before a tensor is read.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flowpolicy.errors import CheckpointError
from flowpolicy.settings import shown

MOST_JSON = 2_000_000
"""Bytes of a JSON file of ours, and of the header of a file of tensors."""
MOST_VALUES = 200_000
"""Numbers, texts, lists and mappings in a JSON file of ours."""
DEEPEST = 32
"""Levels that lists and mappings may lie in each other."""
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types that weights are kept in, and their bytes."""
_OTHERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_LARGEST_INTEGER = 2**63
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # what a terminal would obey; lines and tabs are text

Shapes = Mapping[str, tuple[int, ...]]


@contextmanager
def open_regular(path: Path | str) -> Iterator[BinaryIO]:
    """Open a file for reading, or a link to one; a pipe or a device is refused and never waited for.

    Raises:
        CheckpointError: there is no such file, or it cannot be read, now or in the block.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError(f"{path} is a folder, a pipe or a device; give a regular file.")
            yield file
    except OSError as error:
        is_folder = isinstance(error, IsADirectoryError)
        reason = "it is a folder" if is_folder else error.strerror or error
        raise CheckpointError(
            f"{path} cannot be read ({reason}); give a file that is there and readable."
        ) from error


def read_json(path: Path | str, kind: str = "file", remedy: str = "copy it again") -> dict[str, Any]:
    """The mapping in a JSON file of ours.

    Args:
        path: of the file.
        kind: what it is, for the message.
        remedy: ends the message: how to come by another one.

    Raises:
        CheckpointError: there is no such file, it is too large, or its content is not what
            :func:`parse_json` takes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_JSON:
            raise CheckpointError(
                f"{path} has {size:,} bytes, and a {kind} has at most {MOST_JSON:,}: it is damaged or "
                f"something else; {remedy}."
            )
        return parse_json(file.read(MOST_JSON), path, kind, remedy)


def parse_json(
    data: bytes, name: Path | str, kind: str = "file", remedy: str = "copy it again"
) -> dict[str, Any]:
    """The mapping that ``data`` holds as JSON.

    Raises:
        CheckpointError: it is no JSON or no mapping, a key comes twice, it is nested too deeply, or it holds
            a number that is not finite or too large, or text that cannot be printed.
    """
    problem = f"nests more than {DEEPEST} lists and mappings"
    try:
        if sum(map(data.count, (b",", b"[", b"{"))) > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values")
        content = json.loads(data.decode(), object_pairs_hook=_unrepeated, parse_constant=_no_constant)
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} in place of settings")
        level: list[Any] = [content]
        for _ in range(DEEPEST):
            level = [inner for item in level for inner in _items_of(item)]
            if not level:
                return content
    except RecursionError:
        pass
    except ValueError as error:
        reason = str(error).partition("\n")[0].rstrip(".")[:120]
        problem = f"is not readable JSON ({reason})"
    raise CheckpointError(f"{name} {problem}: the {kind} is damaged; {remedy}.")


def read_versioned(path: Path | str, kind: str, version: int, remedy: str) -> dict[str, Any]:
    """The content of a JSON file with a ``format_version``, without it.

    Args:
        path: of the file.
        kind: what it holds, for the message.
        version: the newest that this package reads.
        remedy: ends the message: how to come by such a file.

    Raises:
        CheckpointError: there is no such file, it is damaged, or of a newer format.
    """
    if not Path(path).exists():
        raise CheckpointError(f"No {kind} at {path}; {remedy}.")
    content = read_json(path, kind, remedy)
    found = content.pop("format_version", None)
    if type(found) is not int or not 1 <= found <= version:
        formats = "format 1" if version == 1 else f"formats 1 to {version}"
        raise CheckpointError(f"{path} is not a {kind} of {formats}; {remedy}.")
    return content


@dataclass(frozen=True)
class StoredTensors:
    """A file of tensors whose header was read, and nothing else.

    Attributes:
        name: of the file, for messages.
        shapes: of the tensors it holds.
        dtypes: of them, in safetensors' names.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    _load: Callable[[], dict[str, Tensor]]

    def without(self, prefix: str) -> StoredTensors:
        """The same without the tensors called ``prefix`` or ``prefix.<rest>``, for a check of the others."""
        shapes = {name: shape for name, shape in self.shapes.items() if name.partition(".")[0] != prefix}
        return replace(self, shapes=shapes)

    def require_shapes(self, expected: Shapes, declaration: str) -> None:
        """Raise a CheckpointError unless the file holds floating-point tensors of exactly these shapes.

        ``declaration`` is what they were computed from, for the message.
        """
        for name in sorted(expected.keys() | self.shapes.keys()):
            found, wanted = self.shapes.get(name), expected.get(name)
            if found is None or wanted is None or found != wanted:
                raise CheckpointError(
                    f"{self.name} does not fit its {declaration}: '{name[:80]}' is "
                    f"{'missing' if found is None else found}, expected "
                    f"{'nothing' if wanted is None else wanted}."
                )
            self.require_floats([name])

    def require_floats(self, names: Collection[str]) -> None:
        """Raise a CheckpointError where one of these tensors is not of floating-point numbers."""
        for name in names:
            if self.dtypes[name] not in FLOATS:
                raise CheckpointError(
                    f"{self.name}: '{name[:80]}' is of type {self.dtypes[name]}, where numbers of type "
                    f"{', '.join(FLOATS)} belong; the file is damaged."
                )

    def read(self, unbounded: Collection[str] = ()) -> dict[str, Tensor]:
        """The tensors; those of floating point as float32, in which they are used, and finite there.

        Bounds, named in ``unbounded``, may be infinite.

        Raises:
            CheckpointError: the file is damaged, or holds NaN, infinity, or what float32 cannot hold.
        """
        try:
            tensors = self._load()
        except CheckpointError:
            raise
        except (SafetensorError, OSError, ValueError, KeyError) as error:  # KeyError: a type that torch lacks
            reason = str(error).partition("\n")[0][:120]
            raise CheckpointError(f"{self.name} is damaged ({reason}); copy it again.") from error
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor.float()
                numbers = tensors[name].nan_to_num(torch.nan, 0, 0) if name in unbounded else tensors[name]
                if not torch.isfinite(numbers).all():
                    raise CheckpointError(
                        f"{self.name}: '{name[:80]}' holds NaN, infinity, or a number beyond float32; the "
                        "file is unusable."
                    )
        return tensors


def stored_tensors(file: Path) -> StoredTensors:
    """Look at a safetensors file without reading its tensors.

    Raises:
        CheckpointError: it cannot be read, or does not hold what its header says.
    """
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        return described_tensors(stream, size, str(file), lambda: dict(load_file(str(file))))


def described_tensors(
    stream: IO[bytes], size: int, name: str, load: Callable[[], dict[str, Tensor]]
) -> StoredTensors:
    """Look at the ``size`` bytes of a safetensors file that ``stream`` begins, and ``load`` reads whole.

    Raises:
        CheckpointError: they do not hold what their header says.
    """
    length = int.from_bytes(stream.read(8), "little")
    if not 2 <= length <= min(size - 8, MOST_JSON):
        raise CheckpointError(f"{name} is damaged or holds no tensors; copy it again.")
    header = parse_json(stream.read(length), f"The header of {name}")
    header.pop("__metadata__", None)
    shapes, dtypes, total = dict[str, tuple[int, ...]](), dict[str, str](), 0
    for key, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(), int()]} if len(
                shape
            ) <= 8 and all(type(side) is int and side >= 0 for side in shape):
                shapes[key], dtypes[key] = tuple(shape), dtype
                total += math.prod(shape) * (FLOATS | _OTHERS).get(dtype, 1)
            case _:
                raise CheckpointError(f"{name} does not say what '{key[:80]}' is; copy it again.")
    if total > size - 8 - length:
        raise CheckpointError(f"{name} is shorter than its tensors; it was cut off, so copy it again.")
    return StoredTensors(name, shapes, dtypes, load)


def shapes_of(make: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Shapes of the state of the module that ``make`` builds, without the memory for it."""
    with torch.device("meta"), _Unfilled():
        return {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}


class _Unfilled(TorchFunctionMode):
    """Leaves out what works in place: it changes no shape, and on the meta device it would import much of
    PyTorch's compiler, for more than a second.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given, name = kwargs or {}, func.__name__
        if name.endswith("_") and not name.endswith("__"):
            return [*args, *given.values()][0]
        return func(*args, **given)


def _items_of(item: Any) -> Collection[Any]:
    """What lies in ``item``; a ValueError where no file of ours holds such a thing."""
    if isinstance(item, dict):
        for key in item:
            if "\n" in key or "\t" in key or len(key) > 1000:
                raise ValueError(f"it holds the name {shown(key)}")
        return [*item, *item.values()]
    if isinstance(item, list):
        return item
    is_bad = False
    if isinstance(item, str):
        is_bad = _CONTROL.search(item) is not None or not _is_encodable(item)
    elif isinstance(item, int):
        is_bad = abs(item) >= _LARGEST_INTEGER
    elif isinstance(item, float):
        is_bad = not math.isfinite(item)
    if is_bad:
        raise ValueError(f"it holds {shown(item)}")
    return ()


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")
