"""A ReinFlow model in one file: a zip of ``config.json`` and ``model.safetensors``, without pickle."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

from stable_baselines3.common.utils import LinearSchedule
from torch import Tensor

from flowpolicy.errors import CheckpointError, ConfigError
from flowpolicy.files.reading import MOST_JSON, StoredTensors, shapes_of
from flowpolicy.finetuning.acting import spaces_of
from flowpolicy.finetuning.actor_critic import NETWORK_SETTINGS, FlowActorCritic
from flowpolicy.finetuning.advantage_registry import ADVANTAGES, build_advantages
from flowpolicy.finetuning.archive import CONFIG, read_archive, write_archive
from flowpolicy.finetuning.learner import OPTIMIZERS
from flowpolicy.finetuning.noise import NoiseConfig
from flowpolicy.finetuning.progress import BOUNDS, Progress
from flowpolicy.finetuning.rules import UPDATE_RULES, build_update_rule
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig, policy_config
from flowpolicy.ranges import Allowed, within
from flowpolicy.settings import Settings, build, checked, require, unknown_key

_SCHEDULES = ("learning_rate", "critic_learning_rate")

_NAME = Allowed(
    lambda name: 0 < len(name) <= 100 and name.isprintable(), "1 to 100 characters that can be printed"
)


@dataclass(frozen=True)
class ReinFlowProgress(Progress):
    """And how large the policy's steps are."""

    rate_factor: Annotated[float, within("(0, 1]")]


@dataclass(frozen=True)
class SavedModel:
    """What the file holds.

    Attributes:
        policy: the flow policy's description.
        settings: keyword arguments of :class:`~flowpolicy.finetuning.reinflow.ReinFlow`.
        regularizers: names of the regularisers that it was trained with.
        progress: how far training had come.
        tensors: the learner's, and the bounds of the action space.
    """

    policy: PolicyConfig
    settings: dict[str, Any]
    regularizers: tuple[str, ...]
    progress: ReinFlowProgress
    tensors: dict[str, Tensor]


def write_model(model: SavedModel, path: str | Path | IO[bytes]) -> None:
    """Write a model; a file appears whole or not at all."""
    content = {
        "algorithm": "ReinFlow",
        "policy": model.policy.content(),
        "settings": _encoded(model.settings),
        "regularizers": list(model.regularizers),
        "progress": dataclasses.asdict(model.progress),
    }
    write_archive(path, content, model.tensors)


def read_model(
    path: str | Path | IO[bytes], hints: Mapping[str, Any], replaced: Mapping[str, Any]
) -> SavedModel:
    """The model of a file.

    Args:
        path: as :meth:`ReinFlow.load`.
        hints: types of the constructor's arguments that a file may set.
        replaced: arguments that count instead of the file's.

    Raises:
        CheckpointError: no such file, a damaged one, or one of something else.
    """
    with read_archive(path, "ReinFlow") as (read, stored):
        content = _content_of(read, path)
        try:
            settings = {**_decoded(hints, content.settings, replaced), **replaced}
            config = policy_config(content.policy)
        except ConfigError as error:
            raise CheckpointError(f"{path} does not describe a ReinFlow model: {error}") from error
        for name in (*_SCHEDULES, "update", "advantages"):
            if settings.get(name, 0 if name == "advantages" else None) is None:
                raise CheckpointError(
                    f"{path} was trained with a {name} of its user's own; give load() {name}=... again."
                )
        _check_tensors(stored, config, settings, path)
        tensors = stored.read(unbounded=BOUNDS)
    return SavedModel(config, settings, content.regularizers, content.progress, tensors)


@dataclass(frozen=True)
class _Content(Settings):
    """The content of ``config.json``."""

    policy: dict[str, Any]
    settings: dict[str, Any]
    regularizers: tuple[Annotated[str, _NAME], ...]
    progress: ReinFlowProgress
    algorithm: str = "ReinFlow"


