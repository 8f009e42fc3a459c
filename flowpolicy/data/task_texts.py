"""The tasks of a store in words: its attribute ``tasks``, and a number of one of them for each step.

They are observed under the key ``task``: of a policy's view they are strings, and no array holds them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowpolicy.data.keys import TASK_INDEX, TASKS
from flowpolicy.errors import ConfigError, DataError
from flowpolicy.features.stored import KINDS
from flowpolicy.features.text import MOST_KNOWN, Text, TextFeature, text_kind
from flowpolicy.texts import LONGEST_TEXT, text_of

TASK_TEXT = "task"
"""The key under which they are observed, where no array has it."""


def is_task_text(key: str, names: Collection[str]) -> bool:
    """Whether ``key`` stands for the words of the task in a store with these arrays."""
    return key == TASK_TEXT and key not in names and TASK_INDEX in names


def with_task_table(
    arrays: Mapping[str, NDArray[Any]], attributes: Mapping[str, Any]
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Arrays and attributes of a store in which the words of each step are numbers of a list of them.

    Args:
        arrays: under ``task`` strings ``(steps,)``, or bytes of them as environments give them; where it is
            neither, or is not there, all stays as it is.
        attributes: of the store.
    """
    words = arrays.get(TASK_TEXT, np.empty(0))
    is_bytes = words.dtype == np.uint8 and words.shape[1:] == (LONGEST_TEXT,)
    if not is_bytes and (words.dtype.kind not in "UO" or words.ndim != 1):
        return dict(arrays), dict(attributes)
    texts = [text_of(row.tobytes()) for row in words] if is_bytes else [str(word) for word in words]
    number = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    rest = {key: array for key, array in arrays.items() if key != TASK_TEXT}
    index = np.array([number[text] for text in texts], np.int64)
    return {**rest, TASK_INDEX: index}, {**attributes, TASKS: list(number)}


def written_tasks(attributes: Mapping[str, Any], where: str) -> list[str]:
    """The tasks in words, to be written into another project's file; empty where there are none.

    Raises:
        DataError: a text that is no valid Unicode, or has a zero in it.
    """
    tasks = [str(task) for task in attributes.get(TASKS) or []]
    for task in tasks:
        if "\0" in task or task.encode("utf-8", "replace").decode() != task:
            raise DataError(f"{where}: attribute '{TASKS}' has {task!r}, which no file can hold; repair it.")
    return tasks


class TaskTexts:
    """The words of each step.

    Args:
        attributes: of the store.
        index: ``(steps,)`` or ``(steps, 1)``, which of the tasks each step belongs to.
        where: the store, for messages.

    Raises:
        DataError: no list of texts, or numbers beyond it.
    """

    def __init__(self, attributes: Mapping[str, Any], index: NDArray[Any], where: str) -> None:
        tasks, steps = attributes.get(TASKS), len(index)
        if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
            raise DataError(f"{where}: attribute '{TASKS}' must list the tasks' texts; add or repair it.")
        if len(tasks) > MOST_KNOWN or any(
            len(task.encode("utf-8", "replace")) > LONGEST_TEXT for task in tasks
        ):
            raise DataError(
                f"{where}: attribute '{TASKS}' holds {len(tasks)} texts or too long ones; a store may have "
                f"{MOST_KNOWN} of {LONGEST_TEXT} bytes each."
            )
        if index.dtype.kind not in "iu" or index.size != steps:
            raise DataError(f"{where}: '{TASK_INDEX}' must hold one whole number a step; repair it.")
        self.index = index.reshape(steps).astype(np.int64)
        if steps and not (self.index.min() >= 0 and self.index.max() < len(tasks)):
            raise DataError(
                f"{where}: '{TASK_INDEX}' counts tasks from {self.index.min()} to {self.index.max()}, and "
                f"attribute '{TASKS}' lists {len(tasks)}; repair one or the other."
            )
        self.tasks, self._attributes, self._where = tasks, attributes, where

    def feature(self) -> TextFeature:
        """What reads them: :class:`~flowpolicy.features.text.Text`, or the kind that the store declares."""
        kinds = self._attributes.get(KINDS) or {}
        texts = [self.tasks[number] for number in np.unique(self.index)]
        try:
            return text_kind(kinds.get(TASK_TEXT, Text.name), texts, f"{KINDS}.{TASK_TEXT}")
        except ConfigError as error:
            raise DataError(f"{self._where}: {error}") from error

    def values(self, feature: TextFeature) -> NDArray[Any]:
        """The numbers ``(steps, *shape)`` that a policy reads."""
        numbers: NDArray[Any] = feature.array(self.tasks)[self.index]
        return numbers
