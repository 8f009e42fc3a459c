"""Samplers that are built once and called many times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpolicy.acceleration.caching.schedule import Schedule, ScheduleKey, full_schedule
from flowpolicy.acceleration.engine import Engine, Plan
from flowpolicy.errors import ConfigError
from flowpolicy.policy import FlowPolicy, Observations
from flowpolicy.settings import choose, require


class Compute(Protocol):
    """A backend at work: checked observations and x_0 to a chunk in physical units, for one batch size."""

    def __call__(self, observation: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        """``(B, T, A)`` from key -> ``(B, T_o, *shape)`` and ``(B, T, A)``."""
        ...


class Sampler:
    """A policy fixed to one K, solver, batch size, cache schedule and backend; see :func:`build_sampler`.

    It acts as the policy does, so that evaluation and control take one in place of the other. The weights
    are those of the moment it was built.
    """

    def __init__(self, policy: FlowPolicy, compute: Compute, plan: Plan, backend: str) -> None:
        self.policy, self.compute, self.plan, self.backend = policy, compute, plan, backend

    def __call__(self, observations: Observations, noise: Tensor | None = None) -> Tensor:
        """Action chunks ``(B, T, A)`` in physical units; see :meth:`FlowPolicy.act`."""
        return self.act(observations, noise=noise)

    @torch.no_grad()
    def act(
        self,
        observations: Observations,
        *,
        num_steps: int | None = None,
        solver: str | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As :meth:`FlowPolicy.act`; any number of rows, in parts of ``batch_size``.

        Raises:
            ConfigError: a K or solver it was not built for.
            FlowPolicyError: observations or noise of a wrong shape, with NaN, or with a missing key.
        """
        plan, policy = self.plan, self.policy
        asked = (num_steps or plan.num_steps, solver or plan.solver)
        if asked != (plan.num_steps, plan.solver):
            raise ConfigError(
                f"This sampler was built for num_steps={plan.num_steps}, solver={plan.solver}; build another "
                f"one for num_steps={asked[0]}, solver={asked[1]}."
            )
        observation = policy.check_observations(observations)
        rows = len(next(iter(observation.values())))
        noise = policy.noise(rows, noise, generator)
        parts = []
        for start in range(0, rows, plan.batch_size):
            end = min(start + plan.batch_size, rows)
            missing = plan.batch_size - (end - start)
            part = {key: _padded(value[start:end], missing) for key, value in observation.items()}
            parts.append(self.compute(part, _padded(noise[start:end], missing))[: end - start])
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def nfe(self, num_steps: int | None = None, solver: str | None = None) -> int:
        """Network evaluations of a chunk, whole or partly reused."""
        return self.plan.schedule.key.num_evaluations

    def __getattr__(self, name: str) -> Any:
        if name in POLICY_ATTRIBUTES:
            return getattr(self.policy, name)
        raise AttributeError(name)


POLICY_ATTRIBUTES = frozenset(
    (
        "name",
        "observation_shapes",
        "obs_horizon",
        "action_horizon",
        "execute_horizon",
        "action_dim",
        "device",
        "task",
        "metadata",
        "config",
    )
)


def build_sampler(
    policy: FlowPolicy,
    batch_size: int = 1,
    num_steps: int | None = None,
    solver: str | None = None,
    schedule: Schedule | None = None,
    backend: str = "eager",
    dtype: str = "float32",
    exports: dict[str, bytes] | None = None,
) -> Sampler:
    """Build a sampler.

    Args:
        policy: a flow-matching or shortcut policy.
        batch_size: rows computed at once.
        num_steps: K; the policy's default where None.
        solver: ``euler``, ``midpoint`` or ``heun``; the policy's default where None.
        schedule: which blocks are recomputed when; None recomputes everything.
        backend: ``eager``, ``compile``, ``cuda_graph`` or ``onnx``.
        dtype: ``float32``, ``bfloat16`` (not ``onnx``) or ``int8`` (weights, ``onnx`` only).
        exports: what ``onnx`` exported for an earlier sampler of the same policy, by name; what is missing is
            exported and added, which takes most of the time that a sampler is built in.

    Raises:
        ConfigError: a K or solver that the policy does not have, a schedule made for something else.
        BackendError: a backend that cannot run here.
    """
    num_steps = policy.default_num_steps if num_steps is None else num_steps
    solver = solver or policy.config.tuned_solver
    require(batch_size >= 1, "batch_size", batch_size, "at least 1")
    make = choose(BACKENDS, backend, "backend")
    if schedule is None:
        schedule = full_schedule(ScheduleKey.of(policy, num_steps, solver))
    else:
        schedule.check(policy, num_steps, solver)
    plan = Plan(batch_size, num_steps, solver, schedule, dtype)
    compute = make(policy, plan, {} if exports is None else exports)
    return Sampler(policy, compute, plan, backend)


def accelerate(policy: FlowPolicy, schedule: Schedule, **settings: Any) -> Sampler:
    """The policy sampled as a cache schedule says; other settings as in :func:`build_sampler`."""
    key = schedule.key
    return build_sampler(policy, num_steps=key.num_steps, solver=key.solver, schedule=schedule, **settings)


def _eager(policy: FlowPolicy, plan: Plan, exports: dict[str, bytes]) -> Compute:
    return Engine(policy, plan)


def _compile(policy: FlowPolicy, plan: Plan, exports: dict[str, bytes]) -> Compute:
    from flowpolicy.acceleration.compiled import compiled

    return compiled(Engine(policy, plan), policy)


def _cuda_graph(policy: FlowPolicy, plan: Plan, exports: dict[str, bytes]) -> Compute:
    from flowpolicy.acceleration.cuda_graph import Captured

    return Captured(Engine(policy, plan), policy)


def _onnx(policy: FlowPolicy, plan: Plan, exports: dict[str, bytes]) -> Compute:
    from flowpolicy.acceleration.onnx.engine import OnnxEngine

    return OnnxEngine(policy, plan, exports)


BACKENDS: dict[str, Callable[[FlowPolicy, Plan, dict[str, bytes]], Compute]] = {
    "eager": _eager,
    "compile": _compile,
    "cuda_graph": _cuda_graph,
    "onnx": _onnx,
}


def fastest_backend(device: torch.device) -> str:
    """The backend to take where nobody measured: a CUDA graph on a GPU, ONNX Runtime where it is installed,
    else eager."""
    if device.type == "cuda":
        return "cuda_graph"
    has_onnx = all(find_spec(package) for package in ("onnx", "onnxscript", "onnxruntime"))
    return "onnx" if has_onnx else "eager"


def _padded(rows: Tensor, missing: int) -> Tensor:
    return rows if missing == 0 else F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing))
