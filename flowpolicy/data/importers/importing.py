"""From a source to demonstrations or a store: list, choose, read only that, check, write; block by block."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.importers.checks import BoundsCheck, Episodes, TimeCheck
from flowpolicy.data.importers.choosing import Column, choose_columns
from flowpolicy.data.importers.columns import ColumnReader, WideNumbersError
from flowpolicy.data.importers.registry import open_source
from flowpolicy.data.importers.request import (
    Request,
    requested_bounds,
    requested_every,
    requested_size,
    wants_clipping,
)
from flowpolicy.data.importers.resuming import description
from flowpolicy.data.importers.source import Block, Source
from flowpolicy.data.importers.subsampling import Subsampling
from flowpolicy.data.importers.transforming import transformed
from flowpolicy.data.keys import NOT_OBSERVED, TASK_INDEX, TASKS
from flowpolicy.data.memory import free_memory_bytes
from flowpolicy.data.store import Demonstrations, episode_ends_problem, write_demonstrations
from flowpolicy.data.store_writing import check_new, store_writer
from flowpolicy.data.task_texts import TASK_TEXT
from flowpolicy.data.versions import version_warning
from flowpolicy.errors import DataError
from flowpolicy.features.stored import KINDS
from flowpolicy.features.undeclared import Kind

logger = logging.getLogger(__name__)
T = TypeVar("T")


def import_demonstrations(
    source: Path | str, format: str = "auto", **request: Unpack[Request]
) -> Demonstrations:
    """Read demonstrations of any known format into memory, brought to the wanted keys, and check them.

    Args:
        source: file, folder, or (Minari, LeRobot) dataset id.
        format: a name in ``FORMATS``, or ``auto``; ``my_module:name`` imports ``my_module`` first.
        request: see :class:`Request`.

    Raises:
        DataError: whatever is wrong with the data, in one sentence.
        ConfigError: an unknown format or option.
    """
    transform = request.get("demo_transform")
    with open_source(source, format, request.get("options")) as opened:
        if transform is None:
            return _import(opened, request, Import.in_memory)
        if not opened.clip:
            opened.bounds = None  # they are those of the action before the transform
        unjudged: dict[str, Any] = {"keys": None, "action_bounds": None, "out_of_bounds": "refuse"}
        bounds, clip = requested_bounds(request), wants_clipping(request)
        demos = _import(opened, cast("Request", {**request, **unjudged}), Import.in_memory)
    demos = transformed(demos, transform, request.get("keys"))
    if bounds is not None:
        check = BoundsCheck(bounds, clip, demos.source)
        demos.arrays["action"] = check.rows(demos.arrays["action"], 0)
        check.finish()
        if check.outside:
            demos.attributes["actions_clipped"] = check.outside
    return demos


def import_to_store(
    source: Path | str,
    out: Path | str,
    format: str = "auto",
    *,
    attributes: Mapping[str, Any] | None = None,
    zarr_format: int = 2,
    image_codec: str = "zstd",
    **request: Unpack[Request],
) -> Path:
    """Like :func:`import_demonstrations`, into a store, a block of rows at a time; returns its path.

    An import that was killed, or ended with Ctrl-C, goes on after the last whole episode on disk when it is
    started again with the same arguments. A ``demo_transform`` is given whole arrays, so that with one
    everything is held in memory, and begins anew.

    Args:
        source: file, folder, or (Minari, LeRobot) dataset id.
        out: the new store, a folder or a zip.
        format: a name in ``FORMATS``, or ``auto``; ``my_module:name`` imports ``my_module`` first.
        attributes: kept in the store beside those of the source.
        zarr_format: 2 or 3.
        image_codec: ``zstd`` or ``jpeg2000``.
        request: see :class:`Request`.

    Raises:
        FlowPolicyError: as there, or where the store cannot be written; nothing half-written stays behind.
    """
    path = check_new(out)
    writing: dict[str, Any] = {"zarr_format": zarr_format, "image_codec": image_codec}
    if request.get("demo_transform") is not None:
        demos = import_demonstrations(source, format, **request)
        return write_demonstrations(path, demos, attributes=attributes, **writing)

    def write(chosen: Import) -> None:
        work = description(source, opened.where, path, {**writing, **chosen.settings, "format": format})
        with store_writer(path, chosen.num_steps, work=work, **writing) as writer:
            after = chosen.episodes_within(writer.rows)
            writer.rows = int(chosen.episode_ends[after - 1]) if after else 0
            if after:
                logger.info("%s goes on after episode %d of %d.", path, after, len(chosen.episode_ends))
            writer.attributes.update(chosen.attributes)
            for rows in chosen.blocks(after, writer.check):
                writer.append(rows)
            writer.attributes.update({**chosen.attributes, **(attributes or {})})
            writer.finish(chosen.episode_ends)

    with open_source(source, format, request.get("options")) as opened:
        _import(opened, request, write)
    return path


def _import(source: Source, request: Request, take: Callable[[Import], T]) -> T:
    """What ``take`` makes of the import of the chosen columns.

    Whether float32 can hold a column is known only after all of it was read. In the rare case that it cannot,
    ``take`` is called again with that column as wide as it is.
    """
    wide: set[str] = set()
    while True:
        try:
            return take(Import(source, request, wide))
        except WideNumbersError as error:
            wide.update(error.keys)


class Import:
    """The chosen columns of a source, checked, as blocks of a store's keys.

    Args:
        source: opened.
        request: which columns are chosen, and what is asked of their values.
        wide: keys whose floats stay as wide as they are; the others become float32.

    Attributes:
        episode_ends: ``(episodes,)``.
        attributes: where the data come from; whole when all blocks have been read.
    """

    def __init__(self, source: Source, request: Request, wide: Collection[str] = ()) -> None:
        self._source, self._request, self._wide = source, request, wide
        clip, bounds = wants_clipping(request), requested_bounds(request)
        every, self._image_size = requested_every(request), requested_size(request)
        columns = choose_columns(source, request)
        action = next(column for column in columns if column.key == "action")
        self._lengths = source.lengths(action.names[0])
        self._episodes = Episodes(source.episodes, self._lengths)
        if (self._lengths == 0).any():
            name = source.episodes[int((self._lengths == 0).argmax())]
            raise DataError(f"{source.where}: '{name}' has no step; remove that episode.")
        self._subsampling = Subsampling(every, self._lengths) if every > 1 else None
        self.episode_ends = self._episodes.ends
        problem = episode_ends_problem(self.episode_ends, int(self._lengths.sum()))
        if problem is not None:
            raise DataError(f"{source.where}: {problem}.")
        if self._subsampling is not None:
            self.episode_ends = np.cumsum(self._subsampling.lengths)
        self._columns = [column for column in columns if not column.optional or self._is_sound(column)]
        self.attributes = {**source.attributes, KINDS: _kinds(self._columns, source.attributes)}
        if every > 1:
            self.attributes["every"] = every
            if _is_rate(source.attributes.get("fps")):
                self.attributes["fps"] = source.attributes["fps"] / every
        if source.bounds is not None and action.names == (source.action,) and not action.flatten:
            self.attributes["action_bounds"] = [_plain(bound) for bound in source.bounds]
            if bounds is None:
                clip, bounds = clip or source.clip, source.bounds
        self._bounds = None if bounds is None else BoundsCheck(bounds, clip, source.where)
        warning = version_warning(self.attributes)
        if warning:
            logger.warning("%s: %s", source.where, warning)

    @property
    def num_steps(self) -> int:
        """Steps over all episodes."""
        return int(self.episode_ends[-1])

    @property
    def settings(self) -> dict[str, Any]:
        """What decides about the blocks besides the source, by name."""
        return {**self._request, "float64": sorted(self._wide)}

    def episodes_within(self, rows: int) -> int:
        """Episodes that end within so many rows of a store, without the last one of all."""
        return min(int(np.searchsorted(self.episode_ends, rows, side="right")), len(self.episode_ends) - 1)

    def blocks(
        self, after: int = 0, check: Callable[[], None] = lambda: None
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """The next rows of every key, ``(rows, ...)``.

        Args:
            after: so many episodes at the beginning are left out. Their numbers are read and checked all the
                same, as some checks are of all steps; images, which take the time, are not.
            check: called between blocks of what is left out; may raise what is to end the reading.

        Raises:
            DataError: whatever is wrong with the values, in one sentence.
            WideNumbersError: after all rows, columns that lost what they said by becoming float32.
        """
        readers = [self._reader(column) for column in self._columns]
        rows = self._checked_blocks(readers, after, check)
        yield from rows if self._subsampling is None else self._subsampling.blocks(rows, after)
        collapsed = [reader.column.key for reader in readers if reader.collapses]
        if collapsed:
            raise WideNumbersError(collapsed)
        for reader in readers:
            reader.report()
            if reader.words:
                self.attributes[TASKS] = list(reader.words)
        if self._bounds is not None:
            self._bounds.finish()
            if self._bounds.outside or self._source.clip:
                self.attributes["actions_clipped"] = self._bounds.outside

    def _checked_blocks(
        self, readers: Sequence[ColumnReader], after: int, check: Callable[[], None]
    ) -> Iterator[dict[str, NDArray[Any]]]:
        fps, clock = self._source.attributes.get("fps"), None
        if self._source.timestamps is not None and _is_rate(fps):
            allow_gaps = self._request.get("allow_gaps", False)
            clock = TimeCheck(float(fps), self._source.where, self._episodes, allow_gaps)
        if after:
            self._catch_up(readers, clock, after, check)
        for block in self._read(readers, clock, after):
            yield self._checked(block, readers, clock)

    def _catch_up(
        self,
        readers: Sequence[ColumnReader],
        clock: TimeCheck | None,
        after: int,
        check: Callable[[], None],
    ) -> None:
        """Show the checks what the first ``after`` episodes hold: numbers, and how large images are."""
        images = [reader for reader in readers if reader.is_image]
        numbers = [reader for reader in readers if not reader.is_image]
        if images:
            with contextlib.closing(self._read(images, None)) as blocks:
                self._checked(next(blocks), images, None)
        start = int(self._episodes.starts[after])
        with contextlib.closing(self._read(numbers, clock)) as blocks:
            for block in blocks:
                check()
                if block.start >= start:
                    break
                rows = {name: values[: start - block.start] for name, values in block.arrays.items()}
                self._checked(Block(block.start, rows), numbers, clock)

    def _read(
        self, readers: Sequence[ColumnReader], clock: TimeCheck | None, after: int = 0
    ) -> Generator[Block]:
        names = dict.fromkeys(name for reader in readers for name in reader.column.names)
        if clock is not None and self._source.timestamps is not None:
            names[self._source.timestamps] = None
        yield from self._source.read(list(names), self._lengths, after)

    def _checked(
        self, block: Block, readers: Sequence[ColumnReader], clock: TimeCheck | None
    ) -> dict[str, NDArray[Any]]:
        """The block's rows of the readers' keys."""
        if clock is not None and self._source.timestamps is not None:
            clock.rows(block.arrays[self._source.timestamps], block.start)
        rows = {reader.column.key: reader.rows(block) for reader in readers}
        if self._bounds is not None and "action" in rows:
            rows["action"] = self._bounds.rows(rows["action"], block.start)
        return rows

    def in_memory(self) -> Demonstrations:
        """Everything at once.

        Raises:
            DataError: besides what :meth:`blocks` raises, more than the memory that is free.
        """
        arrays: dict[str, NDArray[Any]] = {}
        filled = 0
        for rows in self.blocks():
            if not arrays:
                self._check_memory(rows)
                arrays = {k: np.empty((self.num_steps, *v.shape[1:]), v.dtype) for k, v in rows.items()}
            until = filled + len(rows["action"])
            for key, values in rows.items():
                arrays[key][filled:until] = values
            filled = until
        return Demonstrations(arrays, self.episode_ends, self.attributes, self._source.where)

    def _reader(self, column: Column) -> ColumnReader:
        continuous = self._request.get("continuous_quaternions", False)
        is_wide = column.key in self._wide
        return ColumnReader(
            column,
            self._source.where,
            self._episodes,
            continuous=continuous,
            is_wide=is_wide,
            image_size=self._image_size,
        )

    def _is_sound(self, column: Column) -> bool:
        """Whether a column that nobody asked for can be read; it is small, so that this is no second pass."""
        try:
            reader = self._reader(column)
            for block in self._source.read(list(column.names), self._lengths):
                reader.rows(block)
        except DataError as error:
            logger.warning("'%s' is left out, as nobody asked for it and it is broken: %s", column.key, error)
            return False
        return True

    def _check_memory(self, rows: Mapping[str, NDArray[Any]]) -> None:
        needed = sum(values[:1].nbytes for values in rows.values()) * self.num_steps
        free = free_memory_bytes()
        if needed > free:
            raise DataError(
                f"{self._source.where}: the chosen keys take {needed / 1e9:.1f} GB of memory and "
                f"{free / 1e9:.1f} GB are free; choose fewer with keys=[...], or import into a store, which "
                "needs little."
            )


def _kinds(columns: Sequence[Column], attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What the columns are declared to be; of undeclared vectors a store tells that they are."""
    whole = {column.key: column.features[0] for column in columns if not column.flatten}
    declared = attributes.get(KINDS)
    declared = declared if isinstance(declared, Mapping) and TASK_INDEX in whole else {}
    words = {key: kind for key, kind in declared.items() if key == TASK_TEXT}
    return words | {
        key: feature.declared or str(feature.kind)
        for key, feature in whole.items()
        if key not in NOT_OBSERVED and (feature.declared or feature.kind != Kind.VECTOR)
    }


def _is_rate(fps: Any) -> TypeGuard[float]:
    return isinstance(fps, (int, float)) and 0 < fps < float("inf")


def _plain(bound: NDArray[np.float64]) -> Any:
    """A bound as JSON has it: None where there is none."""
    plain = [value if np.isfinite(value) else None for value in bound.reshape(-1).tolist()]
    return plain if bound.ndim else plain[0]
