"""Roll experts out into a demonstration store that says how it was made."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from flowpolicy.data.store import Demonstrations, write_demonstrations
from flowpolicy.data.store_writing import check_new
from flowpolicy.errors import ConfigError, DataError
from flowpolicy.evaluation.summary import versions
from flowpolicy.evaluation.task import make_environment, task_from
from flowpolicy.runs.progress import ProgressBar, progress_bar
from flowpolicy.runs.seeds import derived_seed
from flowpolicy.settings import build, require
from flowpolicy_envs.actor import ExpertActor
from flowpolicy_envs.rollouts import Episode, join, run_episodes
from flowpolicy_envs.scripted import ScriptedConfig, collect_scripted

logger = logging.getLogger(__name__)
ASSETS = Path(__file__).parent / "assets"
LICENCE = "MIT (this repository)"
LEVELS = ("medium", "expert", "scripted")


@dataclass(frozen=True)
class MediumConfig:
    """What makes a task's "medium" demonstrations.

    Attributes:
        actors: the actors that share the steps equally: names of shipped files
            (``medium-a`` is ``assets/<task>-medium-a.safetensors``) or of files in ``actors_dir``.
        band: lowest and highest mean episode return allowed; None allows any.
    """

    actors: tuple[str | int, ...] = ()
    band: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.band is not None:
            is_pair = len(self.band) == 2 and self.band[0] < self.band[1]
            require(is_pair, "env.medium.band", self.band, "[lowest, highest] mean return, or null")


def resolve_actors(
    task_name: str, names: Sequence[str], actors_dir: Path | str | None = None
) -> dict[str, ExpertActor]:
    """Read actors by name: from ``actors_dir``, or without one the shipped ``<task>-<name>``.

    A name that is a number of steps means that checkpoint of an expert's training, ``step_<8 digits>``.

    Raises:
        ConfigError: no name, a name given twice, or one without a file.
    """
    if not names:
        raise ConfigError(f"No actor is named for {task_name}; add actors=[...] to the command.")
    if len(set(names)) < len(names):
        raise ConfigError(f"actors is {list(names)}; each name may stand there once.")
    return {name: ExpertActor.load(_actor_path(task_name, name, actors_dir)) for name in map(str, names)}


def _actor_path(task_name: str, name: str, actors_dir: Path | str | None) -> Path:
    shipped = ASSETS / f"{task_name}-{name}.safetensors"
    if actors_dir is not None:
        folder = Path(actors_dir).expanduser()
        stem = f"step_{int(name):08d}" if name.isdigit() else name
        path = folder / f"{stem}.safetensors"
        if path.is_file():
            return path
        here = sorted(item.stem for item in folder.glob("*.safetensors"))
        listed = f"it has {', '.join(here)}" if here else "it holds no actor file"
        raise ConfigError(f"There is no actor '{name}' in {folder} ({listed}); name one of those.")
    if shipped.is_file():
        return shipped
    here = sorted(
        item.stem.removeprefix(f"{task_name}-") for item in ASSETS.glob(f"{task_name}-*.safetensors")
    )
    listed = f"shipped: {', '.join(here)}" if here else "none is shipped"
    raise ConfigError(
        f"There is no actor '{name}' for {task_name} ({listed}); "
        f"train one with flowpolicy train-expert env={task_name} and give its folder as actors_dir=..."
    )


def collect(
    actors: Mapping[str, ExpertActor],
    env_id: str,
    steps: int,
    *,
    seed: int = 0,
    num_envs: int = 10,
    deterministic: bool = False,
    env_kwargs: Mapping[str, Any] | None = None,
) -> Demonstrations:
    """Roll out each actor for an equal share of ``steps``; whole episodes only.

    Episodes are run in batches of ``num_envs`` from consecutive seeds and kept in the order of their seeds
    until the share is reached, so that a short episode is not kept more readily than a long one.

    Returns:
        Demonstrations with ``observation``, ``action``, ``reward``, ``terminated``, ``truncated`` and part
        of the attributes: env, actors with their measured returns, seeds, versions, licence.

    Raises:
        ConfigError: fewer than one step or environment, or an actor of another environment.
    """
    for name, number, least in (("steps", steps, 1), ("num_envs", num_envs, 1), ("seed", seed, 0)):
        require(isinstance(number, int) and number >= least, name, number, f"an integer of at least {least}")
    require(len(actors) >= 1, "actors", list(actors), "at least one actor")
    for name, actor in actors.items():
        if actor.info.env_id != env_id:
            raise ConfigError(
                f"Actor '{name}' was trained on {actor.info.env_id}, not on {env_id}; choose another."
            )
    start = derived_seed(seed, "collection")
    envs = [make_environment(env_id, env_kwargs or {}, "Collection") for _ in range(num_envs)]
    episodes: list[Episode] = []
    described: list[dict[str, Any]] = []
    try:
        for index, (name, actor) in enumerate(actors.items()):
            first_seed = start + len(episodes) + index * num_envs
            share = -(-steps // len(actors))
            with progress_bar(share, f"collect {name}") as bar:
                kept = _collect_share(actor, envs, share, first_seed, [seed, index], deterministic, bar)
            episodes += kept
            described.append(_described(name, actor, kept, first_seed))
            logger.info(
                "%s: %d episodes, mean return %.0f", name, len(kept), described[-1]["collected_return_mean"]
            )
    finally:
        for env in envs:
            env.close()
    returns = np.array([episode.total for episode in episodes])
    attributes: dict[str, Any] = {
        "env_id": env_id,
        "env_kwargs": dict(env_kwargs or {}),
        "actors": described,
        "deterministic": deterministic,
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "seed": seed,
        "num_envs": num_envs,
        "licence": LICENCE,
        "versions": versions(),
    }
    successes = [episode.success for episode in episodes]
    if all(success is not None for success in successes):
        attributes["success_rate"] = float(np.mean([bool(success) for success in successes]))
    return join(episodes, attributes)


def collect_store(
    env: Mapping[str, Any],
    *,
    level: str | None = None,
    out: Path | str | None = None,
    steps: int = 80_000,
    episodes: int | None = None,
    actors: Sequence[str] | None = None,
    actors_dir: Path | str | None = None,
    num_envs: int = 10,
    workers: int = 1,
    deterministic: bool = False,
    allow_outside_band: bool = False,
    seed: int = 0,
    image_codec: str = "zstd",
    command: str = "",
) -> tuple[Path, Demonstrations]:
    """Collect a task's demonstrations of one level and write them to a store.

    Args:
        env: the task's YAML file as a mapping.
        level: ``medium`` (the actors and band of ``env["medium"]``), ``expert`` (the actor ``expert``) or
            ``scripted`` (the expert of ``env["scripted"]``); None is ``scripted`` where the task has
            such an expert, and ``medium`` elsewhere.
        out: the store; None is ``demonstrations/<task>-<level>.zarr.zip``.
        steps: of ``medium`` and ``expert``.
        episodes: of ``scripted``; None takes the task's own number.
        actors: other actors than the level's own.
        num_envs: episodes of actors that are run in parallel.
        workers: processes that run scripted episodes.
        image_codec: of the store's images; see :mod:`flowpolicy.data.image_codecs`.

    Returns:
        The store's path and what was written to it.

    Raises:
        ConfigError: an unknown level or actor, or a task without such an expert.
        DataError: a return outside the band, too few successes, or ``out`` exists.
    """
    level = level or ("scripted" if env.get("scripted") else "medium")
    require(level in LEVELS, "level", level, f"one of {', '.join(LEVELS)}")
    task_from(env).simulator()
    out = out or f"demonstrations/{env['name']}-{level}.zarr.zip"
    check_new(out)
    if level == "scripted":
        demos = _scripted(env, episodes, seed, workers)
    else:
        medium = build(MediumConfig, env.get("medium") or {}, "env.medium")
        named = actors if actors is not None else medium.actors if level == "medium" else ("expert",)
        band = medium.band if level == "medium" else None
        demos = collect(
            resolve_actors(env["name"], [str(name) for name in named], actors_dir),
            env["env_id"],
            steps,
            seed=seed,
            num_envs=num_envs,
            deterministic=deterministic,
            env_kwargs=env["env_kwargs"],
        )
        if not allow_outside_band:
            check_band(demos, band, level)
        demos.attributes["band"] = None if band is None else list(band)
    demos.attributes.update(
        task=env["name"],
        level=level,
        fps=float(env["control_hz"]),
        source=f"{level} experts of {env['env_id']}",
        command=command,
    )
    return write_demonstrations(out, demos, image_codec=image_codec), demos


def _scripted(env: Mapping[str, Any], episodes: int | None, seed: int, workers: int) -> Demonstrations:
    """Successful episodes of the task's scripted expert."""
    if not env.get("scripted"):
        raise ConfigError(f"Task '{env['name']}' has no scripted expert; choose another level.")
    if "demonstrator" in env["scripted"]:
        raise ConfigError(
            "env.scripted.demonstrator is called env.scripted.expert now, and its method begin() reset(); "
            "rename both."
        )
    config = build(ScriptedConfig, env["scripted"], "env.scripted")
    if episodes is not None:
        config = replace(config, episodes=episodes)
    attempts, played = collect_scripted(
        task_from(env).make, config, seed=derived_seed(seed, "collection"), workers=workers
    )
    returns = np.array([attempt.episode.total for attempt in attempts])
    attributes: dict[str, Any] = {
        "env_id": env["env_id"],
        "env_kwargs": dict(env["env_kwargs"] or {}),
        "scripted": asdict(config),
        "ways": _counts(attempt.way for attempt in attempts),
        "tasks": _counts(attempt.episode.task for attempt in attempts),
        "episodes_played": played,
        "success_rate_played": len(attempts) / played,
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "success_rate": 1.0,
        "seed": seed,
        "licence": LICENCE,
        "versions": versions(),
    }
    return join([attempt.episode for attempt in attempts], attributes)


