"""What defines a policy besides its weights: the ``config.json`` of a checkpoint."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from flowpolicy.data.normalization import LARGEST_CLIP, MODES
from flowpolicy.errors import CheckpointError, ConfigError
from flowpolicy.features import Feature, features_of, undeclared
from flowpolicy.files.hub import download
from flowpolicy.files.reading import read_json
from flowpolicy.flow import build_objective
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.models.network import NetworkConfig
from flowpolicy.policy.action_space import ActionConfig
from flowpolicy.ranges import Allowed, between, one_of, positive_to
from flowpolicy.settings import Settings, build, checked, require, shown

FORMAT_VERSION = 2
MOST_KEYS = 100
"""Observations of a policy."""
LONGEST = 1_000
"""Steps of a history, actions of a chunk, dimensions of an action."""
TASK_NAME = Allowed(
    lambda name: isinstance(name, str) and re.fullmatch(r"[\w.+\- ]{1,100}", name) is not None,
    "1 to 100 letters, digits, spaces and any of . + - _",
)
"""What a task may be called: in file names, titles and messages."""


@dataclasses.dataclass(frozen=True)
class PolicyConfig(Settings):
    """What defines a policy besides its weights; the content of a checkpoint's ``config.json``.

    Attributes:
        objective: name and settings of the objective (``flow_matching``, ``shortcut``, ...).
        model: sizes of the network.
        observations: key -> kind and shape of one step. A shape alone is taken for what it would be in a
            file that declares no kinds; see :func:`~flowpolicy.features.undeclared`.
        action_dim: A.
        obs_horizon: T_o.
        action_horizon: T.
        execute_horizon: T_e, actions executed per chunk.
        observation_normalization: mode of the observations' normalisers.
        action_normalization: mode of the actions' normaliser.
        action_clip: bound of an action in normalised units; 1 is the demonstrated range under ``minmax`` and
            ``quantile``.
        actions: how commands are learnt; what a policy takes and gives are absolute commands.
        steering: ``name`` and settings of what is learnt around the flow; see
            :mod:`flowpolicy.policy.steering`.
        tuned: K, solver and grid that the weights are valid for, after fine-tuning; None: any.
        task: the task's settings, so that a checkpoint can be evaluated by itself.
        metadata: where it comes from (demonstrations, their mean return, training steps, ...).
    """

    objective: dict[str, Any]
    model: NetworkConfig
    observations: dict[str, Feature]
    action_dim: Annotated[int, between(1, LONGEST)]
    obs_horizon: Annotated[int, between(1, LONGEST)]
    action_horizon: Annotated[int, between(1, LONGEST)]
    execute_horizon: int
    observation_normalization: Annotated[str, one_of(MODES)] = "minmax"
    action_normalization: Annotated[str, one_of(MODES)] = "minmax"
    action_clip: Annotated[float, positive_to(LARGEST_CLIP)] = 1.0
    actions: ActionConfig = dataclasses.field(default_factory=ActionConfig)
    steering: dict[str, Any] | None = None
    tuned: SamplerSpec | None = None
    task: dict[str, Any] = dataclasses.field(default_factory=dict)
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.observations)
        require(1 <= count <= MOST_KEYS, "the number of observations", count, f"between 1 and {MOST_KEYS}")
        features = {
            key: feature if isinstance(feature, Feature) else undeclared(key, feature)
            for key, feature in self.observations.items()
        }
        object.__setattr__(self, "observations", features)
        for key, feature in features.items():
            is_key = 0 < len(key) <= 200 and key.isprintable()
            require(is_key, "an observation's key", key, "1 to 200 characters that can be printed")
            sides = all(side >= 1 for side in feature.shape)
            require(sides, f"observations.{key[:80]}", feature.shape, "of sides of at least 1")
            feature.check_declaration(key)
        self.actions.check(self.action_dim, features)
        self.draws()
        allowed = f"between 1 and action_horizon = {self.action_horizon}"
        execute = self.execute_horizon
        require(1 <= execute <= self.action_horizon, "execute_horizon", execute, allowed)
        name = self.task.get("name", "unnamed")
        require(TASK_NAME.holds(name), "task.name", name, TASK_NAME.words)

    def sampling(self) -> SamplerSpec:
        """The policy's own way of sampling: the one it was tuned for, or the objective's default.

        Raises:
            ConfigError: the objective is none, or cannot be sampled so.
        """
        objective = build_objective(self.objective)
        default = objective.default_sampling()
        own = default if self.tuned is None else self.tuned.filled(default)
        objective.check(own)
        return own

    def draws(self) -> int:
        """How many x_0 a chunk takes.

        Raises:
            ConfigError: the steering is none.
        """
        if self.steering is None:
            return 1
        from flowpolicy.policy.steering import steering_config  # late: it brings the encoders

        return steering_config(self.steering)[1].draws

    def content(self) -> dict[str, Any]:
        """What a JSON file says of it."""
        content = dataclasses.asdict(self)
        content["observations"] = {key: feature.content() for key, feature in self.observations.items()}
        if self.actions == ActionConfig():
            del content["actions"]  # which older readers do not know
        if self.steering is None:
            del content["steering"]  # likewise
        content["tuned"] = None if self.tuned is None else self.tuned.content()
        return content


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
    if "observations" not in content and "observation_shapes" in content:  # format 1 had no kinds
        shapes = checked(content.pop("observation_shapes"), dict[str, tuple[int, ...]], "observation_shapes")
        content["observations"] = features_of(shapes)
    config = build(PolicyConfig, content, "config")
    config.sampling()
    return config


def checkpoint_folder(path: Path | str) -> Path:
    """The folder of a checkpoint, downloaded where ``path`` is no folder but ``user/name`` on the Hub.

    Raises:
        CheckpointError: it is neither, or the folder of a whole run.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.exists() or str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
            raise CheckpointError(
                f"No checkpoint at {path}; give a folder with config.json and model.safetensors."
            )
        folder = download(str(path))
    inner = folder / "checkpoint"
    if (inner / "config.json").is_file() and not (folder / "model.safetensors").exists():
        raise CheckpointError(f"{path} is a run's folder; its policy is {inner}, give that.")
    return folder


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
