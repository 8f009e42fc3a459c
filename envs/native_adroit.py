"""Tasks of the Adroit hand (gymnasium-robotics) from states: what ``step`` says, for many steps at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium_robotics.envs.adroit_hand.adroit_door import AdroitHandDoorEnv
from gymnasium_robotics.envs.adroit_hand.adroit_hammer import AdroitHandHammerEnv
from gymnasium_robotics.envs.adroit_hand.adroit_pen import AdroitHandPenEnv
from gymnasium_robotics.envs.adroit_hand.adroit_relocate import AdroitHandRelocateEnv
from gymnasium_robotics.utils.rotations import quat2euler

from flowpolicy.finetuning.native_environments import NativeTask, Outcomes, Quantities
from flowpolicy_envs.adroit import AdroitTask


def _norm(rows: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rows, axis=-1)


class _Adroit(NativeTask):
    """Joint targets for the hand, something in it or before it, no end but success where that is one."""

    wrappers = (AdroitTask,)
    quantities = ("qpos", "qvel", "site_xpos")

    def controls(self, actions: np.ndarray) -> np.ndarray:
        """See :meth:`NativeTask.controls`."""
        env = self.envs[0]
        controls: np.ndarray = env.act_mean + actions.astype(np.float64) * env.act_rng
        return controls

    def judged(self, observation: Sequence[np.ndarray], reward: np.ndarray, success: np.ndarray) -> Outcomes:
        """The outcomes, with the sparse reward and the end at success where those were asked for."""
        if self.envs[0].sparse_reward:
            reward = np.where(success, 10.0, -0.1)
        ends = getattr(self.envs[0], "ends_at_success", False)  # AdroitTask says so, if there is one
        joined = np.concatenate([*observation], axis=-1)
        return Outcomes(joined, reward, success & ends, success)


class Door(_Adroit):
    """AdroitHandDoor-v1."""

    environment = AdroitHandDoorEnv
    places = (("body_pos", "door_body_id"),)

    def outcomes(self, actions: np.ndarray, quantities: Quantities) -> Outcomes:
        """See :meth:`NativeTask.outcomes`."""
        env = self.envs[0]
        qpos, qvel, sites = (quantities[name][:, 1:] for name in self.quantities)
        handle, palm = sites[:, :, env.handle_site_id], sites[:, :, env.grasp_site_id]
        hinge = qpos[..., env.door_hinge_addrs]
        reward = 0.1 * _norm(palm - handle)
        reward += -0.1 * (hinge - 1.57) * (hinge - 1.57)
        reward += -1e-5 * (qvel**2).sum(axis=-1)
        for angle, bonus in ((0.2, 2), (1.0, 8), (1.35, 10)):
            reward += bonus * (hinge > angle)
        is_open = np.where(hinge > 1.0, 1.0, -1.0)
        seen = (
            qpos[..., 1:-2],
            qpos[..., -1:],
            hinge[..., None],
            palm,
            handle,
            palm - handle,
            is_open[..., None],
        )
        return self.judged(seen, reward, hinge >= 1.35)


class Hammer(_Adroit):
    """AdroitHandHammer-v1."""

    environment = AdroitHandHammerEnv
    quantities = ("qpos", "qvel", "site_xpos", "xpos", "xquat", "sensordata")
    places = (("body_pos", "target_body_id"),)

    def outcomes(self, actions: np.ndarray, quantities: Quantities) -> Outcomes:
        """See :meth:`NativeTask.outcomes`."""
        env = self.envs[0]
        qpos, qvel, sites, xpos, xquat, sensors = (quantities[name][:, 1:] for name in self.quantities)
        hammer, turned = xpos[:, :, env.obj_body_id], quat2euler(xquat[:, :, env.obj_body_id])
        palm, head, nail, goal = (
            sites[:, :, row]
            for row in (env.S_grasp_site_id, env.tool_site_id, env.target_obj_site_id, env.goal_site_id)
        )
        impact = np.clip(sensors[..., env._model_names.sensor_name2id["S_nail"]], -1.0, 1.0)
        distance = _norm(nail - goal)
        reward = 0.1 * _norm(palm - hammer)
        reward -= _norm(head - nail)
        reward -= 10 * distance
        reward -= 1e-2 * _norm(qvel)
        reward += 2 * ((hammer[..., 2] > 0.04) & (head[..., 2] > 0.04))
        for limit, bonus in ((0.020, 25), (0.010, 75)):
            reward += bonus * (distance < limit)
        seen = (
            qpos[..., :-6],
            np.clip(qvel[..., -6:], -1.0, 1.0),
            palm,
            hammer,
            turned,
            nail,
            impact[..., None],
        )
        return self.judged(seen, reward, distance < 0.01)


class Pen(_Adroit):
    """AdroitHandPen-v1."""

    environment = AdroitHandPenEnv
    quantities = ("qpos", "qvel", "site_xpos", "xpos")
    places = (("body_quat", "target_obj_body_id"),)

    def outcomes(self, actions: np.ndarray, quantities: Quantities) -> Outcomes:
        """See :meth:`NativeTask.outcomes`."""
        env = self.envs[0]
        qpos, qvel, sites, xpos = (quantities[name][:, 1:] for name in self.quantities)
        pen, wanted = xpos[:, :, env.obj_body_id], sites[:, :, env.eps_ball_site_id]
        lengths = np.array([[one.pen_length, one.tar_length] for one in self.envs])[:, None, :, None]
        points = (sites[:, :, env.obj_t_site_id] - sites[:, :, env.obj_b_site_id]) / lengths[:, :, 0]
        target = (sites[:, :, env.tar_t_site_id] - sites[:, :, env.tar_b_site_id]) / lengths[:, :, 1]
        distance, likeness = _norm(pen - wanted), (points * target).sum(axis=-1)
        reward = -distance + likeness
        for limit, bonus in ((0.9, 10), (0.95, 50)):
            reward += bonus * ((distance < 0.075) & (likeness > limit))
        reward -= 5 * (pen[..., 2] < 0.075)
        seen = qpos[..., :-6], pen, qvel[..., -6:], points, target, pen - wanted, points - target
        return self.judged(seen, reward, (distance < 0.075) & (likeness > 0.95))

    def drawn(self, env: Any) -> np.ndarray:
        """And the lengths of pen and target, which a reset measures."""
        return np.concatenate([super().drawn(env), [env.pen_length, env.tar_length]])

    def put(self, env: Any, drawn: np.ndarray) -> None:
        """See :meth:`NativeTask.put`."""
        super().put(env, drawn[:-2])
        env.pen_length, env.tar_length = drawn[-2:]


class Relocate(_Adroit):
    """AdroitHandRelocate-v1."""

    environment = AdroitHandRelocateEnv
    quantities = ("qpos", "site_xpos", "xpos")
    places = (("body_pos", "obj_body_id"), ("site_pos", "target_obj_site_id"))

    def outcomes(self, actions: np.ndarray, quantities: Quantities) -> Outcomes:
        """See :meth:`NativeTask.outcomes`."""
        env = self.envs[0]
        qpos, sites, xpos = (quantities[name][:, 1:] for name in self.quantities)
        ball, palm = xpos[:, :, env.obj_body_id], sites[:, :, env.S_grasp_site_id]
        target = sites[:, :, env.target_obj_site_id]
        distance = _norm(ball - target)
        lifted = 1.0 - 0.5 * _norm(palm - target) - 0.5 * distance
        reward = 0.1 * _norm(palm - ball) + np.where(ball[..., 2] > 0.04, lifted, 0.0)
        for limit, bonus in ((0.1, 10.0), (0.05, 20.0)):
            reward += bonus * (distance < limit)
        return self.judged(
            (qpos[..., :-6], palm - ball, palm - target, ball - target), reward, distance < 0.1
        )
