"""What to do, in words."""

from __future__ import annotations

import functools
import logging
import re
import unicodedata
import zlib
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowpolicy.errors import ConfigError
from flowpolicy.features.feature import FEATURE_KINDS, Feature, TokenSizes
from flowpolicy.features.keyed import KeyedModules
from flowpolicy.plugins import register
from flowpolicy.settings import require, shown
from flowpolicy.texts import LONGEST_TEXT, text_of

logger = logging.getLogger(__name__)

MOST_PIECES = 64
"""Of a text that are looked at: its words and pairs of words first, then parts of them."""
MOST_ROWS = 2**15
MOST_KNOWN = 10_000
_REMEMBERED = 1024
_EMBEDDED = 64  # channels of a row of the table
_HASHED = 16  # numbers that stand for a text where no table is learnt
_WORD = re.compile(r"\w+")
_PART = 3  # letters, the marks of a word's beginning and end among them


def normal_form(text: str) -> str:
    """A text without what makes no difference: capitals, punctuation, white space, control characters."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).lower()))


@functools.lru_cache(_REMEMBERED)
def pieces(text: str, rows: int, most: int) -> tuple[int, ...]:
    """Numbers from 1 to ``rows`` - 1 of the words of a text, of pairs of neighbours, and of parts of words.

    Args:
        text: any.
        rows: of the table that they are rows of.
        most: pieces; further ones are left out.
    """
    words = normal_form(text).split()[:most]
    parts = [f"<{word}>"[at : at + _PART] for word in words for at in range(max(1, len(word) + 3 - _PART))]
    found = [*words, *(f"{first} {second}" for first, second in pairwise(words)), *parts]
    return tuple(1 + zlib.crc32(piece.encode()) % (rows - 1) for piece in found[:most])


@dataclass(frozen=True)
class TextFeature(Feature):
    """A text, given as a string, or as bytes of UTF-8 filled up with zeros (:mod:`flowpolicy.texts`).

    Each subclass says what numbers ``shape`` a network reads of it. They may be given in place of the text.

    Attributes:
        known: the texts that a policy was trained with; any other one is answered too, with a warning.
    """

    known: tuple[str, ...] = field(default=(), compare=False)

    remedy: ClassVar[str] = "say it in words: env.instruction=TEXT in simulation, task=TEXT on a robot"

    @classmethod
    def for_texts(cls, settings: Mapping[str, Any], texts: Iterable[str], where: str) -> Self:
        """The feature that reads these texts, with the settings of a kind but for its shape."""
        feature = cls.from_settings({**settings, "kind": cls.name, "shape": cls.shape_from(settings)}, where)
        assert isinstance(feature, cls)
        return replace(feature, known=tuple(dict.fromkeys(texts)))

    @classmethod
    @abstractmethod
    def shape_from(cls, settings: Mapping[str, Any]) -> tuple[int, ...]:
        """Of the numbers of one text."""

    @abstractmethod
    def read(self, text: str) -> NDArray[Any]:
        """The numbers ``shape`` of a text."""

    def declaration(self) -> str | dict[str, Any]:
        """The kind alone; the texts themselves are the data's."""
        settings = {name: value for name, value in self.content().items() if name not in ("shape", "known")}
        return settings if len(settings) > 1 else self.name

    def check_declaration(self, key: str) -> None:
        """Refuse other shapes than of one axis, and texts that are too many or too long."""
        super().check_declaration(key)
        where = f"observations.{key[:80]}"
        require(len(self.shape) == 1, where, self.shape, "of one axis, where it is a text")
        require(
            len(self.known) <= MOST_KNOWN, f"{where}.known", len(self.known), f"at most {MOST_KNOWN} texts"
        )
        longest = max(map(len, self.known), default=0)
        require(longest <= LONGEST_TEXT, f"{where}.known", longest, f"of texts up to {LONGEST_TEXT} long")

    def takes(self, shape: tuple[int, ...]) -> bool:
        """A string, the bytes of one, or its numbers."""
        return shape in ((), (LONGEST_TEXT,), self.shape)

    def parsed(self, values: Any) -> Any:
        """Strings and bytes as numbers ``(..., *shape)``; numbers as they are.

        Raises:
            ValueError: a text that is too long, or something else than text among texts.
        """
        if isinstance(values, str):
            return self._numbers(values)
        if isinstance(values, Tensor):
            values = values.cpu().numpy()
        array = np.asarray(values)
        if array.dtype.kind in "SUO":
            texts = array.ravel().tolist()
        elif (
            array.dtype == np.uint8 and array.shape[-1:] == (LONGEST_TEXT,) and self.shape != (LONGEST_TEXT,)
        ):
            texts = [text_of(row.tobytes()) for row in array.reshape(-1, LONGEST_TEXT)]
            array = array[..., 0]
        else:
            return array
        if not texts:
            return np.zeros((*array.shape, *self.shape), self.dtype)
        return np.stack([self._numbers(text) for text in texts]).reshape(*array.shape, *self.shape)

    def array(self, values: Any) -> NDArray[Any]:
        """The numbers of texts."""
        return Feature.array(self, self.parsed(values))

    def tensor(self, values: Any, device: torch.device) -> Tensor:
        """The same as a tensor."""
        is_read = isinstance(values, Tensor) and values.dtype == getattr(torch, np.dtype(self.dtype).name)
        return values.to(device) if is_read else torch.tensor(self.array(values), device=device)

    def refusal(self, error: Exception) -> str:
        """What is wrong with a text."""
        return str(error) if isinstance(error, ValueError) else f"is no text ({error})"

    def over_history(self, values: Tensor, rows: int, obs_horizon: int) -> Tensor:
        """One text for all rows, or one for each, as the text of every step: ``(B, T_o, *shape)``."""
        if values.ndim == 1:
            return values.expand(rows, obs_horizon, -1)
        return values[:, None].expand(-1, obs_horizon, -1) if values.ndim == 2 else values

    def normalized(self) -> NDArray[np.bool_]:
        """None of it."""
        return np.zeros(self.shape, bool)

    def _numbers(self, text: Any) -> NDArray[Any]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        if not isinstance(text, str) or len(text.encode("utf-8", "replace")) > LONGEST_TEXT:
            raise ValueError(f"is {shown(text)}; give a text of at most {LONGEST_TEXT} bytes")
        if self.known and normal_form(text) not in self._known:
            _tell_unknown(text, self.known[:4])
        return self.read(text)

    @functools.cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(map(normal_form, self.known))


