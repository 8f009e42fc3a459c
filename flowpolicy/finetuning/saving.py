"""A ReinFlow model in one file: a zip of ``config.json`` and ``model.safetensors``, without pickle."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

from safetensors.torch import load, save
from stable_baselines3.common.utils import LinearSchedule
from torch import Tensor

from flowpolicy.errors import CheckpointError, ConfigError, FlowPolicyError
from flowpolicy.files.reading import (
    MOST_JSON,
    StoredTensors,
    described_tensors,
    parse_json,
    shapes_of,
)
from flowpolicy.files.storage import atomic_file
from flowpolicy.finetuning.acting import spaces_of
from flowpolicy.finetuning.actor_critic import NETWORK_SETTINGS, FlowActorCritic
from flowpolicy.finetuning.archive import archive_of, no_model
from flowpolicy.finetuning.learner import OPTIMIZERS
from flowpolicy.finetuning.noise import NoiseConfig
from flowpolicy.finetuning.rules import UPDATE_RULES, build_update_rule
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig, policy_config
from flowpolicy.ranges import Allowed, at_most, within
from flowpolicy.settings import Settings, build, checked, require, shown, unknown_key

FORMAT_VERSION = 1
BOUNDS = ("action_low", "action_high")
_CONFIG, _TENSORS = "config.json", "model.safetensors"
_SCHEDULES = ("learning_rate", "critic_learning_rate")

_Count = Annotated[int, Allowed(lambda count: 0 <= count < 10**15, "a count")]
_NAME = Allowed(
    lambda name: 0 < len(name) <= 100 and name.isprintable(), "1 to 100 characters that can be printed"
)


@dataclass(frozen=True)
class Progress(Settings, prefix="progress"):
    """How far training had come."""

    num_timesteps: _Count
    total_timesteps: _Count
    remaining: Annotated[float, at_most(1)]
    iteration: _Count
    updates: _Count
    rate_factor: Annotated[float, within("(0, 1]")]
    return_scale: tuple[float, ...]
    seconds: dict[str, float]
    worker_restarts: _Count

    def __post_init__(self) -> None:
        super().__post_init__()
        scale = self.return_scale
        is_scale = len(scale) >= 3 and scale[0] >= 0 and scale[2] >= 0
        require(is_scale, "progress.return_scale", scale, "the moments of returns")


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
    progress: Progress
    tensors: dict[str, Tensor]


def write_model(model: SavedModel, path: str | Path | IO[bytes]) -> None:
    """Write a model; a file appears whole or not at all."""
    if isinstance(path, (str, Path)):
        with atomic_file(_with_suffix(path)) as temporary, temporary.open("wb") as stream:
            write_model(model, stream)
        return
    content = {
        "format_version": FORMAT_VERSION,
        "algorithm": "ReinFlow",
        "policy": model.policy.content(),
        "settings": _encoded(model.settings),
        "regularizers": list(model.regularizers),
        "progress": dataclasses.asdict(model.progress),
    }
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.tensors.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_CONFIG, json.dumps(content, indent=2) + "\n")
        archive.writestr(_TENSORS, save(stored))


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
    source: Any = path
    if isinstance(path, (str, Path)):
        source = Path(path) if Path(path).exists() else _with_suffix(path)
        if not source.exists():
            raise CheckpointError(f"There is no model at {source}; give the file that save() wrote.")
    with archive_of(source, {_CONFIG, _TENSORS}) as archive:
        content = _content_of(archive, path)
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
        stored = _tensors_of(archive, path)
        _check_tensors(stored, config, settings, path)
        tensors = stored.read(unbounded=BOUNDS)
    return SavedModel(config, settings, content.regularizers, content.progress, tensors)


@contextlib.contextmanager
def taking_over(path: object) -> Iterator[None]:
    """Say in one sentence that tensors do not fit the model that their own file describes."""
    try:
        yield
    except FlowPolicyError:
        raise
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} holds tensors that do not fit its own config; the file is damaged."
        ) from error


@dataclass(frozen=True)
class _Content(Settings):
    """The content of ``config.json``."""

    policy: dict[str, Any]
    settings: dict[str, Any]
    regularizers: tuple[Annotated[str, _NAME], ...]
    progress: Progress
    algorithm: str = "ReinFlow"


def _encoded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON; None in place of what is the user's own: a schedule that is a function, a rule, a strategy."""
    encoded = {**settings, "noise": dataclasses.asdict(settings["noise"])}
    if "advantages" in encoded:
        encoded["advantages"] = None
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
            require(value is None, name, value, "null: it is no part of a file")
            decoded[name] = None
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


def _content_of(archive: zipfile.ZipFile, path: object) -> _Content:
    if archive.getinfo(_CONFIG).file_size > MOST_JSON:
        raise no_model(path)
    content = parse_json(
        archive.read(_CONFIG), f"{_CONFIG} of {path}", "model", "give the file that save() wrote"
    )
    version, algorithm = content.pop("format_version", None), content.get("algorithm")
    if type(version) is not int:
        raise no_model(path)
    if algorithm != "ReinFlow" or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is of {shown(algorithm)} in format {version}, and this flowpolicy reads ReinFlow "
            f"up to {FORMAT_VERSION}; upgrade with: pip install -U flowpolicy."
        )
    try:
        return build(_Content, content, "")
    except ConfigError as error:
        raise CheckpointError(f"{path} does not describe a ReinFlow model: {error}") from error


def _tensors_of(archive: zipfile.ZipFile, path: object) -> StoredTensors:
    info = archive.getinfo(_TENSORS)
    with archive.open(info) as stream:
        return described_tensors(stream, info.file_size, str(path), lambda: dict(load(archive.read(info))))


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
    rest.without("generator").require_shapes(shapes, _CONFIG)


def _with_suffix(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix else path.with_name(f"{path.name}.zip")
