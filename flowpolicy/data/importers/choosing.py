"""The choice of a source's columns for the keys of a store, from their declaration alone."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowpolicy.data.importers.request import Request
from flowpolicy.data.importers.source import Feature, Source
from flowpolicy.data.keys import EPISODE_KEYS, NOT_OBSERVED, TASK_INDEX, check_key, listed
from flowpolicy.data.task_texts import TASK_TEXT
from flowpolicy.errors import DataError
from flowpolicy.features import FEATURE_KINDS, Vector
from flowpolicy.features.image import channels_first
from flowpolicy.features.stored import KINDS, stored_feature
from flowpolicy.features.undeclared import Kind
from flowpolicy.settings import choose, require

logger = logging.getLogger(__name__)
_LEFT_OUT: dict[str, str] = {
    Kind.ENCODED: "images and videos are not decoded",
    Kind.TEXT: f"not read (text), unless it is the task in words (rename={{NAME: {TASK_TEXT}}})",
}
_OBSERVED = re.compile(r"(obs|observations?)[/.]")


@dataclass(frozen=True)
class Column:
    """One key of the store and the columns it is made of.

    Attributes:
        key: in the store.
        features: one column, or several whose flattened rows stand side by side.
        flatten: rows become one vector, also those of a single column.
        optional: nobody asked for it; where it cannot be read it is left out with a word.
    """

    key: str
    features: tuple[Feature, ...]
    flatten: bool = False
    optional: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The columns' full names."""
        return tuple(feature.name for feature in self.features)


def choose_columns(source: Source, request: Request) -> list[Column]:
    """The keys to be written, ``action`` among them; what is left out is logged.

    Raises:
        DataError: a name that is not there or means several columns, two columns for one key, a key that a
            store cannot have, or a chosen column of a kind that cannot be read.
    """
    table = _Table(source)
    for name, kind in (request.get("kinds") or {}).items():
        table.declare(name, kind)
    for name, key in (request.get("rename") or {}).items():
        table.rename(name, key)
    groups = {key: table.group(key, parts) for key, parts in (request.get("concatenate") or {}).items()}
    action = request.get("action")
    if action is not None:
        parts = [action] if isinstance(action, str) else list(action)
        require(bool(parts), "action", parts, "one or more columns")
        groups["action"] = tuple(table.find(str(part), full_name_first=True) for part in parts)
        table.drop_default_action(groups["action"])
    columns, keys = table.columns(groups), request.get("keys")
    has_words = TASK_INDEX in columns and TASK_TEXT not in columns
    named = {TASK_TEXT: TASK_INDEX} if has_words else {}
    asked = None if keys is None else [named.get(key, key) for key in map(str, keys)]
    chosen = table.readable(columns, groups) if asked is None else table.selected(columns, asked)
    if "action" not in chosen:
        raise DataError(
            f"{source.where} has no key '{source.action}' to be the action (it has "
            f"{listed(list(source.features)[:12])}); name its column, or several, with action=[...]."
        )
    _check(source, chosen, groups)
    if asked is None and all(key in NOT_OBSERVED for key in chosen):
        unread = [feature.name for feature in source.features.values() if feature.default and feature.problem]
        raise DataError(
            f"{source.where} has no observation that can be read (of {listed(source.features)} not read: "
            f"{listed(unread)}); a policy needs at least one."
        )
    unasked = set() if asked is None else set(EPISODE_KEYS) - set(asked)
    return [
        Column(key, features, flatten=key in groups, optional=key in unasked)
        for key, (features,) in chosen.items()
    ]


_Makers = list[tuple[Feature, ...]]


