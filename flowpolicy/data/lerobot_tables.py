"""The tables of a LeRobot dataset, as Arrow holds them and parquet files keep them."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.errors import DataError
from flowpolicy.optional import optional

FILES_A_CHUNK = 1000
FILE_BYTES = 100 << 20
"""Of a table, after which the next file is begun."""
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"


class Tables(contextlib.AbstractContextManager["Tables"]):
    """The files of the steps, a row group for each episode, and a new file where one is large."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number, self._bytes = folder, 0, 0
        self._writer: Any = None

    def append(self, table: Any) -> int:
        """Write an episode; the number of the file it went to."""
        import pyarrow.parquet as pq

        if self._writer is not None and self._bytes + table.nbytes > FILE_BYTES:
            self._close()
            self._number += 1
        if self._writer is None:
            chunk, file = divmod(self._number, FILES_A_CHUNK)
            path = self._folder / DATA_PATH.format(chunk_index=chunk, file_index=file)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(path, table.schema)
        self._writer.write_table(table)
        self._bytes += table.nbytes
        return self._number

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._bytes = None, 0

    def __exit__(self, *_: object) -> None:
        self._close()


def column(values: Any) -> Any:
    """An Arrow array of rows: numbers, lists of one length, or image files."""
    import pyarrow as pa

    if isinstance(values, list):
        files = pa.array(values, pa.binary())
        return pa.StructArray.from_arrays([files, pa.nulls(len(files), pa.string())], ["bytes", "path"])
    if values[:1].size == 1 and values.ndim <= 2:
        return pa.array(values.reshape(-1))
    column = pa.array(np.ascontiguousarray(values).reshape(-1))
    if values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(column, values.shape[1])
    for size in reversed(values.shape[1:]):
        column = pa.ListArray.from_arrays(np.arange(0, len(column) + 1, size, dtype=np.int32), column)
    return column


def task_table(tasks: list[str]) -> Any:
    """The tasks as pandas writes a frame whose index is the text, in which lerobot looks them up."""
    import pyarrow as pa

    numbers = pa.array(np.arange(len(tasks)))
    index = {
        "name": None,
        "field_name": None,
        "pandas_type": "unicode",
        "numpy_type": "object",
        "metadata": None,
    }
    column = {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"}
    about = {
        "index_columns": ["__index_level_0__"],
        "column_indexes": [index],
        "columns": [{**column, "metadata": None}, {**index, "field_name": "__index_level_0__"}],
        "pandas_version": "2.2.0",
    }
    table = pa.table({"task_index": numbers, "__index_level_0__": pa.array(tasks, pa.string())})
    return table.replace_schema_metadata({"pandas": json.dumps(about)})


def png_file(image: NDArray[np.uint8]) -> bytes:
    """An image ``(height, width, channels)`` as a PNG file's content."""
    with optional("Images need Pillow to be written", "import", DataError):
        from PIL import Image as Pillow
    stream = io.BytesIO()
    squeezed = image[..., 0] if image.shape[-1] == 1 else image
    Pillow.fromarray(np.ascontiguousarray(squeezed)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()
