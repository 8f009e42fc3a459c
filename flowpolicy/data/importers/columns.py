"""From blocks of a source's columns to blocks of the store's keys, each row checked on its way."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.image_codecs import is_whole_uint8
from flowpolicy.data.importers.checks import Episodes, Quaternions
from flowpolicy.data.importers.choosing import Column
from flowpolicy.data.importers.source import Block, Feature
from flowpolicy.data.keys import NOT_OBSERVED, PER_STEP_KEYS
from flowpolicy.data.rounding import RoundingCheck
from flowpolicy.errors import DataError
from flowpolicy.features import Image, declared, undeclared
from flowpolicy.features.image import CHANNELS
from flowpolicy.features.resizing import resize_images
from flowpolicy.features.text import MOST_KNOWN
from flowpolicy.features.undeclared import Kind, is_quaternion


class WideNumbersError(Exception):
    """Columns that were read as float32 hold numbers that it cannot tell apart.

    Args:
        keys: of the columns.
    """

    def __init__(self, keys: Collection[str]) -> None:
        super().__init__(", ".join(keys))
        self.keys = keys


class ColumnReader:
    """One key of the store, block by block; where ``is_wide``, wide floats do not become float32.

    Attributes:
        words: the texts so far, where it is made of texts, by their number.
    """

    def __init__(
        self,
        column: Column,
        where: str,
        episodes: Episodes,
        *,
        continuous: bool,
        is_wide: bool,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        self.column, self._where, self._episodes, self._is_wide = column, where, episodes, is_wide
        self._image_size = image_size
        self._rounding: dict[str, RoundingCheck] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.words: dict[str, int] = {}
        self._quaternions = {
            feature.name: Quaternions(feature.name, where, episodes, continuous)
            for feature in column.features
            if feature.shape is not None and is_quaternion(feature.name, feature.shape)
        }

    def rows(self, block: Block) -> NDArray[Any]:
        """The block's rows of this key, ``(rows, ...)``, in the store's types.

        Raises:
            DataError: rows of several shapes, no numbers, not finite, beyond float32, or impossible images.
        """
        if self.column.features[0].is_text:
            return self._numbered(block.arrays[self.column.names[0]])
        parts = [self._part(feature, block) for feature in self.column.features]
        if self.column.flatten:
            dtype = np.float64 if self._is_wide else np.float32
            parts = [part.reshape(len(part), -1).astype(dtype) for part in parts]
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        rows = self._shaped(rows)
        self._check_kind(rows, block.start)
        return rows

    @property
    def is_image(self) -> bool:
        """Whether it has nothing but images, which are checked one by one."""
        return all(feature.kind == Kind.IMAGE for feature in self.column.features)

    @property
    def collapses(self) -> bool:
        """Whether the rows so far were wide floats, became float32, and float32 cannot tell them apart."""
        return not self._is_wide and any(check.collapses for check in self._rounding.values())

    def report(self) -> None:
        """Say what was found on the way."""
        for quaternions in self._quaternions.values():
            quaternions.finish()

    def _numbered(self, texts: NDArray[Any]) -> NDArray[np.int64]:
        """Which of the texts so far each one is."""
        numbers = [self.words.setdefault(text, len(self.words)) for text in texts]
        if len(self.words) > MOST_KNOWN:
            name = self.column.names[0]
            raise DataError(f"{self._where}: '{name}' has more than {MOST_KNOWN} texts; leave it out.")
        return np.array(numbers, np.int64)

    def _part(self, feature: Feature, block: Block) -> NDArray[Any]:
        values = block.arrays[feature.name]
        self._check_shape(feature.name, values.shape[1:], block.start)
        if feature.kind == Kind.IMAGE:
            pixels = _pixels(values, feature, self._where)
            return pixels if self._image_size is None else resize_images(pixels, self._image_size)
        self._rounding.setdefault(feature.name, RoundingCheck()).rows(values)
        values = numeric(values, self.column.key, self._where, is_wide=self._is_wide)
        if values.dtype.kind == "f":
            self._check_finite(feature.name, values, block.start)
        if feature.name in self._quaternions:
            values = self._quaternions[feature.name].rows(values, block.start)
        return values

    def _check_kind(self, rows: NDArray[Any], start: int) -> None:
        """Refuse rows that are not what the column is declared to be."""
        key, kind = self.column.key, self.column.features[0].declared
        if kind is None or self.column.flatten or key in NOT_OBSERVED:
            return
        feature = declared(kind, rows.shape[1:], f"kinds.{key}")
        feature.check_declaration(key)
        problem = feature.problem(feature.array(rows))
        if problem:
            raise DataError(
                f"{self._where}: '{key}' {problem} (steps {start} to {start + len(rows) - 1}, from "
                f"'{self._episodes.name(start)}' on)."
            )

    def _check_shape(self, name: str, shape: tuple[int, ...], start: int) -> None:
        first = self._shapes.setdefault(name, shape)
        if shape != first:
            raise DataError(
                f"{self._where}: '{name}' has rows of shape {shape} in '{self._episodes.name(start)}' and "
                f"{first} in '{self._episodes.names[0]}'; make the episodes alike."
            )

    def _check_finite(self, name: str, values: NDArray[Any], start: int) -> None:
        bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
        if bad.any():
            step = start + int(bad.argmax())
            raise DataError(
                f"{self._where}: '{name}' is not finite at step {step} ('{self._episodes.name(step)}'); "
                "remove or repair that episode, or leave the key out with keys=[...]."
            )

    def _shaped(self, rows: NDArray[Any]) -> NDArray[Any]:
        key, shape = self.column.key, rows.shape[1:]
        if 0 in shape:
            raise DataError(f"{self._where}: '{key}' has empty rows of shape {shape}; leave it out.")
        if key == "action" and len(shape) != 1:
            raise DataError(
                f"{self._where}: 'action' has rows of shape {shape}; it must be (steps, action dimension), "
                f"and action=[{self.column.names[0]}] takes it as one vector."
            )
        if key in PER_STEP_KEYS:
            if rows.size != len(rows):
                raise DataError(f"{self._where}: '{key}' has rows of shape {shape}; it is one number a step.")
            return rows.reshape(len(rows))
        feature = self.column.features[0]
        is_flat = feature.declared is not None or isinstance(undeclared(key, shape), Image)
        if not shape or (feature.kind == Kind.VECTOR and is_flat):
            return rows.reshape(len(rows), -1)
        return rows


def numeric(array: NDArray[Any], key: str, source: str, *, is_wide: bool = False) -> NDArray[Any]:
    """``array`` in the store's types: integer actions as float32, wide floats too unless ``is_wide``.

    Raises:
        DataError: what is not a number, or a value float32 cannot hold.
    """
    if array.dtype.kind not in "fiub":
        raise DataError(f"{source}: '{key}' holds {array.dtype}, not numbers; convert or leave it out.")
    wide = array.dtype.kind == "f" and array.dtype != np.float32
    if not wide and not (key == "action" and array.dtype.kind in "iub"):
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float32)
    if wide and (np.isinf(narrow) & np.isfinite(array)).any():
        raise DataError(
            f"{source}: '{key}' reaches {np.abs(array).max():.3g}, beyond float32; rescale or repair it."
        )
    return array if wide and is_wide else narrow


def _pixels(values: NDArray[Any], feature: Feature, where: str) -> NDArray[np.uint8]:
    """Images as uint8, channels last."""
    if values.ndim == 3:  # of one channel, without an axis for it
        values = values[..., None]
    elif feature.channels_first:
        values = np.moveaxis(values, 1, -1)
    if values.ndim != 4 or values.shape[3] not in CHANNELS:
        raise DataError(
            f"{where}: '{feature.name}' has images of shape {values.shape[1:]}; they must have 1, 3 or 4 "
            "channels, last or first."
        )
    if not is_whole_uint8(values):
        raise DataError(
            f"{where}: '{feature.name}' holds images of {values.dtype} that are no whole numbers from 0 to "
            f"255; store them as uint8, or take them as numbers with kinds={{'{feature.name}': vector}}."
        )
    return np.ascontiguousarray(values, np.uint8)