def _encoded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON; None in place of what is the user's own: a schedule that is a function, a rule, a strategy."""
    encoded = {**settings, "noise": dataclasses.asdict(settings["noise"])}
    if "advantages" in encoded:
        strategy = settings["advantages"]
        named = [name for name, kind in ADVANTAGES.items() if kind is type(strategy)]
        encoded["advantages"] = {"name": named[0], **dataclasses.asdict(strategy)} if named else None
    for name in _SCHEDULES:
        encoded[name] = _encoded_schedule(settings[name])
    rule = settings["update"]
    is_known = UPDATE_RULES.get(rule.name) is type(rule)
    encoded["update"] = {"name": rule.name, **dataclasses.asdict(rule)} if is_known else None
    return encoded


def _encoded_schedule(schedule: Any) -> Any:
    """A number, the three numbers of a linear schedule, or None for another function."""
    if isinstance(schedule, LinearSchedule):
        return [schedule.start, schedule.end, schedule.end_fraction]
    return None if callable(schedule) else float(schedule)


def _decoded(
    hints: Mapping[str, Any], settings: Mapping[str, Any], replaced: Mapping[str, Any]
) -> dict[str, Any]:
    """The constructor's arguments; where the writer kept its logs says nothing about this machine."""
    decoded: dict[str, Any] = {}
    for name, value in settings.items():
        if name in replaced or name == "tensorboard_log":
            continue
        if name not in hints:
            raise ConfigError(unknown_key(name, [*hints]))
        if name == "noise":
            decoded[name] = build(NoiseConfig, checked(value, dict[str, Any], name), name)
        elif name == "update":
            decoded[name] = None if value is None else build_update_rule(checked(value, dict[str, Any], name))
        elif name == "advantages":
            known = None if value is None else checked(value, dict[str, Any], name)
            decoded[name] = None if known is None else build_advantages(known)
        elif name in _SCHEDULES:
            decoded[name] = _decoded_schedule(value, name)
        else:
            decoded[name] = checked(value, hints[name], name)
    return decoded


def _decoded_schedule(value: Any, name: str) -> Any:
    if value is None:
        return None
    numbers = checked(value if isinstance(value, list) else [value], tuple[float, ...], name)
    is_rate = all(0 <= number <= 1 for number in numbers) and len(numbers) in (1, 3) and numbers[-1] > 0
    require(is_rate, name, value, "a number in (0, 1], or start, end and the share of training between them")
    return LinearSchedule(*numbers) if isinstance(value, list) else numbers[0]


def _content_of(content: Mapping[str, Any], path: object) -> _Content:
    try:
        return build(_Content, content, "")
    except ConfigError as error:
        raise CheckpointError(f"{path} does not describe a ReinFlow model: {error}") from error


def _check_tensors(
    stored: StoredTensors, config: PolicyConfig, settings: Mapping[str, Any], path: object
) -> None:
    """Refuse tensors of other shapes than the settings say, before anything of that size is built."""

    def networks() -> FlowActorCritic:
        policy = FlowPolicy(config)
        chosen = {name: settings[name] for name in NETWORK_SETTINGS if name in settings}
        chosen["execute_horizon"] = chosen.get("execute_horizon") or policy.spec.execute_horizon
        return FlowActorCritic(*spaces_of(policy), flow_policy=policy, **chosen)

    try:
        shapes = {f"networks.{name}": shape for name, shape in shapes_of(networks).items()}
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")[:200]
        raise CheckpointError(f"{path} does not describe a ReinFlow model: {reason}.") from error
    shapes |= dict.fromkeys(BOUNDS, (config.action_dim,))
    rest = stored
    for name in OPTIMIZERS:
        rest = rest.without(name)
    has_state = rest.dtypes.get("generator") == "U8" and math.prod(rest.shapes["generator"]) < MOST_JSON
    if not has_state:
        raise CheckpointError(f"{path} lacks the state of its random numbers; the file is damaged.")
    rest.without("generator").require_shapes(shapes, CONFIG)
