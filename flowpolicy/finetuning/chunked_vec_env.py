"""Environments that execute whole chunks, seen as a vectorised environment of stable-baselines3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from flowpolicy.errors import ConfigError, FlowPolicyError
from flowpolicy.finetuning.chunk_env import ChunkEnv
from flowpolicy.finetuning.chunk_workers import WorkerChunks


def refuse_other_environments(env: Any) -> None:
    """Raise a ConfigError for what is no environment, no id of one, and no stable-baselines3 ``VecEnv``."""
    if env is None or isinstance(env, str | gymnasium.Env | VecEnv):
        return
    kind = type(env).__name__
    if isinstance(env, type):
        kind = f"the class {env.__name__}"
    elif isinstance(env, gymnasium.vector.VectorEnv):
        kind = f"Gymnasium's vector environment {kind}"
    raise ConfigError(
        f"env is {kind}; it must be a Gymnasium environment, its id, or several as "
        "stable_baselines3.common.env_util.make_vec_env(id, n_envs=16) makes them."
    )


class ChunkedVecEnv(VecEnv):
    """A ``VecEnv`` over a :class:`flowpolicy.finetuning.chunk_env.ChunkEnv`.

    ReinFlow takes ``chunks`` out and sends whole chunks. For everyone else, such as ``evaluate_policy``, each
    ``step`` is a chunk of one action, with the infos that stable-baselines3 defines.

    Args:
        chunks: the environments; histories may be longer than one observation.
    """

    def __init__(self, chunks: ChunkEnv) -> None:
        self.chunks = chunks
        self._is_plain = not hasattr(chunks.observation_space, "spaces")
        self._seed: int | None = None
        self._actions: NDArray[Any] = np.zeros(0)
        super().__init__(chunks.num_envs, chunks.observation_space, chunks.action_space)

    @classmethod
    def in_processes(
        cls,
        make_envs: Sequence[Callable[[], Any]],
        num_workers: int,
        keys: Sequence[str] = ("observation",),
        obs_horizon: int = 1,
    ) -> ChunkedVecEnv:
        """Environments spread over ``num_workers`` processes, a dead one of which is replaced."""
        return cls(WorkerChunks(make_envs, num_workers, keys, obs_horizon))

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seed all environments at the next reset; see :meth:`ChunkEnv.reset`."""
        self._seed = seed
        return [seed] * self.num_envs

    def reset(self) -> Any:
        """First observations of new episodes."""
        seed, self._seed = self._seed, None
        return self._newest(self.chunks.reset(seed))

    def step_async(self, actions: NDArray[Any]) -> None:
        """Remember the actions ``(N, A)``."""
        self._actions = np.asarray(actions)

    def step_wait(self) -> Any:
        """Execute them; observations, rewards, dones and infos."""
        step = self.chunks.step(self._actions[:, None])
        dones = step.terminated | step.truncated
        infos: list[dict[str, Any]] = [{} for _ in dones]
        finals = self._newest(step.final_observation)
        for row in np.flatnonzero(dones).tolist():
            final = finals[row] if self._is_plain else {key: value[row] for key, value in finals.items()}
            infos[row] = {"terminal_observation": final, "TimeLimit.truncated": bool(step.truncated[row])}
        for row in np.flatnonzero(step.success).tolist():
            infos[row]["success"] = True
        whole = np.flatnonzero(dones & ~step.restarted).tolist()
        for row, episode in zip(whole, self.chunks.pop_episodes(), strict=True):
            infos[row]["episode"] = {"r": episode.ret, "l": episode.length, "t": 0.0}
        return self._newest(step.observation), step.rewards[:, 0], dones, infos

    def close(self) -> None:
        """Close the environments."""
        self.chunks.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """``render_mode``, which is None; nothing else of an environment elsewhere can be reached."""
        if attr_name == "render_mode":
            return [None] * self.num_envs
        raise AttributeError(f"'{attr_name}' of environments in other processes cannot be reached.")

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Refused."""
        raise FlowPolicyError(
            f"'{attr_name}' cannot be set in environments that execute chunks; set it where they are made."
        )

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> Any:
        """Refused."""
        raise FlowPolicyError(
            f"'{method_name}' cannot be called in environments that execute chunks; call it where they are "
            "made."
        )

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Whether an episode's true return is in the infos, which is what a Monitor is asked for."""
        from stable_baselines3.common.monitor import Monitor

        return [wrapper_class is Monitor] * self.num_envs

    def _newest(self, histories: dict[str, NDArray[Any]]) -> Any:
        newest = {key: history[:, -1] for key, history in histories.items()}
        return newest["observation"] if self._is_plain else newest
