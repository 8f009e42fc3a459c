"""Executed chunks, kept to learn from again and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np
import torch
from stable_baselines3.common.buffers import BaseBuffer
from torch import Tensor

from flowpolicy.finetuning.advantages import chunk_rewards
from flowpolicy.finetuning.environments import ChunkStep


class Decision(Protocol):
    """What was done in B observations, and what is kept of them."""

    @property
    def chunk(self) -> Tensor:
        """``(B, T, A)``, normalised."""
        ...

    @property
    def known(self) -> dict[str, Tensor]:
        """Name -> ``(B, ...)``."""
        ...


@dataclass
class Episode:
    """One that goes on: where its chunks are kept, and whether it is a success by now."""

    rows: list[int] = field(default_factory=list)
    succeeded: bool = False


Known = Callable[[dict[str, Tensor], torch.Generator], dict[str, Tensor]]
"""What an algorithm keeps of prepared observations, name -> ``(B, ...)``."""


@dataclass(frozen=True)
class Transitions:
    """B executed chunks.

    Attributes:
        observation: prepared, key -> ``(B, T_o, *shape)``.
        chunk: as it was executed, normalised, ``(B, T, A)``.
        executed: actions of it, n, ``(B,)``.
        reward: sum_i gamma^i r_i over those, ``(B,)``.
        discount: gamma^n, or 0 where a terminal state was reached, ``(B,)``.
        is_last: the episode ended with it, or what followed was not kept, ``(B,)``.
        succeeded: it is of a demonstration, or of an episode that is over and was a success, ``(B,)``.
        next_observation: prepared, after them; the true last one where the episode ended.
        known: what the algorithm keeps of ``next_observation``.
    """

    observation: dict[str, Tensor]
    chunk: Tensor
    executed: Tensor
    reward: Tensor
    discount: Tensor
    is_last: Tensor
    succeeded: Tensor
    next_observation: dict[str, Tensor]
    known: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.chunk)

    def tensors(self) -> dict[str, Tensor]:
        """By name: ``chunk``, ``observation.<key>``, ..."""
        found = {}
        for name in (item.name for item in fields(self)):
            value = getattr(self, name)
            if isinstance(value, dict):
                found.update({f"{name}.{key}": part for key, part in value.items()})
            else:
                found[name] = value
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Transitions:
        """The inverse of :meth:`tensors`."""
        given: dict[str, Any] = {"known": {}}
        for name, value in tensors.items():
            group, _, key = name.partition(".")
            if key:
                given.setdefault(group, {})[key] = value
            else:
                given[group] = value
        return cls(**given)

    @classmethod
    def joined(cls, parts: Sequence[Transitions]) -> Transitions:
        """One after the other."""
        every = [part.tensors() for part in parts]
        return cls.of({name: torch.cat([each[name] for each in every]) for name in every[0]})


class ChunkReplay(BaseBuffer):
    """The last chunks of N environments; behind stable-baselines3's interface of a replay buffer.

    A chunk is kept once what follows it is known: with the next one that is executed in its environment.
    Observations are kept as they are prepared, images as the flow's tokens; what algorithms keep of them has
    half precision.

    Args:
        capacity: chunks.
        observation_space: of an environment.
        action_space: likewise.
        device: where batches are wanted; the chunks themselves stay in the main memory.
        n_envs: N.
        gamma: discount per environment step.
        known: what is kept of an observation besides.
        generator: source of everything random.
        executed: normalised chunks as an environment executes them.
        n_steps: chunks in a row that are drawn as one transition: ``reward`` and ``discount`` are of all of
            them that the episode has, and what follows is what follows the last.
        stride: how many later the next chunk of an episode is kept; None: N.
    """

    def __init__(
        self,
        capacity: int,
        observation_space: Any,
        action_space: Any,
        device: torch.device | str,
        n_envs: int,
        *,
        gamma: float,
        known: Known,
        generator: torch.Generator,
        executed: Callable[[Tensor], Tensor],
        n_steps: int = 1,
        stride: int | None = None,
    ) -> None:
        super().__init__(capacity, observation_space, action_space, device, n_envs)
        self.n_steps, self.stride = n_steps, n_envs if stride is None else stride
        self.gamma, self.known, self.generator, self.executed = gamma, known, generator, executed
        self.rows: dict[str, Tensor] = {}
        self._waiting: dict[str, Any] | None = None
        self._episodes = [Episode() for _ in range(n_envs)]

    def add(
        self,
        observation: dict[str, Tensor],
        decision: Decision,
        step: ChunkStep,
        final_observation: Mapping[str, Tensor] | None,
        /,
    ) -> None:
        """One chunk of every environment; see :class:`~flowpolicy.finetuning.collector.Buffer`."""
        self._keep_waiting(observation, decision.known)
        executed = torch.as_tensor(step.executed)
        rewards = chunk_rewards(step.rewards.astype(np.float64), self.gamma)
        self._waiting = {
            "observation": observation,
            "chunk": self.executed(decision.chunk),
            "executed": executed.float(),
            "reward": torch.as_tensor(rewards, dtype=torch.float32),
            "discount": torch.as_tensor(~step.terminated) * self.gamma ** executed.float(),
            "is_last": torch.as_tensor(step.terminated | step.truncated),
            "succeeded": torch.as_tensor(step.success),
            "next_observation": {key: value.clone() for key, value in observation.items()},
            "known": {name: value.clone() for name, value in decision.known.items()},
        }
        if final_observation is not None:
            cut = torch.as_tensor(step.truncated, device=decision.chunk.device)
            final = dict(final_observation)
            for group, found in (("next_observation", final), ("known", self.known(final, self.generator))):
                for key, value in found.items():
                    self._waiting[group][key][cut] = value

    def _keep_waiting(self, observation: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> None:
        """What waited is followed by ``observation`` where its episode goes on."""
        if self._waiting is None:
            return
        for group, found in (("next_observation", observation), ("known", known)):
            for key, value in found.items():
                goes_on = ~self._waiting["is_last"].to(value.device)
                self._waiting[group][key][goes_on] = value[goes_on]
        index, kept = self.put(Transitions(**self._waiting)), self.rows["succeeded"]
        for episode, row in zip(self._episodes, index.tolist(), strict=True):
            episode.rows.append(row)
            episode.succeeded |= bool(kept[row])
            kept[row] = False  # until it is over
            if self.rows["is_last"][row]:
                kept[episode.rows[-(self.buffer_size // self.n_envs) :]] = episode.succeeded
                episode.rows, episode.succeeded = [], False
        self._waiting = None

    def forget_waiting(self) -> None:
        """Drop what is not followed by anything: the environments begin anew."""
        self._waiting = None
        self._episodes = [Episode() for _ in range(self.n_envs)]
        if self.size():
            self.rows["is_last"][(self.pos - 1 - torch.arange(self.n_envs)) % self.buffer_size] = True

    def put(self, transitions: Transitions) -> Tensor:
        """Keep transitions, in place of the oldest where there is no room left; where they are, ``(B,)``."""
        count, room = len(transitions), self.buffer_size
        index = (self.pos + torch.arange(count)) % room
        for name, value in transitions.tensors().items():
            dtype = torch.float16 if name.startswith("known.") else value.dtype
            if name not in self.rows:
                self.rows[name] = torch.zeros((room, *value.shape[1:]), dtype=dtype)
            self.rows[name][index] = value.detach().to("cpu", dtype)
        self.full = self.full or self.pos + count >= room
        self.pos = (self.pos + count) % room
        return index

    def sample(self, batch_size: int, env: Any = None) -> Transitions:
        """``batch_size`` of them, drawn with replacement; ``env`` is of stable-baselines3's interface."""
        index = torch.randint(
            self.size(), (batch_size,), generator=self.generator, device=self.generator.device
        )
        return self._get_samples(index.cpu().numpy())

    def _get_samples(self, batch_inds: Any, env: Any = None) -> Transitions:  # type: ignore[override]
        first = last = torch.as_tensor(batch_inds)
        reward, discount = self.rows["reward"][first], self.rows["discount"][first]
        for _ in range(self.n_steps - 1):
            following = (last + self.stride) % self.buffer_size
            # Of the newest nothing follows: there the oldest lie, or nothing yet.
            age = (self.pos - 1 - last) % self.buffer_size
            goes_on = ~self.rows["is_last"][last] & (age >= self.stride)
            reward = torch.where(goes_on, reward + discount * self.rows["reward"][following], reward)
            discount = torch.where(goes_on, discount * self.rows["discount"][following], discount)
            last = torch.where(goes_on, following, last)
        drawn = {}
        for name, rows in self.rows.items():
            index = last if name.partition(".")[0] in ("next_observation", "known") else first
            drawn[name] = rows[index].to(self.device, torch.float32 if rows.is_floating_point() else None)
        drawn |= {"reward": reward.to(self.device), "discount": discount.to(self.device)}
        return Transitions.of(drawn)

    def refresh(self, count: int) -> None:
        """Make anew what is known of ``count`` of them: the flow has changed since."""
        index = torch.randint(self.size(), (count,), generator=self.generator, device=self.generator.device)
        index = index.cpu()
        rows = {name: rows[index] for name, rows in self.rows.items()}
        observation = {
            key: value.to(self.device) for key, value in Transitions.of(rows).next_observation.items()
        }
        for name, value in self.known(observation, self.generator).items():
            self.rows[f"known.{name}"][index] = value.to("cpu", torch.float16)

    def state(self) -> dict[str, Tensor]:
        """The chunks, oldest first; of the newest, what follows is not among them."""
        order = (self.pos + torch.arange(self.size())) % self.size() if self.full else torch.arange(self.pos)
        state = {name: rows[order] for name, rows in self.rows.items()}
        if state:
            state["is_last"][-self.n_envs :] = True
        return state

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.rows, self._waiting = {}, None
        self._episodes = [Episode() for _ in range(self.n_envs)]
