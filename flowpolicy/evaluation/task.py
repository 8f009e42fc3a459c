"""A task: an environment if there is one, the observations and actions of a policy in it, and its metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from flowpolicy.data.task_texts import TASK_TEXT
from flowpolicy.errors import ConfigError, FlowPolicyError, TaskError
from flowpolicy.evaluation.allowed import check_choice
from flowpolicy.evaluation.rendering import refused_gl_choice
from flowpolicy.optional import missing, optional
from flowpolicy.policy.config import LONGEST, TASK_NAME
from flowpolicy.ranges import Allowed, PositiveInt, at_most, between, one_of
from flowpolicy.settings import Settings, build, require, unknown_key
from flowpolicy.texts import LONGEST_TEXT

METRICS = ("return", "success", "score")
_SAFE = Allowed(
    lambda safe: not isinstance(safe, str) or safe in ("", "hold", "zero"), "hold, zero or numbers"
)
SHORT_TEXT = Allowed(
    lambda text: isinstance(text, str) and len(text.encode("utf-8", "replace")) <= LONGEST_TEXT,
    f"a text of at most {LONGEST_TEXT} bytes",
)
"""What an instruction may be."""
EXTRAS = {
    "gym_pusht": "pusht",
    "pymunk": "pusht",
    "pygame": "pusht",
    "shapely": "pusht",
    "gymnasium_robotics": "adroit",
    "metaworld": "metaworld",
    "robosuite": "robomimic",
    "robomimic": "robomimic",
    "six": "robomimic",
    "egl_probe": "robomimic",
    "h5py": "import",
}
"""The extra that brings a simulator's module; any other comes with ``mujoco``."""


@dataclass(frozen=True)
class Task(Settings, prefix="env"):
    """What `configs/env/<name>.yaml` says of a task.

    Any Gymnasium environment with a Box action space will do, and an observation space that is a Box
    (the policy then sees one key, ``observation``) or a Dict of Boxes. These entries of ``info`` are
    read where the environment gives them: ``success`` (true at any step counts the episode as a
    success) and ``score`` (a number; the episode's score is its maximum). An environment that
    has several tasks names the current one in ``task``, and results are given for each.

    Attributes:
        name: short name, as in ``env=hopper``.
        env_id: Gymnasium id; ``module:id`` imports the module that registers it. None: there is no simulator,
            as for a robot of which there are recordings alone; policies are then judged on those.
        env_kwargs: keyword arguments of ``gymnasium.make``.
        obs_horizon: observation steps given to the policy, T_o.
        action_horizon: action chunk length, T.
        execute_horizon: actions executed per chunk, T_e <= T.
        control_hz: rate of the environment in 1/s.
        metric: what figures and plots show first: ``return``, ``success`` or ``score``.
        safe_action: what a real-time loop sends where it has no valid command: ``hold`` repeats the last one
            (position control), ``zero`` is no torque or velocity, numbers are a command. Empty: undeclared,
            and no loop will run it.
        instruction: what to do, in words: the observation ``task`` of an environment that does not say it.
        rotations: dimensions of an action that are absolute rotations, e.g. ``{rotation_vector: [3]}``: kind
            to the first dimension of each.
        action_bounds: lowest and highest value of each dimension of an action, where they are known.
    """

    name: Annotated[str, TASK_NAME]
    env_id: str | None
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    obs_horizon: Annotated[PositiveInt, at_most(LONGEST)] = 1
    action_horizon: Annotated[PositiveInt, at_most(LONGEST)] = 4
    execute_horizon: int = 4
    control_hz: Annotated[float, between(0.01, 10_000)] = 50.0
    metric: Annotated[str, one_of(METRICS)] = "return"
    safe_action: Annotated[str | tuple[float, ...], _SAFE] = ""
    rotations: dict[str, list[int]] = field(default_factory=dict)
    action_bounds: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    instruction: Annotated[str, SHORT_TEXT] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        longest, execute = self.action_horizon, self.execute_horizon
        allowed = f"between 1 and env.action_horizon = {longest}"
        require(1 <= execute <= longest, "env.execute_horizon", execute, allowed)
        if self.action_bounds is not None:
            low, high = self.action_bounds
            in_order = len(low) == len(high) > 0 and all(a <= b for a, b in zip(low, high, strict=True))
            allowed = "[[lowest, ...], [highest, ...]], one of each for every dimension of an action"
            require(in_order, "env.action_bounds", self.action_bounds, allowed)

    def check_actions(self, action_dim: int, where: object) -> None:
        """Refuse actions of another dimension than ``action_bounds`` says.

        Raises:
            ConfigError: names ``where`` they are.
        """
        if self.action_bounds is not None and len(self.action_bounds[0]) != action_dim:
            raise ConfigError(
                f"env.action_bounds has {len(self.action_bounds[0])} dimensions and the actions of {where} "
                f"have {action_dim}; correct it in the task's file, or leave it out."
            )

    def simulator(self) -> str:
        """The environment's id.

        Raises:
            TaskError: there is none.
        """
        if self.env_id is None:
            raise TaskError(
                f"Task '{self.name}' has no simulator (env_id is null): set env_id in its file to a "
                "Gymnasium environment for this, or try the policy on the robot with flowpolicy run-control "
                "robot=NAME."
            )
        return self.env_id

    def make(self, **kwargs: Any) -> Any:
        """Make the environment, as a :class:`~flowpolicy.evaluation.environment.StandardEnvironment`.

        Raises:
            TaskError: when there is no simulator, it is not installed, the id is unknown, or it refuses.
        """
        label = f"Task '{self.name}'"
        environment = make_environment(self.simulator(), {**self.env_kwargs, **kwargs}, label)
        from flowpolicy.evaluation.environment import standard

        return standard(environment, label, {TASK_TEXT: self.instruction} if self.instruction else None)