class _Table:
    """A source's columns under the names they have so far."""

    def __init__(self, source: Source) -> None:
        self.where = source.where
        self._source = source
        self._features = {name: _as_declared(feature, source) for name, feature in source.features.items()}
        self._keys = {name: feature.key for name, feature in source.features.items()}
        self._wanted = {name for name, feature in source.features.items() if feature.default}
        if not any(self._keys[name] == TASK_INDEX for name in self._wanted):
            words = [name for name, feature in self._features.items() if feature.is_text]
            self._keys |= {name: TASK_INDEX for name in words if self._keys[name] == TASK_TEXT}

    def find(self, name: str, *, full_name_first: bool = False) -> Feature:
        """The column that is meant: by its full name, its key, or the end of its name."""
        same_key = [other for other in self._wanted if self._keys[other] == name]
        if name in self._features and (full_name_first or not same_key):
            found = [name]
        elif same_key:
            found = sorted(same_key)
        else:
            found = [
                other
                for other, key in self._keys.items()
                if key == name or other.endswith((f"/{name}", f".{name}"))
            ]
        if len(found) > 1:
            raise DataError(
                f"{self.where}: '{name}' may be {listed(found)}; give the others names of their own with "
                f"rename={{'{found[-1]}': NEW}}."
            )
        if not found:
            raise DataError(f"{self.where} has no key '{name}'; it has {listed(self._known())}.")
        self._wanted.add(found[0])
        return self._features[found[0]]

    def declare(self, name: str, declared: Any) -> None:
        """Take a column for what the user says it holds."""
        kind = str(declared.get("kind") if isinstance(declared, Mapping) else declared)
        choose(FEATURE_KINDS, kind, f"kinds.{name}")
        feature = self.find(name, full_name_first=True)
        shape = feature.shape or ()
        if kind == Kind.IMAGE and feature.shape is not None and len(shape) not in (2, 3):
            raise DataError(f"{self.where}: '{feature.name}' has rows of shape {shape}; no image has.")
        first = kind == Kind.IMAGE and len(shape) == 3 and channels_first(shape)
        self._features[feature.name] = replace(feature, kind=kind, declared=declared, channels_first=first)

    def rename(self, name: str, key: str) -> None:
        """Give a column another key."""
        feature = self.find(name, full_name_first=True)
        check_key(key, self.where, "rename it to a name without")
        if key == TASK_TEXT and feature.is_text:
            key = TASK_INDEX
            self._wanted -= {other for other in self._wanted if self._keys[other] == TASK_INDEX}
            self._wanted.add(feature.name)
        self._keys[feature.name] = key

    def group(self, key: str, parts: Any) -> tuple[Feature, ...]:
        """The columns that are to stand side by side."""
        if isinstance(parts, str) or not parts:
            raise DataError(f"concatenate.{key} is {parts!r}; it must be a list of keys.")
        check_key(key, self.where, "choose a name without")
        return tuple(self.find(str(part)) for part in parts)

    def drop_default_action(self, chosen: Sequence[Feature]) -> None:
        """Where another action is chosen, leave the format's own out."""
        default = self._source.action
        is_other = default in self._wanted and default not in {feature.name for feature in chosen}
        if is_other and self._keys[default] == "action":
            self._wanted.discard(default)
            logger.info("%s: '%s' is left out, as another action is chosen.", self.where, default)

    def columns(self, groups: Mapping[str, tuple[Feature, ...]]) -> dict[str, _Makers]:
        """Each key, with everything that would make it."""
        used = {feature.name for features in groups.values() for feature in features}
        columns: dict[str, _Makers] = {}
        for name, feature in self._features.items():
            if name in self._wanted and name not in used:
                columns.setdefault(self._keys[name], []).append((feature,))
        for key, features in groups.items():
            columns.setdefault(key, []).append(tuple(self._features[f.name] for f in features))
        return columns

    def readable(self, columns: dict[str, _Makers], groups: Mapping[str, Any]) -> dict[str, _Makers]:
        """Everything but what cannot be read, which is named in the log."""
        chosen: dict[str, _Makers] = {}
        left_out: dict[str, list[str]] = {}
        for key, makers in columns.items():
            for features in makers:
                problem = _problem(key, features[0])
                if problem and key not in groups and key != "action":
                    reason = "" if features[0].note else str(features[0].kind)
                    left_out.setdefault(reason or problem, []).append(features[0].name)
                else:
                    chosen.setdefault(key, []).append(features)
        for reason, names in left_out.items():
            what = _LEFT_OUT.get(reason, f"not read ({reason})")
            logger.warning("%s: %s; left out: %s.", self.where, what, ", ".join(names))
        return chosen

    def selected(self, columns: dict[str, _Makers], keys: Sequence[str]) -> dict[str, _Makers]:
        """What the user names, the action, and rewards and ends where there are any."""
        chosen: dict[str, _Makers] = {}
        for key in keys:
            if key in columns:
                chosen[key] = columns[key]
            else:
                feature = self.find(key)
                name = self._keys[feature.name]
                chosen[name] = [
                    *(other for other in columns.get(name, []) if other != (feature,) and name in chosen),
                    (feature,),
                ]
        for key in ("action", *EPISODE_KEYS):
            usable = [
                makers
                for makers in columns.get(key, [])
                if key == "action" or not (_problem(key, makers[0]) or _poses_as(key, makers))
            ]
            if key not in chosen and usable:
                chosen[key] = usable[:1] if key != "action" else self._own_action(usable)
        return chosen

    def _own_action(self, makers: _Makers) -> _Makers:
        """The format's action where a column nobody named goes by the same key; else all that claim it."""
        own = [m for m in makers if self._source.action in {feature.name for feature in m} or len(m) > 1]
        return own if len(own) == 1 else makers

    def _known(self) -> list[str]:
        return sorted({*(self._keys[name] for name in self._wanted)} or set(self._features))[:20]