@functools.lru_cache(_REMEMBERED)
def _tell_unknown(text: str, known: tuple[str, ...]) -> None:
    """Once for each text, of which the latest are remembered."""
    listed = ", ".join(map(shown, known[:3])) + (", ..." if len(known) > 3 else "")
    logger.warning(
        "The policy was not trained with the words %s; it does what they come nearest to. It knows %s.",
        shown(text), listed,
    )  # fmt: skip


@register(FEATURE_KINDS)
@dataclass(frozen=True)
class Text(TextFeature):
    """A text as numbers ``(MOST_PIECES,)`` of its words, of pairs of them and of parts of them.

    The numbers are hashes and rows of a table that is learnt with the policy (fastText, Bojanowski et al.
    2017, "Enriching word vectors with subword information"): nothing is downloaded, and a word that was never
    seen has parts that were.

    Attributes:
        rows: of the table.
    """

    rows: int = 4096

    name: ClassVar[str] = "text"
    dtype: ClassVar[type[np.generic]] = np.int32
    bounds: ClassVar[tuple[float, float]] = (0, MOST_ROWS - 1)

    @classmethod
    def shape_from(cls, settings: Mapping[str, Any]) -> tuple[int, ...]:
        """As many pieces as are looked at."""
        return (MOST_PIECES,)

    def check_declaration(self, key: str) -> None:
        """Refuse a table of an unusual size too."""
        super().check_declaration(key)
        allowed = f"between 16 and {MOST_ROWS}"
        require(16 <= self.rows <= MOST_ROWS, f"observations.{key[:80]}.rows", self.rows, allowed)

    def read(self, text: str) -> NDArray[Any]:
        """Its pieces, filled up with zeros."""
        numbers = np.zeros(self.shape, np.int32)
        found = pieces(text, self.rows, self.shape[0])
        numbers[: len(found)] = found
        return numbers

    def problem(self, values: Tensor | NDArray[Any]) -> str:
        """Anything but rows of the table."""
        kind = values.numpy(force=True) if isinstance(values, Tensor) else values
        if kind.dtype.kind not in "iu":
            return f"is a text given as numbers of {kind.dtype}; give a string"
        inside = kind.size == 0 or (kind.min() >= 0 and kind.max() < self.rows)
        return (
            ""
            if inside
            else f"holds numbers that are no pieces of words, 0 to {self.rows - 1}; give a string"
        )

    def random(self, leading: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Any pieces."""
        return torch.randint(self.rows, (*leading, *self.shape), generator=generator, dtype=torch.int32)

    @property
    def size(self) -> int:
        """Few numbers tell some tasks apart."""
        return _HASHED

    def numbers(self, values: Tensor) -> Tensor:
        """Sums over the pieces of vectors of one entry, 1 or -1, where their hashes say (Weinberger et al.
        2009, "Feature hashing for large scale multitask learning"), scaled to about one."""
        ids = values.long()
        place = torch.nn.functional.one_hot(ids % _HASHED, _HASHED).to(torch.float32)
        sign = ((ids // _HASHED % 2) * 2 - 1) * (ids > 0)
        total = (place * sign[..., None]).sum(-2)
        return total / (ids > 0).sum(-1, keepdim=True).clamp(min=1).sqrt()

    @classmethod
    def encoder(cls, features: Mapping[str, Any], obs_horizon: int, sizes: TokenSizes) -> TextEncoder:
        """A token of the newest step for each key."""
        return TextEncoder(features, sizes.width)


_INITIAL = 0.02


class PieceEmbedding(nn.Module):
    """The mean of the learnt vectors of a text's pieces, to a token ``(B, d)``."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, _EMBEDDED)
        # Small: what pieces that were never trained add to a text must not drown those that were. With six
        # colours, five places and two things in 90 sentences, a sentence with four words more was off by
        # 0.02 of the variance, and by 0.18 where the table began with numbers of about 1.
        nn.init.normal_(self.table.weight, std=_INITIAL)
        self.project = nn.Sequential(
            nn.LayerNorm(_EMBEDDED), nn.Linear(_EMBEDDED, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        """Of numbers ``(B, pieces)``, 0 where there is none."""
        ids = ids.long()
        vectors = self.table(ids)
        there = (ids > 0).to(vectors.dtype)[..., None]
        mean = (vectors * there).sum(1) / there.sum(1).clamp(min=1)
        result: Tensor = self.norm(self.project(mean))
        return result


class TextEncoder(KeyedModules[PieceEmbedding]):
    """One token for each text, of the newest step.

    Args:
        features: by key.
        width: channels of a token, d.
    """

    def __init__(self, features: Mapping[str, Text], width: int) -> None:
        super().__init__({key: PieceEmbedding(feature.rows, width) for key, feature in features.items()})

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Tokens ``(B, number of texts, d)``."""
        return torch.stack([embed(observation[key][:, -1]) for key, embed in self.items()], 1)


def text_kind(kind: str | Mapping[str, Any], texts: Iterable[str], where: str) -> TextFeature:
    """The feature of texts that are declared by the name of a kind, or by ``{"kind": name, ...}``.

    Raises:
        ConfigError: a kind that reads no text, or settings that it does not have.
    """
    settings = dict(kind) if isinstance(kind, Mapping) else {"kind": kind}
    name = str(settings.pop("kind", ""))
    chosen = FEATURE_KINDS.get(name)
    if chosen is None or not issubclass(chosen, TextFeature):
        kinds = ", ".join(name for name, each in FEATURE_KINDS.items() if issubclass(each, TextFeature))
        raise ConfigError(f"{where}.kind is {shown(name)}, and it is a text; choose one of {kinds}.")
    return chosen.for_texts(settings, texts, where)
