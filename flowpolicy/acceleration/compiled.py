"""torch.compile, a region at a time: one compiled function for each kind of block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from flowpolicy.acceleration.engine import Engine, random_observations
from flowpolicy.errors import BackendError
from flowpolicy.models.blocks import Branch
from flowpolicy.policy import FlowPolicy


def compiled(engine: Engine, policy: FlowPolicy) -> Engine:
    """The engine with its blocks, its entry and its exit compiled, and run once so that they are.

    All blocks of a kind share one compiled function, to which the weights are arguments: it takes seconds
    to build where the unrolled loop would take minutes.

    Raises:
        BackendError: there is no compiler for this device.
    """
    kinds: dict[type[Branch], Callable[..., Any]] = {}
    for block in engine.network.blocks():
        kind = type(block.module)
        if kind not in kinds:
            kinds[kind] = torch.compile(kind.gated, dynamic=False, fullgraph=True)
    engine.run = [partial(kinds[type(block.module)], block.module) for block in engine.network.blocks()]
    engine.enter = torch.compile(engine.network.enter, dynamic=False, fullgraph=True)
    engine.leave = torch.compile(engine.network.leave, dynamic=False, fullgraph=True)
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
