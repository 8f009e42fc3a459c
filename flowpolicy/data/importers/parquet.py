"""Columns of parquet files as arrays: chosen columns alone, one row group at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.causes import reading_error
from flowpolicy.data.memory import free_memory_bytes
from flowpolicy.errors import DataError
from flowpolicy.features.undeclared import Kind

_MAX_DEPTH = 6
_NUMPY_NAMES = {"halffloat": "float16", "float": "float32", "double": "float64"}
_BUFFER_BYTES = 1 << 20
_INDEX_BYTES = 80  # a row's episode and frame, their copies in order, and the order
_DAMAGED = "is cut off, damaged or no parquet file"


class Table:
    """One file, of which the footer has been read.

    Raises:
        DataError: no parquet file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _explained(path):
            schema = self._open().schema_arrow
            self.types: dict[str, Any] = {field.name: field.type for field in schema}
        self._group: tuple[Any, Any] = (None, None)

    def integers(self, names: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """Whole columns of one integer a row, ``(rows,)`` each."""
        columns = self.numbers(names)
        for name, values in columns.items():
            if values.dtype.kind not in "iu":
                raise DataError(f"{self.path}: column '{name}' holds {values.dtype}; it must hold integers.")
        return {name: values.astype(np.int64) for name, values in columns.items()}

    def numbers(self, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Whole columns of one number a row, ``(rows,)`` each."""
        with _explained(self.path):
            rows = self._open().metadata.num_rows
            if rows * _INDEX_BYTES > free_memory_bytes():
                raise DataError(
                    f"{self.path} declares {rows} rows, more than fit into memory; is it damaged?"
                )
            blocks = list(self.read(names, 0, rows, 1 << 24))
        columns = {}
        for name in names:
            values = np.concatenate([block[name] for block in blocks]) if blocks else np.zeros(0, np.int64)
            columns[name] = values.reshape(len(values), -1)[:, 0] if len(values) else values.reshape(0)
            if columns[name].dtype.kind not in "iuf":
                raise DataError(f"{self.path}: column '{name}' holds {values.dtype}; it must hold numbers.")
        return columns

    def read(
        self, names: Sequence[str], first: int, count: int, block_bytes: int
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """Rows ``first .. first + count - 1`` of the named columns, in blocks of about ``block_bytes``.

        Raises:
            DataError: a missing column, missing values, or rows of several lengths.
        """
        for name in names:
            if name not in self.types:
                raise DataError(
                    f"{self.path} has no column '{name}', which other files have; make the files alike."
                )
        with _explained(self.path):
            file = self._open()
            start = 0
            for number in range(file.num_row_groups):
                rows = file.metadata.row_group(number).num_rows
                begin, end = max(first, start), min(first + count, start + rows)
                is_whole = (begin, end) == (start, start + rows)
                if begin < end:
                    parts = (
                        self._streamed(file, number, names, block_bytes)
                        if is_whole
                        else self._sliced(file, number, names, begin - start, end - start, block_bytes)
                    )
                    read = 0
                    for part in parts:
                        read += part.num_rows
                        yield {name: self._values(part.column(name), name) for name in names}
                    if read != end - begin:
                        raise DataError(f"{self.path} {_DAMAGED} (rows are missing); copy it again.")
                start += rows

    def _open(self) -> Any:
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(self.path, memory_map=False, buffer_size=_BUFFER_BYTES)

    def _streamed(self, file: Any, number: int, names: Sequence[str], block_bytes: int) -> Iterator[Any]:
        """A whole row group, decoded a block at a time."""
        declared = file.metadata.row_group(number)
        size = max(1, block_bytes * declared.num_rows // max(1, declared.total_byte_size))
        yield from file.iter_batches(
            batch_size=min(size, declared.num_rows),
            row_groups=[number],
            columns=list(names),
            use_threads=False,
        )

    def _sliced(
        self, file: Any, number: int, names: Sequence[str], begin: int, end: int, block_bytes: int
    ) -> Iterator[Any]:
        """Some rows of a row group, of which the last is kept: episodes that do not lie in order share it."""
        wanted = (number, tuple(names))
        if self._group[0] != wanted:
            self._group = (None, None)
            declared = file.metadata.row_group(number)
            needed = max(declared.total_byte_size, 8 * declared.num_rows * len(names))
            if needed > free_memory_bytes():
                raise DataError(f"{self.path} has a row group of {needed} bytes, more memory than is free.")
            table = file.read_row_group(number, columns=list(names), use_threads=False)
            self._group = (wanted, table.combine_chunks())
        table = self._group[1]
        size = max(1, block_bytes * table.num_rows // max(1, table.nbytes))
        for at in range(begin, end, size):
            yield table.slice(at, min(size, end - at))

    def _values(self, column: Any, name: str) -> NDArray[Any]:
        chunks = getattr(column, "combine_chunks", None)
        return _array(column if chunks is None else chunks(), name, self.path)


def kind_of_type(stored: Any, depth: int = _MAX_DEPTH) -> tuple[Kind, np.dtype[Any] | None]:
    """What an Arrow type holds, and numpy's type of its elements where they are plain numbers."""
    import pyarrow.types as kinds

    if kinds.is_boolean(stored) or kinds.is_integer(stored) or kinds.is_floating(stored):
        name = str(stored)
        return Kind.VECTOR, np.dtype(_NUMPY_NAMES.get(name, name))
    if _is_list(stored) and depth:
        return kind_of_type(stored.value_type, depth - 1)
    if kinds.is_temporal(stored):
        return Kind.TIME, None
    if any(is_kind(stored) for is_kind in (kinds.is_string, kinds.is_large_string, kinds.is_string_view)):
        return Kind.TEXT, None
    if kinds.is_dictionary(stored):
        return kind_of_type(stored.value_type, depth - 1)[0] if depth else Kind.OTHER, None
    if kinds.is_struct(stored) and {field.name for field in stored} == {"bytes", "path"}:
        return Kind.ENCODED, None  # an image, as the datasets library stores it
    return Kind.OTHER, None


def _is_list(stored: Any) -> bool:
    import pyarrow.types as kinds

    views = (getattr(kinds, name, None) for name in ("is_list_view", "is_large_list_view"))
    tests = (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list, *views)
    return any(test(stored) for test in tests if test is not None)


def _array(column: Any, name: str, path: Path) -> NDArray[Any]:
    """The rows of an Arrow array ``(rows, ...)``."""
    if column.null_count:
        raise DataError(
            f"{path}: column '{name}' has {column.null_count} missing values; repair or remove those rows."
        )
    import pyarrow.compute as compute
    import pyarrow.types as kinds

    if kinds.is_struct(column.type):  # encoded images: their bytes
        return _array(compute.struct_field(column, "bytes"), name, path)
    if not _is_list(column.type):
        return np.asarray(column.to_numpy(zero_copy_only=False))

    lengths = compute.list_value_length(column).to_numpy(zero_copy_only=False)
    if len(lengths) and (lengths != lengths[0]).any():
        raise DataError(f"{path}: column '{name}' has rows of different lengths; make them alike.")
    inner = _array(column.flatten(), name, path)
    return inner.reshape(len(column), int(lengths[0]) if len(lengths) else 0, *inner.shape[1:])


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Whatever pyarrow raises inside the block becomes one sentence."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # pyarrow raises its own family and OSError
        raise reading_error(error, path, _DAMAGED) from error
