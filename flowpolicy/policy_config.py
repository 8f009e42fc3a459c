"""What defines a policy besides its weights: the ``config.json`` of a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from flowpolicy.data.normalization import LARGEST_CLIP, MODES
from flowpolicy.errors import CheckpointError, ConfigError
from flowpolicy.flow import build_objective
from flowpolicy.models.config import ModelConfig
from flowpolicy.settings import build, require

FORMAT_VERSION = 1


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
        tuned_num_steps: the only K the weights are valid for, after fine-tuning; None: any K.
        tuned_solver: the solver they were tuned with.
        task: the task's settings, so that a checkpoint can be evaluated by itself.
        metadata: where it comes from (demonstrations, their mean return, training steps, ...).
    """

    objective: dict[str, Any]
    model: ModelConfig
    observation_shapes: dict[str, tuple[int, ...]]
    action_dim: int
    obs_horizon: int
    action_horizon: int
    execute_horizon: int
    observation_normalization: str = "minmax"
    action_normalization: str = "minmax"
    action_clip: float = 1.0
    tuned_num_steps: int | None = None
    tuned_solver: str = "euler"
    task: dict[str, Any] = dataclasses.field(default_factory=dict)
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in self.observation_shapes:
            require(isinstance(key, str) and key != "", "an observation's key", key, "text, and not empty")
        for name in ("observation_normalization", "action_normalization"):
            require(getattr(self, name) in MODES, name, getattr(self, name), f"one of {', '.join(MODES)}")
        clip = self.action_clip
        require(0 < clip <= LARGEST_CLIP, "action_clip", clip, f"above 0 and at most {LARGEST_CLIP:g}")


def policy_config(content: dict[str, Any]) -> PolicyConfig:
    """A config from the content of a JSON file.

    Raises:
        ConfigError: an unknown, missing or malformed entry (or KeyError, TypeError, AttributeError of one).
    """
    shapes = {key: tuple(shape) for key, shape in content["observation_shapes"].items()}
    return build(PolicyConfig, {**content, "observation_shapes": shapes}, "config")


def read_config(file: Path) -> PolicyConfig:
    """The config of a checkpoint.

    Raises:
        CheckpointError: missing, damaged, of a newer format, or no policy's.
    """
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.parent} has no config.json; it is not a policy checkpoint.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not readable JSON; the checkpoint is damaged.") from error
    if not isinstance(content, dict) or not isinstance(content.get("format_version"), int):
        raise CheckpointError(f"{file} has no format_version; it is not a flowpolicy checkpoint.")
    version = content.pop("format_version")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format {version} and this flowpolicy reads up to {FORMAT_VERSION}; "
            "upgrade with: pip install -U flowpolicy."
        )
    try:
        config = policy_config(content)
        build_objective(config.objective)
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        sentence = str(error) if isinstance(error, ConfigError) else f"{error!r} is missing or malformed."
        raise CheckpointError(f"{file} does not describe a policy: {sentence}") from error
    return config
