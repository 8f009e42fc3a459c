"""An off-policy model in one file: a zip of ``config.json`` and ``model.safetensors``, without pickle."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

from torch import Tensor

from flowpolicy.errors import CheckpointError, ConfigError
from flowpolicy.files.reading import MOST_JSON, StoredTensors, shapes_of
from flowpolicy.finetuning.acting import spaces_of
from flowpolicy.finetuning.archive import CONFIG, read_archive, write_archive
from flowpolicy.finetuning.offpolicy.algorithms import ALGORITHMS, Algorithm, build_algorithm
from flowpolicy.finetuning.offpolicy.config import OffPolicySettings
from flowpolicy.finetuning.offpolicy.learner import OPTIMIZERS
from flowpolicy.finetuning.offpolicy.networks import SteeredActor
from flowpolicy.finetuning.progress import BOUNDS, Progress
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.policy import FlowPolicy
from flowpolicy.policy.config import PolicyConfig, policy_config
from flowpolicy.ranges import Allowed
from flowpolicy.settings import Settings, build, require

_KIND = "OffPolicy"


@dataclass(frozen=True)
class OffPolicyProgress(Progress):
    """And the range of rewards so far."""

    rewards: tuple[float, float]

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.rewards
        require(low <= 0 <= high, "progress.rewards", self.rewards, "a range with 0 in it")


@dataclass(frozen=True)
class SavedOffPolicy:
    """What the file holds.

    Attributes:
        policy: the policy's description, its steering included.
        algorithm: what is learnt.
        settings: shared by all algorithms.
        sampling: K, solver and grid.
        seed: of everything random.
        has_demonstrations: whether it learnt from demonstrations too.
        progress: how far training had come.
        tensors: the learner's, the replay's, and the bounds of the action space.
    """

    policy: PolicyConfig
    algorithm: Algorithm
    settings: OffPolicySettings
    sampling: SamplerSpec
    seed: int | None
    has_demonstrations: bool
    progress: OffPolicyProgress
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class _Content(Settings):
    """The content of ``config.json``."""

    policy: dict[str, Any]
    learns: dict[str, Any]
    settings: OffPolicySettings
    sampling: dict[str, Any]
    seed: Annotated[int, Allowed(lambda seed: 0 <= seed < 2**31, "between 0 and 2^31")] | None
    has_demonstrations: bool
    progress: OffPolicyProgress
    algorithm: str = _KIND


def write_model(model: SavedOffPolicy, path: str | Path | IO[bytes]) -> None:
    """Write a model; a file appears whole or not at all."""
    algorithm = model.algorithm
    if ALGORITHMS.get(algorithm.name) is not type(algorithm):
        raise ConfigError(
            f"The algorithm '{algorithm.name}' is not registered, so a file could not name it; put it into "
            "flowpolicy.finetuning.offpolicy.algorithms.ALGORITHMS."
        )
    content = {
        "algorithm": _KIND,
        "policy": model.policy.content(),
        "learns": {"name": algorithm.name, **dataclasses.asdict(algorithm)},  # type: ignore[call-overload]
        "settings": dataclasses.asdict(model.settings),
        "sampling": model.sampling.content(),
        "seed": model.seed,
        "has_demonstrations": model.has_demonstrations,
        "progress": dataclasses.asdict(model.progress),
    }
    write_archive(path, content, model.tensors)


def read_model(path: str | Path | IO[bytes]) -> SavedOffPolicy:
    """The model of a file.

    Raises:
        CheckpointError: no such file, a damaged one, or one of something else.
    """
    with read_archive(path, _KIND) as (read, stored):
        try:
            content = build(_Content, read, "")
            algorithm, config = build_algorithm(content.learns), policy_config(content.policy)
            sampling = build(SamplerSpec, content.sampling, "sampling")
            settings = content.settings
            expected = algorithm.steering(settings.members, settings.critic_hidden)
            allowed = "the one that its algorithm and settings make"
            require(config.steering == expected, "policy.steering", config.steering, allowed)
        except ConfigError as error:
            raise CheckpointError(f"{path} does not describe an off-policy model: {error}") from error
        _check_tensors(stored, config, algorithm, settings, sampling, path)
        tensors = stored.read(unbounded=BOUNDS)
    return SavedOffPolicy(
        config, algorithm, settings, sampling, content.seed, content.has_demonstrations, content.progress,
        tensors,
    )  # fmt: skip


def _check_tensors(
    stored: StoredTensors, config: PolicyConfig, algorithm: Algorithm, settings: OffPolicySettings,
    sampling: SamplerSpec, path: object,
) -> None:  # fmt: skip
    """Refuse tensors of other shapes than the settings say, before anything of that size is built."""

    def networks() -> SteeredActor:
        policy = FlowPolicy(config)
        return SteeredActor(
            *spaces_of(policy), flow_policy=policy, algorithm=algorithm, sampling=sampling,
            members=settings.members, hidden=settings.critic_hidden,
        )  # fmt: skip

    try:
        shapes = {f"networks.{name}": shape for name, shape in shapes_of(networks).items()}
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")[:200]
        raise CheckpointError(f"{path} does not describe an off-policy model: {reason}.") from error
    shapes |= dict.fromkeys(BOUNDS, (config.action_dim,))
    has_state = stored.dtypes.get("generator") == "U8" and math.prod(stored.shapes["generator"]) < MOST_JSON
    if not has_state:
        raise CheckpointError(f"{path} lacks the state of its random numbers; the file is damaged.")
    stored.without(OPTIMIZERS).without("replay").without("generator").require_shapes(shapes, CONFIG)
    rows = {shape[:1] for name, shape in stored.shapes.items() if name.startswith("replay.")}
    if len(rows) > 1 or any(count > (settings.buffer_size,) for count in rows):
        raise CheckpointError(f"{path} holds a replay that is not of one length; the file is damaged.")
