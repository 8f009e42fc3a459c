"""Several stores as one: images of one size, and what a store does not have at rest and marked so."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from flowpolicy.data.command_source import source_or_operator
from flowpolicy.data.keys import PER_STEP_KEYS, SOURCE, TASK_INDEX, TASKS
from flowpolicy.data.memory import free_memory_bytes
from flowpolicy.data.store import Demonstrations, read_demonstrations
from flowpolicy.data.task_texts import TASK_TEXT, TaskTexts, is_task_text
from flowpolicy.data.zarr_reading import open_store
from flowpolicy.errors import DataError
from flowpolicy.features import Feature, Presence
from flowpolicy.features.presence import presence_key
from flowpolicy.features.stored import KINDS

_BLOCK_BYTES = 1 << 26
_COMMON = ("fps", "env_id", "env_version", "robot_type", TASKS)
"""Attributes that say nothing of the whole where the stores do not agree."""


def read_stores(
    paths: Sequence[str],
    keys: Sequence[str],
    image_memory_bytes: int | None = None,
    kinds: Mapping[str, Any] | None = None,
    image_size: tuple[int, int] | None = None,
) -> Demonstrations:
    """The demonstrations of several stores, one store after another.

    A key that not all stores have is at rest where it is missing, and gets a
    :class:`~flowpolicy.features.presence.Presence` besides. Images are resized to ``image_size``, or to the
    size that the first store with them has. Rewards and the ends of episodes are kept where all stores have
    them.

    Args:
        paths: of the stores.
        keys: observations wanted; each is in one store at least.
        image_memory_bytes: for the images of one key, as in
            :func:`~flowpolicy.data.store.read_demonstrations`; more lie in a temporary file.
        kinds: key -> kind, where the stores do not declare it.
        image_size: height and width.

    Raises:
        DataError: a store that cannot be read, a key that none has, or stores that do not fit together.
    """
    kinds, held = kinds or {}, []
    for path in paths:
        with open_store(path) as store:
            held.append([key for key in keys if key in store.arrays or is_task_text(key, store.arrays)])
    nowhere = [key for key in keys if not any(key in some for some in held)]
    if nowhere:
        raise DataError(f"No store of {', '.join(paths)} has '{nowhere[0]}'; choose other observation keys.")
    limit = free_memory_bytes() // 2 if image_memory_bytes is None else image_memory_bytes
    each = limit // len(paths)
    parts = [
        read_demonstrations(path, some, each, {key: kinds[key] for key in some if key in kinds})
        for path, some in zip(paths, held, strict=True)
    ]
    return combined(parts, keys, image_size, limit)


def combined(
    parts: Sequence[Demonstrations],
    keys: Sequence[str],
    image_size: tuple[int, int] | None = None,
    image_memory_bytes: int = 1 << 40,
) -> Demonstrations:
    """See :func:`read_stores`; the parts give up their arrays.

    Raises:
        DataError: actions of different sizes, or a key of different kinds or shapes.
    """
    lengths = [part.num_steps for part in parts]
    has_text = {key: [is_task_text(key, part.arrays) for part in parts] for key in keys}
    tasks = _share_tasks(parts, any(any(has) for has in has_text.values()))
    features = {key: _common(key, parts, image_size) for key in keys if not any(has_text[key])}
    sizes = {part.arrays["action"].shape[1]: part.source for part in reversed(parts)}
    if len(sizes) > 1:
        told = " and ".join(f"{source} has {size}" for size, source in sizes.items())
        raise DataError(f"The actions of the stores differ in size: {told}; train on stores of one robot.")
    others = set.intersection(*(set(part.arrays) for part in parts)) - {*keys, SOURCE}
    arrays: dict[str, NDArray[Any]] = {}
    flags: dict[str, NDArray[Any]] = {}
    for key in keys:
        has = has_text[key] if any(has_text[key]) else [key in part.arrays for part in parts]
        if not all(has):
            flags[key] = np.repeat(np.array(has, np.float32), lengths)
    for key, feature in features.items():
        arrays[key] = _joined(key, feature, parts, image_memory_bytes)
    for key in sorted(others):
        rows = [part.arrays[key] for part in parts]
        if key in PER_STEP_KEYS:
            rows = [values.reshape(len(values)) for values in rows]
        arrays[key] = np.concatenate(rows)
    if any(SOURCE in part.arrays for part in parts):
        arrays[SOURCE] = np.concatenate([source_or_operator(part.arrays) for part in parts])
    kinds: dict[str, Any] = {}
    for key, has in has_text.items():
        if any(has) and (kind := _text_kind(parts, has)) is not None:
            kinds[key] = kind
    kinds |= {key: feature.declaration() for key, feature in features.items()}
    for key, flag in flags.items():
        if presence_key(key) in arrays:
            raise DataError(f"'{presence_key(key)}' says where '{key}' is missing; rename that observation.")
        arrays[presence_key(key)] = flag
        kinds[presence_key(key)] = Presence((), of=key).declaration()
    ends = np.concatenate(
        [part.episode_ends + before for part, before in zip(parts, _before(lengths), strict=True)]
    )
    source = ", ".join(Path(part.source).name for part in parts)
    attributes = {**_attributes(parts), **tasks, KINDS: kinds}
    return Demonstrations(arrays, ends, attributes, source, _parts(parts))


def datasets(demos: Demonstrations) -> dict[str, range]:
    """The episodes of each store that ``demos`` come from, by its name; empty where they come from one."""
    return {name: episodes for name, (_, episodes) in demos.parts.items()} if len(demos.parts) > 1 else {}


def present(demos: Demonstrations, key: str) -> slice | NDArray[np.bool_]:
    """The rows in which ``key`` was recorded."""
    flag = demos.arrays.get(presence_key(key))
    is_flag = flag is not None and isinstance(demos.feature(presence_key(key)), Presence)
    return flag > 0 if is_flag and flag is not None else slice(None)


def _share_tasks(parts: Sequence[Demonstrations], are_asked_for: bool) -> dict[str, Any]:
    """Make the stores' numbers those of one table of tasks, which is returned as an attribute; a store
    without any has no words where others' are asked for.
    """
    has = [TASK_INDEX in part.arrays and TASKS in part.attributes for part in parts]
    if not (all(has) or are_asked_for):
        return {}
    shared: list[Any] = []
    for part, known in zip(parts, has, strict=True):
        attributes = part.attributes if known else {TASKS: [""]}
        index = part.arrays[TASK_INDEX] if known else np.zeros(part.num_steps, np.int64)
        texts = TaskTexts(attributes, index, part.source)
        shared += [task for task in texts.tasks if task not in shared]
        part.arrays[TASK_INDEX] = np.array([shared.index(task) for task in texts.tasks])[texts.index]
    return {TASKS: shared}


def _text_kind(parts: Sequence[Demonstrations], has: Sequence[bool]) -> Any:
    """How the words are read, as the stores that have them declare it; None where they do not.

    Raises:
        DataError: they do not agree.
    """
    told = [
        ((part.attributes.get(KINDS) or {}).get(TASK_TEXT), part.source)
        for part, known in zip(parts, has, strict=True)
        if known
    ]
    for kind, source in told[1:]:
        if kind != told[0][0]:
            raise DataError(
                f"The words of the task are declared as {told[0][0]} in {told[0][1]} and as {kind} in "
                f"{source}; say which with data.kinds."
            )
    return told[0][0] if told else None


def _common(key: str, parts: Sequence[Demonstrations], image_size: tuple[int, int] | None) -> Feature:
    """The feature that a key has in all stores; images may differ in size alone."""
    found = [(part.feature(key), part.source) for part in parts if key in part.arrays]
    first, source = found[0]
    for feature, other in found[1:]:
        cut = 2 if first.is_frame else 0
        if (feature.declaration(), feature.shape[cut:]) != (first.declaration(), first.shape[cut:]):
            raise DataError(
                f"'{key}' is a {first.name} of shape {first.shape} in {source} and a {feature.name} of shape "
                f"{feature.shape} in {other}; give them names of their own, or leave one of the stores out."
            )
    if image_size is None or not first.is_frame:
        return first
    return type(first)((*image_size, *first.shape[2:]))


def _joined(
    key: str, feature: Feature, parts: Sequence[Demonstrations], image_memory_bytes: int
) -> NDArray[Any]:
    """The rows of all parts, which give them up."""
    steps = [part.num_steps for part in parts]
    arrays = [part.arrays.pop(key, None) for part in parts]
    if len(arrays) == 1 and arrays[0] is not None and arrays[0].shape[1:] == feature.shape:
        return arrays[0]
    dtype = np.result_type(*(array.dtype for array in arrays if array is not None))
    shape = (sum(steps), *feature.shape)
    if feature.is_frame and math.prod(shape) > image_memory_bytes:
        file = tempfile.TemporaryFile(dir=_writable(Path(parts[0].source).parent))  # noqa: SIM115 - mapped
        result: NDArray[Any] = np.memmap(file, dtype, "w+", shape=shape)
    else:
        result = np.zeros(shape, dtype)  # takes no memory before it is written
    for array, first, count in zip(arrays, _before(steps), steps, strict=True):
        rows = result[first : first + count]
        if array is None:
            rest = feature.resting()
            if rest.any():
                rows[...] = rest
            continue
        block = max(1, _BLOCK_BYTES // max(1, array[:1].nbytes))
        for start in range(0, count, block):
            rows[start : start + block] = _resized(array[start : start + block], feature)
    return result


def _resized(block: NDArray[Any], feature: Feature) -> NDArray[Any]:
    """Images ``(n, height, width, channels)`` of the feature's size, each pixel an average of those that it
    covers."""
    if block.shape[1:] == feature.shape:
        return block
    images = torch.from_numpy(np.ascontiguousarray(block)).permute(0, 3, 1, 2).float()
    size = feature.shape[:2]
    images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
    return images.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _attributes(parts: Sequence[Demonstrations]) -> dict[str, Any]:
    """Those of the first store, without those of one alone."""
    attributes = dict(parts[0].attributes)
    for name in _COMMON:
        if any(part.attributes.get(name) != attributes.get(name) for part in parts):
            attributes.pop(name, None)
    before = _before([part.num_episodes for part in parts])
    masks: dict[str, list[int]] = {}
    for part, first in zip(parts, before, strict=True):
        for name, numbers in part.masks.items():
            masks.setdefault(name, []).extend(first + number for number in numbers)
    if masks:
        attributes["masks"] = masks
    return attributes


def _parts(parts: Sequence[Demonstrations]) -> dict[str, tuple[str, range]]:
    """See :attr:`Demonstrations.parts`."""
    names = _names([Path(part.source).name.partition(".")[0] for part in parts])
    before = _before([part.num_episodes for part in parts])
    return {
        name: (part.source, range(first, first + part.num_episodes))
        for name, part, first in zip(names, parts, before, strict=True)
    }


def _names(stems: Sequence[str]) -> list[str]:
    """One name each: those that occur twice are numbered."""
    return [f"{stem}-{i + 1}" if stems.count(stem) > 1 else stem for i, stem in enumerate(stems)]


def _before(counts: Sequence[int]) -> list[int]:
    return [sum(counts[:number]) for number in range(len(counts))]


def _writable(folder: Path) -> str | None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return str(folder)
    except OSError:
        return None
