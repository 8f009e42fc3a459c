"""What defines a policy besides its weights: the ``config.json`` of a checkpoint."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowpolicy.data.normalization import LARGEST_CLIP, MODES
from flowpolicy.errors import CheckpointError, ConfigError
from flowpolicy.files.reading import read_json
from flowpolicy.flow import build_objective
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.models.network import NetworkConfig
from flowpolicy.observations import is_image
from flowpolicy.settings import build, require, shown

FORMAT_VERSION = 2
MOST_KEYS, MOST_NUMBERS, MOST_PIXELS = 100, 100_000, 2048
"""Observation keys of a policy, numbers of one that is no image, pixels a side of one that is."""
LONGEST = 1_000
"""Steps of a history, actions of a chunk, dimensions of an action."""
TASK_NAME = re.compile(r"[\w.+\- ]{1,100}")
"""What a task may be called: in file names, titles and messages."""


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """What defines a policy besides its weights; the content of a checkpoint's ``config.json``.

    Attributes:
        objective: name and settings of the objective (``flow_matching``, ``shortcut``, ...).
        model: sizes of the network.
        observation_shapes: key -> shape of one step.
        action_dim: A.
        obs_horizon: T_o.
        action_horizon: T.
        execute_horizon: T_e, actions executed before replanning.
        observation_normalization: mode of the observations' normalisers.
        action_normalization: mode of the actions' normaliser.
        action_clip: bound of an action in normalised units; 1 is the demonstrated range under ``minmax`` and
            ``quantile``.
        tuned: K, solver and grid that the weights are valid for, after fine-tuning; None: any.
        task: the task's settings, so that a checkpoint can be evaluated by itself.
        metadata: where it comes from (demonstrations, their mean return, training steps, ...).
    """

    objective: dict[str, Any]
    model: NetworkConfig
    observation_shapes: dict[str, tuple[int, ...]]
    action_dim: int
    obs_horizon: int
    action_horizon: int
    execute_horizon: int
    observation_normalization: str = "minmax"
    action_normalization: str = "minmax"
    action_clip: float = 1.0
    tuned: SamplerSpec | None = None
    task: dict[str, Any] = dataclasses.field(default_factory=dict)
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        require(
            1 <= len(self.observation_shapes) <= MOST_KEYS, "the number of observation_shapes",
            len(self.observation_shapes), f"between 1 and {MOST_KEYS}",
        )  # fmt: skip
        for key, shape in self.observation_shapes.items():
            _check_shape(key, shape)
        for name in ("observation_normalization", "action_normalization"):
            require(getattr(self, name) in MODES, name, getattr(self, name), f"one of {', '.join(MODES)}")
        for name in ("action_dim", "obs_horizon", "action_horizon"):
            value = getattr(self, name)
            require(1 <= value <= LONGEST, name, value, f"between 1 and {LONGEST}")
        require(
            1 <= self.execute_horizon <= self.action_horizon, "execute_horizon", self.execute_horizon,
            f"between 1 and action_horizon = {self.action_horizon}",
        )  # fmt: skip
        clip = self.action_clip
        require(0 < clip <= LARGEST_CLIP, "action_clip", clip, f"above 0 and at most {LARGEST_CLIP:g}")

        name = self.task.get("name", "unnamed")
        is_name = isinstance(name, str) and TASK_NAME.fullmatch(name) is not None
        require(is_name, "task.name", name, "1 to 100 letters, digits, spaces and any of . + - _")

    def sampling(self) -> SamplerSpec:
        """The policy's own way of sampling: the one it was tuned for, or the objective's default.

        Raises:
            ConfigError: the objective is none, or cannot be sampled so.
        """
        objective = build_objective(self.objective)
        default = SamplerSpec(num_steps=objective.default_num_steps, solver="euler")
        own = default if self.tuned is None else self.tuned.filled(default)
        objective.check(own)
        return own

    def content(self) -> dict[str, Any]:
        """What a JSON file says of it."""
        content = dataclasses.asdict(self)
        content["tuned"] = None if self.tuned is None else self.tuned.content()
        return content


def _check_shape(key: str, shape: tuple[int, ...]) -> None:
    is_key = 0 < len(key) <= 200 and key.isprintable()
    require(is_key, "an observation's key", key, "1 to 200 characters that can be printed")
    name = f"observation_shapes.{key[:80]}"
    require(all(side >= 1 for side in shape), name, shape, "of sides of at least 1")
    if is_image(shape):
        require(max(shape) <= MOST_PIXELS, name, shape, f"an image of at most {MOST_PIXELS} pixels a side")
    else:
        size = math.prod(shape)
        require(size <= MOST_NUMBERS, name, shape, f"a vector of at most {MOST_NUMBERS:,} numbers")


def policy_config(content: Mapping[str, Any]) -> PolicyConfig:
    """A config from the content of a JSON file.

    Raises:
        ConfigError: an unknown, missing or malformed entry, or one out of range.
    """
    content = dict(content)
    # Format 1 had the two by themselves, and its reader gave files without them these defaults.
    names = {"tuned_num_steps": "num_steps", "tuned_solver": "solver"}
    old = {name: content.pop(key) for key, name in names.items() if key in content}
    tuned = build(SamplerSpec, {"solver": "euler", **old}, "config")
    if tuned.num_steps is not None:
        content["tuned"] = {"num_steps": tuned.num_steps, "solver": tuned.solver}
    config = build(PolicyConfig, content, "config")
    config.sampling()
    return config


def read_config(file: Path) -> PolicyConfig:
    """The config of a checkpoint.

    Raises:
        CheckpointError: missing, damaged, of a newer format, or no policy's.
    """
    if not file.exists():
        raise CheckpointError(f"{file.parent} has no config.json; it is not a policy checkpoint.")
    content = read_json(file, "checkpoint")
    version = content.pop("format_version", None)
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{file} has no format_version; it is not a flowpolicy checkpoint.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format {shown(version)} and this flowpolicy reads up to {FORMAT_VERSION}; "
            "upgrade with: pip install -U flowpolicy."
        )
    try:
        return policy_config(content)
    except ConfigError as error:
        raise CheckpointError(f"{file} does not describe a policy: {error}") from error
