"""A ReinFlow model in one file: a zip of ``config.json`` and ``model.safetensors``, without pickle."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
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
from flowpolicy.files.storage import atomic_file, load_optimizer, optimizer_tensors, under
from flowpolicy.finetuning.actor_critic import FlowActorCritic, spaces_of
from flowpolicy.finetuning.archive import archive_of, no_model
from flowpolicy.finetuning.noise import NoiseConfig
from flowpolicy.finetuning.update import UPDATE_RULES, build_update_rule
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig, policy_config
from flowpolicy.runs.seeds import derived_seed
from flowpolicy.settings import build, checked, require, shown, unknown_key

if TYPE_CHECKING:
    from flowpolicy.finetuning.reinflow import ReinFlow

FORMAT_VERSION = 1
_CONFIG, _TENSORS = "config.json", "model.safetensors"
_SCHEDULES = ("learning_rate", "critic_learning_rate")
_OPTIMIZERS = ("actor_optimizer", "critic_optimizer")
_BOUNDS = ("action_low", "action_high")


def write_model(model: ReinFlow, path: str | Path | IO[bytes]) -> None:
    """Write networks, optimisers, settings and counters; a file appears whole or not at all."""
    if isinstance(path, (str, Path)):
        with atomic_file(_with_suffix(path)) as temporary, temporary.open("wb") as stream:
            write_model(model, stream)
        return
    tensors = {f"networks.{name}": value for name, value in model.actor_critic.state_dict().items()}
    for name in _OPTIMIZERS:
        tensors.update(optimizer_tensors(getattr(model.learner, name), name))
    tensors["generator"] = model.generator.get_state()
    assert isinstance(model.action_space, spaces.Box)
    tensors["action_low"] = torch.as_tensor(model.action_space.low)
    tensors["action_high"] = torch.as_tensor(model.action_space.high)
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_CONFIG, json.dumps(_content(model), indent=2) + "\n")
        archive.writestr(_TENSORS, save(stored))


def read_model(
    cls: type[ReinFlow],
    path: str | Path | IO[bytes],
    env: Any,
    device: torch.device | str,
    replaced: dict[str, Any],
) -> ReinFlow:
    """The model of a file, with ``replaced`` settings; see :meth:`ReinFlow.load`."""
    source: Any = path
    if isinstance(path, (str, Path)):
        source = Path(path) if Path(path).exists() else _with_suffix(path)
        if not source.exists():
            raise CheckpointError(f"There is no model at {source}; give the file that save() wrote.")
    with archive_of(source, {_CONFIG, _TENSORS}) as archive:
        content = _content_of(archive, path)
        try:
            settings = {**_decoded(cls, content.settings, replaced), **replaced}
            config = policy_config(content.policy)
        except ConfigError as error:
            raise CheckpointError(f"{path} does not describe a ReinFlow model: {error}") from error
        for name in (*_SCHEDULES, "update"):
            if settings.get(name) is None:
                raise CheckpointError(
                    f"{path} was trained with a {name} of its user's own; give load() {name}=... again."
                )
        stored = _tensors_of(archive, path)
        _check_tensors(stored, config, settings, path)
        tensors = stored.read(unbounded=_BOUNDS)
    try:
        model = cls(FlowPolicy(config), env, device=device, **settings)
    except ConfigError as error:
        if replaced:
            raise
        raise CheckpointError(f"{path} does not describe a ReinFlow model: {error}") from error
    given = {term.name for term in model.regularizers}
    model.lost_regularizers = tuple(name for name in content.regularizers if name not in given)
    try:
        _restore(model, content.progress, tensors)
        model.actor_critic.flow_policy.check_normalizers(path)
    except FlowPolicyError:
        raise
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} holds tensors that do not fit its own config; the file is damaged."
        ) from error
    return model


@dataclasses.dataclass(frozen=True)
class _Progress:
    """How far training had come."""

    num_timesteps: int
    total_timesteps: int
    remaining: float
    iteration: int
    updates: int
    rate_factor: float
    return_scale: tuple[float, ...]
    seconds: dict[str, float]
    worker_restarts: int

    def __post_init__(self) -> None:
        for name in ("num_timesteps", "total_timesteps", "iteration", "updates", "worker_restarts"):
            require(0 <= getattr(self, name) < 10**15, f"progress.{name}", getattr(self, name), "a count")
        require(self.remaining <= 1, "progress.remaining", self.remaining, "at most 1")
        require(0 < self.rate_factor <= 1, "progress.rate_factor", self.rate_factor, "in (0, 1]")
        is_scale = len(self.return_scale) >= 3 and self.return_scale[0] >= 0 and self.return_scale[2] >= 0
        allowed = "the moments of returns"
        require(is_scale, "progress.return_scale", self.return_scale, allowed)


@dataclasses.dataclass(frozen=True)
class _Content:
    """The content of ``config.json``."""

    policy: dict[str, Any]
    settings: dict[str, Any]
    regularizers: tuple[str, ...]
    progress: _Progress
    algorithm: str = "ReinFlow"

    def __post_init__(self) -> None:
        for name in self.regularizers:
            is_name = 0 < len(name) <= 100 and name.isprintable()
            require(is_name, "a regularizer's name", name, "1 to 100 characters that can be printed")


def _restore(model: ReinFlow, progress: _Progress, tensors: dict[str, Tensor]) -> None:
    model.actor_critic.load_state_dict(under(tensors, "networks"))
    for name in _OPTIMIZERS:
        load_optimizer(getattr(model.learner, name), under(tensors, name))
    state = tensors["generator"]
    if model.processes.rank == 0 and len(state) == len(model.generator.get_state()):
        model.generator.set_state(state)
    else:  # another process's stream, or another device's kind of state
        purpose = ("chains", model.processes.rank, progress.iteration)
        model.generator.manual_seed(derived_seed(model.seed or 0, *purpose))
    model.num_timesteps = progress.num_timesteps
    model._total_timesteps = progress.total_timesteps
    model._current_progress_remaining = progress.remaining
    model.iteration, model._n_updates = progress.iteration, progress.updates
    model.learner.rate_factor = progress.rate_factor
    model.scale.merge(*progress.return_scale)
    model.restarts_before = progress.worker_restarts
    model.seconds.update({name: progress.seconds.get(name, 0.0) for name in model.seconds})
    if model.env is None:
        low, high = (tensors[name].numpy() for name in _BOUNDS)
        space = spaces.Box(low, high, dtype=np.float32)
        model.action_space = model.actor_critic.action_space = space


def _content(model: ReinFlow) -> dict[str, Any]:
    settings = dict(model.settings)
    for name in _SCHEDULES:
        settings[name] = _encoded_schedule(settings[name])
    settings["noise"] = dataclasses.asdict(model.noise)
    settings["update"] = None
    if type(model.update) in UPDATE_RULES.values():
        settings["update"] = {"name": model.update.name, **dataclasses.asdict(model.update)}  # type: ignore[call-overload]
    return {
        "format_version": FORMAT_VERSION,
        "algorithm": "ReinFlow",
        "policy": model.actor_critic.flow_policy.config.content(),
        "settings": settings,
        "regularizers": [term.name for term in model.regularizers],
        "progress": {
            "num_timesteps": model.num_timesteps,
            "total_timesteps": model._total_timesteps,
            "remaining": model._current_progress_remaining,
            "iteration": model.iteration,
            "updates": model._n_updates,
            "rate_factor": model.learner.rate_factor,
            "return_scale": list(model.scale.state()),
            "seconds": model.seconds,
            "worker_restarts": model.worker_restarts,
        },
    }


def _encoded_schedule(schedule: Any) -> Any:
    """A number, the three numbers of a linear schedule, or None for another function."""
    if isinstance(schedule, LinearSchedule):
        return [schedule.start, schedule.end, schedule.end_fraction]
    return None if callable(schedule) else float(schedule)


def _decoded(cls: type[ReinFlow], settings: Mapping[str, Any], replaced: dict[str, Any]) -> dict[str, Any]:
    """The constructor's arguments; where the writer kept its logs says nothing about this machine."""
    hints = typing.get_type_hints(cls.__init__)
    for given in ("return", "policy", "env", "device", "processes", "regularizers"):
        hints.pop(given, None)  # the reader's
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
        horizon = settings.get("execute_horizon") or policy.spec.execute_horizon
        names = ("num_steps", "noise", "critic_hidden", "image_encoder", "critic_encoder")
        chosen = {name: settings[name] for name in names if name in settings}
        return FlowActorCritic(*spaces_of(policy), flow_policy=policy, execute_horizon=horizon, **chosen)

    try:
        shapes = {f"networks.{name}": shape for name, shape in shapes_of(networks).items()}
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")[:200]
        raise CheckpointError(f"{path} does not describe a ReinFlow model: {reason}.") from error
    shapes |= dict.fromkeys(_BOUNDS, (config.action_dim,))
    rest = stored
    for name in _OPTIMIZERS:
        rest = rest.without(name)
    has_state = rest.dtypes.get("generator") == "U8" and math.prod(rest.shapes["generator"]) < MOST_JSON
    if not has_state:
        raise CheckpointError(f"{path} lacks the state of its random numbers; the file is damaged.")
    rest.without("generator").require_shapes(shapes, _CONFIG)


def _with_suffix(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix else path.with_name(f"{path.name}.zip")