def _as_declared(feature: Feature, source: Source) -> Feature:
    """A column of numbers as the store that it comes from declares it, in the attribute ``kinds``."""
    kinds = source.attributes.get(KINDS)
    is_declared = isinstance(kinds, Mapping) and feature.key in kinds and feature.shape is not None
    if not is_declared or feature.note or feature.kind not in (Kind.VECTOR, Kind.IMAGE, Kind.DEPTH):
        return feature
    shape = feature.shape or ()
    try:
        kind = stored_feature(feature.key, None, shape, source.attributes, source.where)
    except DataError as error:
        return replace(feature, note=f"is declared to be of no kind known here ({error})")
    first = kind.is_frame and len(shape) == 3 and channels_first(shape)
    declaration = None if isinstance(kind, Vector) else kind.declaration()
    return replace(feature, kind=kind.name, declared=declaration, channels_first=first)


def _check(source: Source, chosen: Mapping[str, _Makers], groups: Mapping[str, Any]) -> None:
    for key, makers in chosen.items():
        if len(makers) > 1:
            names = sorted(feature.name for features in makers for feature in features)
            other = next((name for name in reversed(names) if name != source.action), names[-1])
            raise DataError(
                f"{source.where}: {listed(names)} would all be called '{key}'; rename one with "
                f"rename={{'{other}': NEW}}, or choose others with keys=[...]."
            )
        if key not in groups and _poses_as(key, makers[0]):
            name = makers[0][0].name
            raise DataError(
                f"{source.where}: '{name}' is an observation and would be called '{key}', which is none in a "
                f"store; rename it with rename={{'{name}': NEW}}, or leave it out with keys=[...]."
            )
        check_key(
            key, source.where, f"rename it with rename={{'{makers[0][0].name}': NEW}} to a name without"
        )
        for feature in makers[0]:
            if problem := _problem(key, feature):
                advice = _advice(key, feature)
                raise DataError(f"{source.where}: '{feature.name}' {problem}; {advice}.")
            if feature.kind == Kind.IMAGE and key in groups:
                raise DataError(
                    f"{source.where}: '{feature.name}' holds images; they cannot be concatenated into "
                    f"'{key}'."
                )


def _problem(key: str, feature: Feature) -> str:
    """Why a column cannot be this key, in words that follow its name; texts are the tasks, or nothing."""
    return "" if key == TASK_INDEX and feature.is_text else feature.problem


def _poses_as(key: str, features: Sequence[Feature]) -> bool:
    """Whether an observation goes by one of a store's own keys, only since that is what it is called."""
    feature = features[0]
    is_own = key in NOT_OBSERVED and feature.key == key
    return is_own and len(features) == 1 and _OBSERVED.match(feature.name) is not None


def _advice(key: str, feature: Feature) -> str:
    if key == "action":
        return "name the columns that make the action with action=[...]"
    if feature.kind == Kind.DEPTH:
        name = Path(feature.name).name
        return (
            f"leave it out, or take it as distances with kinds={{{name}: depth}} or as plain numbers with "
            f"kinds={{{name}: vector}}"
        )
    if feature.is_text:
        return f"leave it out, or take it as the task in words with rename={{{feature.name}: {TASK_TEXT}}}"
    return "leave it out"
