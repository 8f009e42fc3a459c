"""What a network learns of actions: the commands themselves, or what changes, and rotations without jumps.

A policy takes and gives absolute commands, whatever its network learns; the checkpoint says which.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn

from flowpolicy.errors import ConfigError
from flowpolicy.features import Feature, Vector
from flowpolicy.features.presence import Presence
from flowpolicy.policy.rotations import SIZES, decoded, encoded, inner_size
from flowpolicy.ranges import one_of
from flowpolicy.settings import Settings, choose, require, shown

SPACES = ("absolute", "delta", "relative")
State = tuple[tuple[str, int] | None, ...]


@dataclass(frozen=True)
class ActionConfig(Settings, prefix="actions"):
    """How the commands of a chunk are learnt.

    Attributes:
        space: ``absolute`` commands; ``relative`` ones, minus the state at the chunk's first step; or
            ``delta``, each minus the one before it, and the first minus the state.
        state: for each dimension of a command the observation's key and its entry, flattened, that is
            subtracted; None where the dimension stays absolute, as a gripper may. Empty: all do.
        rotations: dimensions that are rotations, kind -> the first dimension of each; see
            :data:`~flowpolicy.policy.rotations.SIZES`. They stay absolute.
    """

    space: Annotated[str, one_of(SPACES)] = "absolute"
    state: State = ()
    rotations: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def check(self, action_dim: int, features: Mapping[str, Feature]) -> None:
        """Refuse what does not fit commands of this size, or these observations.

        Raises:
            ConfigError: names the entry.
        """
        covered: set[int] = set()
        for kind, start in self.placed():
            dims = range(start, start + SIZES[kind])
            fits = start >= 0 and dims.stop <= action_dim and not covered & set(dims)
            require(
                fits, f"actions.rotations.{kind}", start, f"apart from others, within {action_dim} dimensions"
            )
            covered |= set(dims)
        if self.space == "absolute":
            require(not self.state, "actions.state", list(self.state), "empty where actions are absolute")
            return
        count, named = len(self.state), [entry for entry in self.state if entry is not None]
        allowed = f"one entry for each of the {action_dim} dimensions of a command, not all of them null"
        require(count == action_dim and bool(named), "actions.state", list(self.state), allowed)
        for key, index in named:
            feature = features.get(key)
            has = feature is not None and not feature.is_frame and 0 <= index < _size(feature)
            require(has, "actions.state", (key, index), f"an entry of {', '.join(features)}, and no pixel")
        turned = sorted(covered & {place for place, entry in enumerate(self.state) if entry is not None})
        require(
            not turned, "actions.state", turned, "null where a dimension is a rotation, which stays absolute"
        )

    def placed(self) -> Iterator[tuple[str, int]]:
        """Kind and first dimension of each rotation, in the order of dimensions."""
        for kind in self.rotations:
            choose(SIZES, kind, "actions.rotations")
        found = [(start, kind) for kind, starts in self.rotations.items() for start in starts]
        yield from ((kind, start) for start, kind in sorted(found))

    def inner_dim(self, action_dim: int) -> int:
        """Numbers that a network learns of a command of ``action_dim``."""
        return action_dim + sum(inner_size(kind) - SIZES[kind] for kind, _ in self.placed())


class ActionSpace(nn.Module):
    """The map between commands and what a network learns, before normalisation. It has no state.

    Args:
        config: settings, checked.
        action_dim: A.

    Attributes:
        inner_dim: numbers that a network learns of a command, A'.
        is_plain: whether commands are learnt as they are.
        has_state: whether commands are learnt relative to a state.
    """

    columns: Tensor
    moves: Tensor

    def __init__(self, config: ActionConfig, action_dim: int) -> None:
        super().__init__()
        self.config, self.action_dim = config, action_dim
        self.inner_dim = config.inner_dim(action_dim)
        self.has_state = config.space != "absolute"
        self.is_plain = not self.has_state and not config.rotations
        self.state_keys = tuple(dict.fromkeys(entry[0] for entry in config.state if entry))
        self._pieces = list(_pieces(config, action_dim))
        state = config.state if self.has_state else (None,) * action_dim
        inner: list[tuple[str, int] | None] = []
        for kind, dims in self._pieces:
            inner += [None] * inner_size(kind) if kind else state[dims]
        self._inner = inner
        self.register_buffer("moves", torch.tensor([entry is not None for entry in inner]), persistent=False)

    def encode(self, actions: Tensor, base: Tensor | None) -> Tensor:
        """Commands ``(B, T, A)`` to what is learnt of them, ``(B, T, A')``; ``base`` is that of
        :meth:`base`."""
        return self.moved(self.unrolled(actions), base)

    def unrolled(self, actions: Tensor) -> Tensor:
        """Commands ``(..., A)`` with their rotations as they are learnt, ``(..., A')``."""
        if not self.config.rotations:
            return actions
        parts = (
            encoded(actions[..., dims], kind) if kind else actions[..., dims] for kind, dims in self._pieces
        )
        return torch.cat(list(parts), -1)

    def moved(self, inner: Tensor, base: Tensor | None) -> Tensor:
        """What changes, of absolute ``(B, T, A')``, with the state ``(B, A')`` at the first step."""
        if base is None:
            return inner
        if self.config.space == "relative":
            return inner - base[:, None]
        before = torch.cat([base[:, None], inner[:, :-1]], 1)
        return torch.where(self.moves, inner - before, inner)

    def decode(self, inner: Tensor, base: Tensor | None) -> Tensor:
        """The inverse of :meth:`encode`, differentiable."""
        if base is not None:
            if self.config.space == "delta":
                inner = torch.where(self.moves, inner.cumsum(1), inner)
            inner = inner + base[:, None]
        if not self.config.rotations:
            return inner
        parts, start = [], 0
        for kind, dims in self._pieces:
            end = start + (inner_size(kind) if kind else dims.stop - dims.start)
            part = inner[..., start:end]
            parts.append(decoded(part, kind) if kind else part)
            start = end
        return torch.cat(parts, -1)

    def base(self, newest: Mapping[str, Tensor]) -> Tensor | None:
        """The state ``(B, A')`` of observations in physical units, key -> ``(B, *shape)``: 0 where a
        dimension stays absolute; None where all do."""
        if not self.has_state:
            return None
        states = {key: newest[key].reshape(len(newest[key]), -1).float() for key in self.state_keys}
        zero = torch.zeros_like(next(iter(states.values()))[:, 0])
        return torch.stack(
            [zero if entry is None else states[entry[0]][:, entry[1]] for entry in self._inner], 1
        )

    def require_plain(self, what: str) -> None:
        """Raise a ConfigError where ``what`` needs commands that are learnt as they are."""
        if not self.is_plain:
            how = f"{self.config.space} actions" + (" with rotations" if self.config.rotations else "")
            raise ConfigError(
                f"{what} takes policies that learn commands as they are, and this one learns {how}; pretrain "
                "one with data.action_space=null and data.rotations=null."
            )


def action_config(
    space: str | None,
    state: str | Sequence[int | str | None] | None,
    rotations: Mapping[str, Sequence[int]] | None,
    features: Mapping[str, Feature],
    action_dim: int,
) -> ActionConfig:
    """The config from settings as a user gives them.

    Args:
        space: one of :data:`SPACES`; None is absolute.
        state: an observation's key, all entries of it; or a list of keys, ``key[3]``, numbers (entries of the
            only vector) and None, which together have an entry for each dimension.
        rotations: kind -> the first dimension of each.
        features: of the policy.
        action_dim: A.

    Raises:
        ConfigError: a key or an entry that is not there.
    """
    space = space or "absolute"
    if space == "absolute":
        require(state is None, "data.action_state", state, "null where data.action_space is absolute")
    elif state is None:
        raise ConfigError(
            f"data.action_space={space} subtracts a state; name the observation that measures what is "
            "commanded: data.action_state=KEY, or a list with an entry for each dimension of a command."
        )
    entries: list[tuple[str, int] | None] = []
    for entry in [state] if isinstance(state, str) else state or ():
        entries += _entries(entry, features)
    kinds = {kind: tuple(starts) for kind, starts in (rotations or {}).items()}
    config = ActionConfig(space, tuple(entries), kinds)
    config.check(action_dim, features)
    return config


def _entries(entry: int | str | None, features: Mapping[str, Feature]) -> list[tuple[str, int] | None]:
    if entry is None:
        return [None]
    if isinstance(entry, int):
        vectors = [
            key
            for key, each in features.items()
            if isinstance(each, Vector) and not isinstance(each, Presence)
        ]
        allowed = (
            f"a key with its entry, such as KEY[{entry}]: the vectors are {', '.join(vectors) or 'none'}"
        )
        require(len(vectors) == 1, "data.action_state", entry, allowed)
        return [(vectors[0], entry)]
    if entry in features:
        return [(entry, index) for index in range(_size(features[entry]))]
    found = re.fullmatch(r"(.+)\[(\d{1,6})\]", entry)
    if found is None or found[1] not in features:
        raise ConfigError(
            f"data.action_state names {shown(entry)}, which is no observation; choose of "
            f"{', '.join(features)}."
        )
    return [(found[1], int(found[2]))]


def _size(feature: Feature) -> int:
    return math.prod(feature.shape)


def _pieces(config: ActionConfig, action_dim: int) -> Iterator[tuple[str, slice]]:
    """The dimensions of a command in order: those of a rotation with its kind, others with none."""
    end = 0
    for kind, start in config.placed():
        if start > end:
            yield "", slice(end, start)
        end = start + SIZES[kind]
        yield kind, slice(start, end)
    if end < action_dim:
        yield "", slice(end, action_dim)