def _counts(names: Iterable[str]) -> dict[str, int] | None:
    """How often each name occurs, in the order of first occurrence; None where there is none but ""."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return None if set(counts) == {""} else counts


def check_band(demos: Demonstrations, band: tuple[float, float] | None, level: str) -> None:
    """Refuse demonstrations whose mean episode return lies outside ``band``.

    Raises:
        DataError: one sentence with the mean, the band and what to change.
    """
    if band is None:
        return
    mean = float(demos.attributes["return_mean"])
    if not band[0] <= mean <= band[1]:
        direction = "later" if mean < band[0] else "earlier"
        raise DataError(
            f"The mean episode return is {mean:.0f}, outside the {level} band [{band[0]:g}, {band[1]:g}]; "
            f"name {direction} checkpoints with actors=[...], or add allow_outside_band=true."
        )


def _collect_share(
    actor: ExpertActor,
    envs: Sequence[gym.Env[Any, Any]],
    share: int,
    first_seed: int,
    noise_seed: list[int],
    deterministic: bool,
    bar: ProgressBar,
) -> list[Episode]:
    rng = np.random.default_rng(noise_seed)
    kept: list[Episode] = []
    played = count = 0
    while True:
        seeds = [first_seed + played + i for i in range(len(envs))]
        played += len(envs)
        for episode in run_episodes(actor, envs, seeds, rng, deterministic=deterministic):
            kept.append(episode)
            count += len(episode)
            bar.update(len(episode))
            if count >= share:
                return kept


def _described(name: str, actor: ExpertActor, episodes: list[Episode], first_seed: int) -> dict[str, Any]:
    returns = np.array([episode.total for episode in episodes])
    return {
        "name": name,
        "algorithm": actor.info.algorithm,
        "trained_steps": actor.info.steps,
        "trained_seed": actor.info.seed,
        "trained_by": actor.info.command,
        "trained_versions": actor.info.versions,
        "checkpoint_return_mean": actor.info.return_mean,
        "episodes": len(episodes),
        "steps": sum(len(episode) for episode in episodes),
        "first_seed": first_seed,
        "collected_return_mean": float(returns.mean()),
        "collected_return_std": float(returns.std()),
    }
