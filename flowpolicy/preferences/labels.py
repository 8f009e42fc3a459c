"""Labels: how good the segments of a store are, by their return, by a function, or by a person."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowpolicy import plugins
from flowpolicy.data.zarr_reading import resolve_path
from flowpolicy.errors import ConfigError, DataError
from flowpolicy.files.reading import read_versioned
from flowpolicy.files.storage import write_json
from flowpolicy.preferences.pairs import Pairs, Segment
from flowpolicy.settings import shown

RETURN, PAGE = "return", "page"
ANSWERS = {"left": (1.0, -1.0), "equal": (0.0, 0.0), "right": (-1.0, 1.0)}
"""What a person says of a pair, and the rewards of its segments that follow."""
FORMAT_VERSION = 1


def rewards(pairs: Pairs, label: str, path: Path | str) -> NDArray[np.float64]:
    """How good each segment is, ``(pairs, 2)``; NaN where nobody has said it.

    Args:
        pairs: the segments.
        label: ``return``, ``page`` for a person's answers, or ``module:function``: a function of a
            :class:`~flowpolicy.preferences.pairs.Segment` whose number is higher for a better one.
        path: of the store, beside which answers stand.

    Returns:
        Of a return or a function, the difference to the mean of the pair, which begins at one state, over the
        standard deviation of these; of answers, 1, 0 and -1.

    Raises:
        ConfigError: there is no such label or function, or the function gives no finite number.
        FlowPolicyError: answers that are damaged, or of another store.
    """
    if label == PAGE:
        found = np.full((len(pairs), 2), np.nan)
        for number, answer in Answers(path, pairs).given.items():
            found[number] = ANSWERS[answer]
        return found
    if label != RETURN and ":" not in label:
        raise ConfigError(f"label is {shown(label)}; it must be return, page, or module:function.")
    score = segment_return if label == RETURN else plugins.attribute(label, "label")
    scores = [_number(score(pairs.segment(episode)), label) for episode in range(2 * len(pairs))]
    values = np.array(scores, np.float64).reshape(-1, 2)
    centred: NDArray[np.float64] = values - values.mean(1, keepdims=True)
    centred /= max(float(centred.std()), 1e-12)
    return centred


def segment_return(segment: Segment) -> float:
    """The sum of its rewards."""
    return float(segment.reward.sum(dtype=np.float64))


def _number(value: object, label: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"label={label} gave {shown(value)} for a segment; it must give a finite number.")
    return number


class Answers:
    """A person's answers on a store, in a JSON file beside it that is written after each of them.

    Args:
        store: path of the store.
        pairs: that it holds.

    Attributes:
        path: of the file: ``hopper.labels.json`` beside ``hopper.zarr``.
        given: number of a pair -> ``left``, ``equal`` or ``right``; left is the first segment.

    Raises:
        FlowPolicyError: the file is damaged, or of another store.
    """

    def __init__(self, store: Path | str, pairs: Pairs) -> None:
        store = resolve_path(store)
        self.path = store.with_name(f"{store.name.removesuffix('.zip').removesuffix('.zarr')}.labels.json")
        self._about, self._count = pairs.about, len(pairs)
        self.given: dict[int, str] = {}
        if self.path.exists():
            self.given = self._read()

    def _read(self) -> dict[int, str]:
        content = read_versioned(self.path, "file of labels", FORMAT_VERSION, "move it away")
        if content.get("pairs") != self._about:
            raise DataError(f"{self.path} labels other pairs than the store beside it; move it away.")
        numbers, answers = {str(number): number for number in range(self._count)}, content.get("answers")
        if not isinstance(answers, dict) or not all(
            number in numbers and isinstance(answer, str) and answer in ANSWERS
            for number, answer in answers.items()
        ):
            raise DataError(f"{self.path} is damaged; move it away, and label anew.")
        return {numbers[number]: answer for number, answer in answers.items()}

    def answer(self, number: int, answer: str) -> None:
        """Keep an answer, which replaces an earlier one.

        Raises:
            ConfigError: there is no such pair or answer.
        """
        if not 0 <= number < self._count or answer not in ANSWERS:
            raise ConfigError(f"{shown(answer)} is no answer on pair {shown(number)}.")
        given = {**self.given, number: answer}
        answers = {str(each): given[each] for each in sorted(given)}
        write_json(self.path, {"format_version": FORMAT_VERSION, "pairs": self._about, "answers": answers})
        self.given = given
