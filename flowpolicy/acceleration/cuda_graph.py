"""One CUDA graph around everything a call computes: normalise, encode, the whole loop, denormalise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowpolicy.acceleration.compiled import compiled
from flowpolicy.acceleration.engine import Engine, random_observations
from flowpolicy.errors import BackendError

WARM_UP = 3  # calls before the capture, in which libraries choose their kernels


class Captured:
    """Captures an engine, its blocks compiled, and replays it: no launch costs, no allocation, fixed
    memory.

    Inputs are copied into the captured buffers and the chunk is copied out of them.

    Raises:
        BackendError: the policy is not on a GPU.
    """

    def __init__(self, engine: Engine) -> None:
        policy = engine.policy
        if policy.device.type != "cuda":
            raise BackendError(
                "backend=cuda_graph needs the policy on a GPU; load it with device='cuda', "
                "or take backend=onnx."
            )
        compiled(engine)
        generator, rows = torch.Generator().manual_seed(0), engine.batch_size
        self.observation = random_observations(policy, rows, generator)
        self.noise = policy.noise(rows, None, generator)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(WARM_UP):
                engine(self.observation, self.noise)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph), torch.no_grad():
            self.chunk = engine(self.observation, self.noise)
        self.engine = engine  # its weights live in the graph

    def __call__(self, observation: Mapping[str, Tensor], noise: Tensor, **options: Any) -> Tensor:
        """See :class:`~flowpolicy.acceleration.sampler.Compute`."""
        for key, value in observation.items():
            self.observation[key].copy_(value)
        self.noise.copy_(noise)
        self.graph.replay()
        return self.chunk.clone()
