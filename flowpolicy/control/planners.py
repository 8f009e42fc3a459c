"""A trained policy as a planner of the control loop: checkpoint, K, backend and schedule to a chunk."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowpolicy.acceleration.caching.schedule import Schedule
from flowpolicy.acceleration.inpainting import InpaintingSampler
from flowpolicy.acceleration.sampler import Sampler, build_sampler, fastest_backend
from flowpolicy.control.inference import Request
from flowpolicy.execution.receding_horizon import ChunkPolicy
from flowpolicy.observations import dtype_of
from flowpolicy.policy import FlowPolicy
from flowpolicy.runs.device import resolve_device
from flowpolicy.settings import require

MOST_THREADS = 1024
_BUILDING = threading.Lock()  # torch's exporter and compiler are not made for two threads at once


@dataclass(frozen=True)
class SamplerSettings:
    """What a control loop's sampler is built from; it can be sent to another process.

    Attributes:
        checkpoint: folder of the policy.
        num_steps: K; None takes the policy's own.
        solver: ODE solver; None takes the policy's own.
        backend: ``auto`` (ONNX Runtime on a CPU where it is installed, a CUDA graph on a GPU, else eager) or
            one of :data:`~flowpolicy.acceleration.sampler.BACKENDS`.
        dtype: of the network.
        schedule: a cache schedule's file, or None.
        device: of the policy.
        threads: CPU threads of one chunk.
    """

    checkpoint: str
    num_steps: int | None = None
    solver: str | None = None
    backend: str = "auto"
    dtype: str = "float32"
    schedule: str | None = None
    device: str = "auto"
    threads: int = 1

    def __post_init__(self) -> None:
        allowed = f"at least 1 and at most {MOST_THREADS}"
        require(1 <= self.threads <= MOST_THREADS, "threads", self.threads, allowed)

    def build(self, exports: dict[str, bytes] | None = None) -> Sampler:
        """The sampler, for one chunk at a time.

        Args:
            exports: see :func:`~flowpolicy.acceleration.sampler.build_sampler`.

        Raises:
            FlowPolicyError: the checkpoint, a setting or the backend is not usable.
        """
        with _BUILDING:
            policy = self._policy()
            schedule = Schedule.load(self.schedule) if self.schedule else None
            backend = fastest_backend(policy.device) if self.backend == "auto" else self.backend
            return build_sampler(
                policy, 1, self.num_steps, self.solver, schedule, backend, self.dtype, exports
            )

    def build_inpainting(self) -> InpaintingSampler:
        """A sampler of chunks that agree with a prefix; backend, dtype and schedule do not apply to it.

        Raises:
            FlowPolicyError: the checkpoint or a setting is not usable.
        """
        policy = self._policy()
        steps = policy.default_num_steps if self.num_steps is None else self.num_steps
        solver = self.solver or policy.config.tuned_solver
        # The published guidance hardly moves a policy that is sure of what it does (docs/deploy.md).
        return InpaintingSampler(policy, steps, solver, beta=4.0 * steps, prior_std=0.2)

    def _policy(self) -> FlowPolicy:
        torch.set_num_threads(self.threads)
        return FlowPolicy.load(self.checkpoint, resolve_device(self.device))


@dataclass(frozen=True)
class PlannerBuilder:
    """Builds a :class:`PolicyPlanner` where it will run.

    Attributes:
        settings: of the sampler.
        seed: of the noises x_0.
        inpainting: plan chunks that agree with a prefix, as real-time chunking asks; in eager PyTorch.
        exports: what an earlier planner of these settings has exported.
    """

    settings: SamplerSettings
    seed: int = 0
    inpainting: bool = False
    exports: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def __call__(self) -> PolicyPlanner:
        """The planner, which says how the next one is built without exporting anything again."""
        exports = dict(self.exports)
        sampler = self.settings.build_inpainting() if self.inpainting else self.settings.build(exports)
        return PolicyPlanner(sampler, self.seed, again=replace(self, exports=exports))


class PolicyPlanner:
    """Plans a chunk for each request, from a new x_0 each.

    Args:
        sampler: a policy or a sampler of one.
        seed: of the noises.
        warm_up: calls before the first request, in which backends allocate and choose kernels.
        again: builds the like of it, sooner than this one was; None where nothing does.
    """

    def __init__(
        self, sampler: ChunkPolicy, seed: int = 0, warm_up: int = 3, again: PlannerBuilder | None = None
    ) -> None:
        self.sampler, self.again = sampler, again
        self.generator = torch.Generator().manual_seed(seed)
        for _ in range(warm_up):
            self(Request(0, resting_observation(sampler)))

    def __call__(self, request: Request) -> NDArray[np.float32]:
        """The chunk ``(T, A)``."""
        batch = {key: value[None] for key, value in request.observation.items()}
        shape = (1, self.sampler.action_horizon, self.sampler.action_dim)
        options: dict[str, Any] = {"noise": torch.randn(shape, generator=self.generator)}
        if request.prefix is not None:
            prefix = request.prefix
            options["prefix"] = (prefix.actions[None], prefix.weights[None])
        with torch.no_grad():
            chunk = self.sampler.act(batch, **options)
        result: NDArray[np.float32] = chunk[0].to("cpu", torch.float32).numpy()
        return result


def resting_observation(policy: ChunkPolicy) -> dict[str, NDArray[Any]]:
    """Zeros of the policy's observation shapes, key -> ``(T_o, *shape)``."""
    return {
        key: np.zeros((policy.obs_horizon, *shape), dtype=dtype_of(shape))
        for key, shape in policy.observation_shapes.items()
    }
