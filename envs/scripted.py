"""Scripted experts: controllers that solve a task by rule, rolled out into demonstrations.

A scripted expert is a class with :meth:`~ScriptedExpert.reset` and :meth:`~ScriptedExpert.act`; a task names
it in its YAML file under ``scripted``. An episode depends on its seed alone, whichever process runs it.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import gymnasium as gym
import numpy as np

from flowpolicy.errors import ConfigError, DataError
from flowpolicy.evaluation.environment import standard
from flowpolicy.ranges import Allowed, PositiveInt, Share
from flowpolicy.runs.progress import progress_bar
from flowpolicy.settings import Settings, require
from flowpolicy_envs.rollouts import Episode, EpisodeRecorder

_ATTEMPTS_PER_EPISODE = 10


class ScriptedExpert(Protocol):
    """A scripted controller of one task; created in every process, with the settings of ``scripted``."""

    def reset(self, env: gym.Env[Any, Any], rng: np.random.Generator) -> str:
        """Start an episode in ``env``, which was just reset; returns the name of the way chosen to solve it.

        What is chosen at random (a way among several, a height, a speed) comes from ``rng``.
        """

    def act(self, env: gym.Env[Any, Any], observation: Any) -> np.ndarray:
        """The next action ``(A,)``, within the action space or to be clipped to it."""


@dataclass(frozen=True)
class ScriptedConfig(Settings, prefix="scripted"):
    """How a task is demonstrated by script: ``scripted`` in ``configs/env/<task>.yaml``.

    Attributes:
        expert: ``module:Class`` of a :class:`ScriptedExpert`.
        settings: keyword arguments of the class.
        episodes: successful episodes to collect, of each task where the environment has several.
        noise: standard deviation of a disturbance of the executed actions, as a share of half the action
            range. The store keeps the action that was intended: so the data show how to recover, and do not
            show the disturbance (Laskey et al. 2017, DART).
    """

    expert: Annotated[str, Allowed(lambda name: name.count(":") == 1, "module:Class")]
    settings: dict[str, Any] = field(default_factory=dict)
    episodes: PositiveInt = 50
    noise: Share = 0.0

    def make(self) -> ScriptedExpert:
        """Make the expert.

        Raises:
            ConfigError: there is no such class.
        """
        module, _, name = self.expert.partition(":")
        try:
            made = getattr(importlib.import_module(module), name)(**self.settings)
        except (AttributeError, TypeError, ModuleNotFoundError) as error:
            raise ConfigError(
                f"The scripted expert {self.expert} cannot be made ({error}); fix env.scripted."
            ) from error
        result: ScriptedExpert = made
        return result


@dataclass(frozen=True)
class Attempt:
    """An episode that was run: its seed, the mode that was drawn, and its outcome."""

    seed: int
    way: str
    episode: Episode


def play(env: gym.Env[Any, Any], expert: ScriptedExpert, seed: int, noise: float = 0.0) -> Attempt:
    """One whole episode from ``seed``, which also seeds the expert and the disturbance."""
    rng, env = np.random.default_rng(seed), standard(env)
    observation, _ = env.reset(seed=seed)
    way = expert.reset(env, rng)
    space = env.action_space
    assert isinstance(space, gym.spaces.Box)
    spread = noise * (space.high - space.low) / 2
    recorder = EpisodeRecorder()
    while True:
        intended = np.clip(expert.act(env, observation), space.low, space.high).astype(np.float32)
        executed = intended
        if noise > 0:
            executed = intended + spread * rng.standard_normal(intended.shape)
            executed = np.clip(executed, space.low, space.high).astype(np.float32)
        recorder.observe(observation)
        observation, reward, terminated, truncated, info = env.step(executed)
        recorder.act(intended, float(reward), info)
        if terminated or truncated:
            return Attempt(seed, way, recorder.finish(bool(terminated)))


def collect_scripted(
    make: Callable[[], gym.Env[Any, Any]],
    config: ScriptedConfig,
    *,
    seed: int = 0,
    workers: int = 1,
) -> tuple[list[Attempt], int]:
    """Play episodes from ``seed``, ``seed + 1``, ... until enough have succeeded.

    An environment that cycles through several tasks, by seed, lists their names in its
    attribute ``tasks``; as many episodes of each are kept, and what one has beyond that is left out.

    Args:
        make: makes the environment; with several workers it must be picklable.
        config: the expert and the number of episodes.
        seed: of the first episode.
        workers: processes that run episodes in parallel; the result does not depend on their number.

    Returns:
        The successful attempts in the order of their seeds, and the number of episodes run up to the last.

    Raises:
        DataError: far too few succeed, or the environment never says whether one did.
    """
    require(seed >= 0, "seed", seed, "at least 0")
    require(workers >= 1, "workers", workers, "at least 1")
    tasks = _tasks(make)
    wanted = config.episodes * len(tasks)
    limit = _ATTEMPTS_PER_EPISODE * wanted
    kept: list[Attempt] = []
    counts = dict.fromkeys(tasks, 0)
    with progress_bar(wanted, "demonstrate") as bar:
        for played, attempt in enumerate(_attempts(make, config, seed, workers), start=1):
            success = attempt.episode.success
            if success is None:
                raise DataError("The environment gives no info['success'], so no episode can be kept.")
            task = attempt.episode.task if len(tasks) > 1 else tasks[0]
            if success and counts[task] < config.episodes:
                counts[task] += 1
                kept.append(attempt)
                bar.update(1)
            if len(kept) == wanted:
                return kept, played
            if played >= limit:
                break
    raise DataError(
        f"Only {len(kept)} of {limit} scripted episodes succeeded, and {wanted} are wanted"
        f"{_lacking(counts, config.episodes)}; fix the expert, or lower scripted.noise."
    )


def _tasks(make: Callable[[], gym.Env[Any, Any]]) -> tuple[str, ...]:
    """Names of the tasks that the environment cycles through; one empty name if it has no such list."""
    env = make()
    try:
        return tuple(getattr(env.unwrapped, "tasks", ())) or ("",)
    finally:
        env.close()


def _lacking(counts: Mapping[str, int], episodes: int) -> str:
    if len(counts) == 1:
        return ""
    return f" ({', '.join(name for name, count in counts.items() if count < episodes)} has too few)"


def _attempts(
    make: Callable[[], gym.Env[Any, Any]], config: ScriptedConfig, seed: int, workers: int
) -> Iterator[Attempt]:
    if workers == 1:
        env = make()
        try:
            expert = config.make()
            for number in itertools.count(seed):
                yield play(env, expert, number, config.noise)
        finally:
            env.close()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (make, config)) as pool:
        waiting = [pool.submit(_play_in_worker, seed + number) for number in range(2 * workers)]
        following = seed + len(waiting)
        try:
            while True:
                yield waiting.pop(0).result()
                waiting.append(pool.submit(_play_in_worker, following))
                following += 1
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_WORKER: dict[str, Any] = {}


def _start_worker(make: Callable[[], gym.Env[Any, Any]], config: ScriptedConfig) -> None:
    _WORKER.update(env=make(), expert=config.make(), noise=config.noise)


def _play_in_worker(seed: int) -> Attempt:
    return play(_WORKER["env"], _WORKER["expert"], seed, _WORKER["noise"])
