"""Gymnasium's locomotion tasks (MuJoCo, v5) from their states: what ``step`` says, for many steps at once.

Operations come in the order of Gymnasium's, so that the results are its own to the last bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.envs.mujoco.humanoid_v5 import HumanoidEnv
from gymnasium.envs.mujoco.walker2d_v5 import Walker2dEnv

from flowpolicy.finetuning.native_environments import NativeTask, Outcomes, Quantities

_COST = np.result_type(np.float32(0), 0.0)
"""Of a float32 number times a Python one: float64 up to NumPy 1, float32 from NumPy 2 on."""


def _after(quantities: Quantities, name: str) -> np.ndarray:
    """``(N, T_e, ...)``, flat after each step."""
    rows = quantities[name][:, 1:]
    return rows.reshape(*rows.shape[:2], -1)


def _control_cost(env: Any, actions: np.ndarray) -> np.ndarray:
    squares = np.square(actions).sum(axis=-1)
    return env._ctrl_cost_weight * (squares.astype(_COST) if squares.dtype == np.float32 else squares)


def _between(low: float, rows: np.ndarray, high: float) -> np.ndarray:
    return (low < rows) & (rows < high)


class HalfCheetah(NativeTask):
    """HalfCheetah-v5, which cannot fall."""

    environment = HalfCheetahEnv
    highest_velocity = np.inf

    def outcomes(self, actions: np.ndarray, quantities: Quantities) -> Outcomes:
        """See :meth:`NativeTask.outcomes`."""
        env, x = self.envs[0], quantities["qpos"][:, :, 0]
        forward = env._forward_reward_weight * (np.diff(x) / env.dt)
        is_healthy = self.is_healthy(quantities)
        alive = 0.0 if is_healthy is None else is_healthy * env._healthy_reward
        falls = is_healthy is not None and env._terminate_when_unhealthy
        qpos = _after(quantities, "qpos")[..., int(env._exclude_current_positions_from_observation) :]
        qvel = np.clip(_after(quantities, "qvel"), -self.highest_velocity, self.highest_velocity)
        return Outcomes(
            np.concatenate([qpos, qvel], axis=-1),
            forward + alive - _control_cost(env, actions),
            ~is_healthy if falls else np.zeros(actions.shape[:2], dtype=bool),
        )

    def is_healthy(self, quantities: Quantities) -> np.ndarray | None:
        """``(N, T_e)``; None where there is no such thing."""
        return None


class Walker2d(HalfCheetah):
    """Walker2d-v5."""

    environment = Walker2dEnv
    highest_velocity = 10.0

    def is_healthy(self, quantities: Quantities) -> np.ndarray:
        """Its height and its torso's angle are within their ranges."""
        env, qpos = self.envs[0], _after(quantities, "qpos")
        (low, high), (least, most) = env._healthy_z_range, env._healthy_angle_range
        return _between(low, qpos[..., 1], high) & _between(least, qpos[..., 2], most)


class Hopper(Walker2d):
    """Hopper-v5."""

    environment = HopperEnv

    def is_healthy(self, quantities: Quantities) -> np.ndarray:
        """And all numbers of its state but the first two positions are within theirs."""
        low, high = self.envs[0]._healthy_state_range
        state = np.concatenate([_after(quantities, "qpos")[..., 2:], _after(quantities, "qvel")], axis=-1)
        return _between(low, state, high).all(axis=-1) & super().is_healthy(quantities)


class Ant(NativeTask):
    """Ant-v5, contact forces included."""

    environment = AntEnv
    quantities = ("qpos", "qvel", "xpos", "cfrc_ext")
    post_constraint = True

    def outcomes(self, actions: np.ndarray, quantities: Quantities) -> Outcomes:
        """See :meth:`NativeTask.outcomes`."""
        env, qpos, qvel = self.envs[0], _after(quantities, "qpos"), _after(quantities, "qvel")
        x = quantities["xpos"][:, :, env.data.body(env._main_body).id, 0]
        forward = np.diff(x) / env.dt * env._forward_reward_weight
        forces = np.clip(_after(quantities, "cfrc_ext"), *env._contact_force_range)
        contact_cost = env._contact_cost_weight * np.square(forces).sum(axis=-1)
        low, high = env._healthy_z_range
        is_finite = np.isfinite(qpos).all(axis=-1) & np.isfinite(qvel).all(axis=-1)
        is_healthy = is_finite & (low <= qpos[..., 2]) & (qpos[..., 2] <= high)
        seen = [qpos[..., 2 * env._exclude_current_positions_from_observation :], qvel]
        if env._include_cfrc_ext_in_observation:
            seen.append(forces[..., 6:])  # without the world's
        return Outcomes(
            np.concatenate(seen, axis=-1),
            forward + is_healthy * env._healthy_reward - (_control_cost(env, actions) + contact_cost),
            ~is_healthy & env._terminate_when_unhealthy,
        )


class Humanoid(NativeTask):
    """Humanoid-v5, contact forces included."""

    environment = HumanoidEnv
    quantities = ("qpos", "qvel", "xipos", "cinert", "cvel", "qfrc_actuator", "cfrc_ext")
    post_constraint = True

    def outcomes(self, actions: np.ndarray, quantities: Quantities) -> Outcomes:
        """See :meth:`NativeTask.outcomes`."""
        env, qpos, mass = self.envs[0], _after(quantities, "qpos"), self.envs[0].model.body_mass
        x = quantities["xipos"][..., 0] @ mass / mass.sum()
        forward = env._forward_reward_weight * (np.diff(x) / env.dt)
        forces = _after(quantities, "cfrc_ext")
        contact_cost = env._contact_cost_weight * np.square(forces).sum(axis=-1)
        contact_cost = np.clip(contact_cost, *env._contact_cost_range)
        low, high = env._healthy_z_range
        is_healthy = _between(low, qpos[..., 2], high)
        seen = [qpos[..., 2 * env._exclude_current_positions_from_observation :], _after(quantities, "qvel")]
        for is_included, name, first in (
            (
                env._include_cinert_in_observation,
                "cinert",
                10,
            ),  # the numbers of the world, or of the free joint
            (env._include_cvel_in_observation, "cvel", 6),
            (env._include_qfrc_actuator_in_observation, "qfrc_actuator", 6),
            (env._include_cfrc_ext_in_observation, "cfrc_ext", 6),
        ):
            if is_included:
                seen.append(_after(quantities, name)[..., first:])
        return Outcomes(
            np.concatenate(seen, axis=-1),
            forward + is_healthy * env._healthy_reward
            - (_control_cost(env, actions.astype(np.float64)) + contact_cost),
            ~is_healthy & env._terminate_when_unhealthy,
        )  # fmt: skip