def make_environment(env_id: str, env_kwargs: Mapping[str, Any], label: str) -> Any:
    """The environment (``gymnasium.Env``) of an id; ``label`` is what messages call it.

    Raises:
        TaskError: when the simulator is not installed, the id is unknown, or the simulator refuses.
    """
    with optional(f"{label} needs gymnasium", "mujoco", TaskError):
        import gymnasium
    try:
        return gymnasium.make(env_id, **env_kwargs)
    except FlowPolicyError:
        raise
    except Exception as error:  # whatever a simulator raises
        name = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
        is_missing = isinstance(error, ModuleNotFoundError) and name in EXTRAS
        refused = None if is_missing else refused_gl_choice()
        if refused is not None:
            raise TaskError(f"{label} cannot be made: {refused}") from error
        if isinstance(error, ImportError):
            extra = EXTRAS.get(name, "mujoco")
            raise TaskError(missing(f"{label} needs {{name}}", extra, error.name)) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]
        raise TaskError(f"{label}: {env_id} cannot be made ({reason}).") from error


BESIDE_THE_TASK: dict[str, tuple[str, ...]] = {
    "observation_keys": (),
    "demonstrations": (),
    "demo_transform": (),
    "native": (),
    "pretrain": (
        "steps", "batch_size", "ema_decay", "num_envs", "validation_fraction", "normalization", "action_clip",
        "actions_per_token",
    ),
    "finetune": (
        "total_steps", "num_envs", "stagger", "n_steps", "learning_rate", "final_learning_rate", "gamma",
        "target_kl", "noise",
    ),
    "scripted": (),
    "expert": (),
    "medium": (),
}  # fmt: skip
"""What a task's file may hold besides the settings of :class:`Task`; and of some groups, their settings."""


def check_keys(settings: Mapping[str, Any]) -> None:
    """Refuse a key that a task's file must not have, as nothing would read it.

    Raises:
        ConfigError: names the nearest valid one.
    """
    known = [*(item.name for item in fields(Task)), *BESIDE_THE_TASK]
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(unknown_key(f"env.{key}", [f"env.{name}" for name in known]))
        inside = BESIDE_THE_TASK.get(key, ())
        for name in value if inside and isinstance(value, Mapping) else ():
            if name not in inside:
                raise ConfigError(
                    unknown_key(f"env.{key}.{name}", [f"env.{key}.{valid}" for valid in inside])
                )


def task_from(settings: Mapping[str, Any]) -> Task:
    """The task in an ``env`` node of a config or in a checkpoint; what else the node holds is left alone."""
    names = {item.name for item in fields(Task)}
    return build(Task, {key: value for key, value in settings.items() if key in names}, "env")


def task_of(
    trained_for: Mapping[str, Any], settings: Mapping[str, Any] | None, checkpoint: Path | str
) -> Task:
    """The task in ``settings``; where they name none, the one that a policy was ``trained_for``, with them.

    A user's settings may name any environment, a checkpoint's only those of
    :func:`~flowpolicy.evaluation.allowed.check_choice`.

    Raises:
        ConfigError: neither says one, or says it wrongly; the message names the ``checkpoint``.
        TaskError: the checkpoint chooses an environment that it may not choose.
    """
    settings = settings or {}
    if settings.keys() & {"name", "env_id"}:
        return task_from(settings)
    if not trained_for:
        raise ConfigError(f"{checkpoint} does not say which task it is for; name one, e.g. env=hopper.")
    try:
        task = task_from(trained_for)
    except ConfigError as error:
        raise ConfigError(
            f"{checkpoint} does not describe its task: {str(error).rstrip('.')}; name one, e.g. env=hopper."
        ) from error
    if task.env_id is not None:
        check_choice(task.env_id, task.env_kwargs, checkpoint)
    if not settings:
        return task
    keywords = settings.get("env_kwargs", {})
    if isinstance(keywords, Mapping):
        keywords = {**task.env_kwargs, **keywords}
    return task_from({**trained_for, **settings, "env_kwargs": keywords})
