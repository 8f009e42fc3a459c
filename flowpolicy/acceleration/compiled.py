"""torch.compile, a region at a time: one compiled function for each kind of block."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from flowpolicy.acceleration.engine import Engine, random_observations
from flowpolicy.errors import BackendError
from flowpolicy.policy import FlowPolicy


def compiled(engine: Engine, policy: FlowPolicy) -> Engine:
    """The engine with its blocks and its exit compiled, and run once so that they are.

    All blocks of a kind share one compiled function, to which the weights are arguments, and so do all
    samplers of a process: it takes seconds to build where the unrolled loop would take minutes.

    Raises:
        BackendError: there is no compiler for this device.
    """
    network = engine.network
    engine.run = [partial(_compiled(type(block.module).gated), block.module) for block in network.blocks()]
    # The entry stays as it is: for two-dimensional actions, what torch 2.13 compiles for it on a CPU
    # writes beyond its buffer, and there is next to nothing to gain.
    engine.leave = partial(_compiled(type(network).leave), network)
    generator, rows = torch.Generator().manual_seed(0), engine.plan.batch_size
    try:
        engine(random_observations(policy, rows, generator), policy.noise(rows, None, generator))
    except Exception as error:  # the compiler's own, of many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackendError(
            f"backend=compile cannot build here ({reason[:200]}); "
            "it needs a C++ compiler on a CPU and Triton on a GPU."
        ) from error
    return engine


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, fullgraph=True)
