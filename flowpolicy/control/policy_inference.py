"""Inference of the control loop: a trained policy, with its sampler, as a function from request to chunk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowpolicy.acceleration.deployed import DeployedSampler
from flowpolicy.control.inference import Request
from flowpolicy.execution.receding_horizon import ChunkPolicy


@dataclass(frozen=True)
class InferenceBuilder:
    """Builds a :class:`PolicyInference` where it will run.

    Attributes:
        deployed: the sampler.
        seed: of the noises x_0.
        exports: what an earlier build of this sampler has exported.
    """

    deployed: DeployedSampler
    seed: int = 0
    exports: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def __call__(self) -> PolicyInference:
        """The function, whose ``again`` builds the next one without exporting anything again."""
        exports = dict(self.exports)
        return PolicyInference(self.deployed.build(exports), self.seed, again=replace(self, exports=exports))


class PolicyInference:
    """Samples a chunk for each request, each from a new x_0.

    Args:
        sampler: a policy or a sampler of one.
        seed: of the noises.
        warm_up: calls before the first request, in which backends allocate and choose kernels.
        again: builds another one faster than this one was built; None if there is no faster way.
    """

    def __init__(
        self, sampler: ChunkPolicy, seed: int = 0, warm_up: int = 3, again: InferenceBuilder | None = None
    ) -> None:
        self.sampler, self.again = sampler, again
        self.generator = torch.Generator().manual_seed(seed)
        for _ in range(warm_up):
            self(Request(0, sampler.spec.resting_observation()))

    def __call__(self, request: Request) -> NDArray[np.float32]:
        """The chunk ``(T, A)``."""
        batch = {key: value[None] for key, value in request.observation.items()}
        shape = (1, *self.sampler.spec.noise_shape)
        options: dict[str, Any] = {"noise": torch.randn(shape, generator=self.generator)}
        if request.prefix is not None:
            prefix = request.prefix
            options["prefix"] = (prefix.actions[None], prefix.weights[None])
        with torch.no_grad():
            chunk = self.sampler.act(batch, **options)
        result: NDArray[np.float32] = chunk[0].to("cpu", torch.float32).numpy()
        return result
