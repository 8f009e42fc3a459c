"""A ReinFlow model in one file: a zip of ``config.json`` and ``model.safetensors``, without pickle."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from safetensors import SafetensorError
from safetensors.torch import load, save
from stable_baselines3.common.utils import LinearSchedule
from torch import Tensor

from flowpolicy.errors import CheckpointError, ConfigError
from flowpolicy.finetuning.noise import NoiseConfig
from flowpolicy.finetuning.update import UPDATE_RULES, build_update_rule
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy_config import PolicyConfig, policy_config
from flowpolicy.seeds import derived_seed
from flowpolicy.settings import build
from flowpolicy.storage import atomic_file, load_optimizer, optimizer_tensors, under

if TYPE_CHECKING:
    from flowpolicy.finetuning.reinflow import ReinFlow

FORMAT_VERSION = 1
_CONFIG, _TENSORS = "config.json", "model.safetensors"
_SCHEDULES = ("learning_rate", "critic_learning_rate")
_OPTIMIZERS = ("actor_optimizer", "critic_optimizer")


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
    content, tensors = _read(path)
    try:
        settings = {**_decoded(content["settings"], replaced), **replaced}
        config: PolicyConfig = policy_config(dict(content["policy"]))
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} does not describe a ReinFlow model ({error}).") from error
    for name in (*_SCHEDULES, "update"):
        if settings[name] is None:
            raise CheckpointError(
                f"{path} was trained with a {name} of its user's own; give load() {name}=... again."
            )
    model = cls(FlowPolicy(config), env, device=device, **settings)
    given = {term.name for term in model.regularizers}
    model.lost_regularizers = tuple(name for name in content["regularizers"] if name not in given)
    try:
        _restore(model, content["progress"], tensors)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} holds tensors that do not fit its own config; the file is damaged."
        ) from error
    return model


def _restore(model: ReinFlow, progress: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    model.actor_critic.load_state_dict(under(tensors, "networks"))
    for name in _OPTIMIZERS:
        load_optimizer(getattr(model.learner, name), under(tensors, name))
    state = tensors["generator"]
    if model.processes.rank == 0 and len(state) == len(model.generator.get_state()):
        model.generator.set_state(state)
    else:  # another process's stream, or another device's kind of state
        purpose = ("chains", model.processes.rank, int(progress["iteration"]))
        model.generator.manual_seed(derived_seed(model.seed or 0, *purpose))
    model.num_timesteps = int(progress["num_timesteps"])
    model._total_timesteps = int(progress["total_timesteps"])
    model._current_progress_remaining = float(progress["remaining"])
    model.iteration, model._n_updates = int(progress["iteration"]), int(progress["updates"])
    model.learner.rate_factor = float(progress["rate_factor"])
    model.scale.merge(*map(float, progress["return_scale"]))
    model.restarts_before = int(progress["worker_restarts"])
    model.seconds.update({name: float(value) for name, value in progress["seconds"].items()})
    if model.env is None:
        low, high = tensors["action_low"].numpy(), tensors["action_high"].numpy()
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
        "policy": dataclasses.asdict(model.actor_critic.flow_policy.config),
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


def _decoded(settings: dict[str, Any], replaced: dict[str, Any]) -> dict[str, Any]:
    decoded = dict(settings)
    for name in _SCHEDULES:
        if isinstance(decoded[name], list):
            decoded[name] = LinearSchedule(*decoded[name])
    decoded["noise"] = build(NoiseConfig, decoded["noise"], "noise")
    if decoded["update"] is not None and "update" not in replaced:
        decoded["update"] = build_update_rule(decoded["update"])
    decoded["critic_hidden"] = tuple(decoded["critic_hidden"])
    return decoded


def _read(path: str | Path | IO[bytes]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    source: Any = path
    if isinstance(path, (str, Path)):
        source = Path(path) if Path(path).is_file() else _with_suffix(path)
        if not source.is_file():
            raise CheckpointError(f"There is no model at {source}; give the file that save() wrote.")
    try:
        with zipfile.ZipFile(source) as archive:
            content = json.loads(archive.read(_CONFIG))
            tensors = load(archive.read(_TENSORS))
        is_ours, version = content["algorithm"] == "ReinFlow", int(content["format_version"])
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is no ReinFlow model, or a damaged one; give the file that save() wrote."
        ) from error
    if not is_ours or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is of {content['algorithm']} in format {version}, and this flowpolicy reads ReinFlow "
            f"up to {FORMAT_VERSION}; upgrade with: pip install -U flowpolicy."
        )
    return content, tensors


def _with_suffix(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix else path.with_name(f"{path.name}.zip")
