"""torch.compile, a region at a time: one compiled function for each kind of block."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from functools import cache, partial
from types import FunctionType
from typing import Any, cast

import torch

from flowpolicy.acceleration.engine import BlockEngine, Engine, random_observations
from flowpolicy.errors import BackendError

_NO_COMPILER = {"InvalidCxxCompiler", "CppCompileError", "TritonMissing", "GPUTooOldForTriton"}


def compiled(engine: Engine) -> Engine:
    """The engine with its blocks and its readout compiled, or its whole network where that has no blocks, and
    run once so that they are.

    All blocks of a kind share one compiled function, to which the weights are arguments, and so do all
    samplers of the same sizes in a process: it takes seconds to build where the unrolled loop would take
    minutes.

    Raises:
        BackendError: it cannot be compiled here; the sentence says why.
    """
    sizes, policy = _sizes(engine), engine.policy
    if isinstance(engine, BlockEngine):
        engine.run = [
            partial(_compiled(type(block.module).forward, block.kind, sizes), block.module)
            for block in engine.blocks
        ]
        # The embedding stays as it is: for two-dimensional actions, what torch 2.13 compiles for it on a CPU
        # writes beyond its buffer, and there is next to nothing to gain.
        network: Any = engine.network
        engine.readout = partial(_compiled(type(network).readout, "readout", sizes), network)
    else:
        engine.velocity = partial(_compiled(type(engine.network).velocity, "velocity", sizes), engine.network)
    generator, rows = torch.Generator().manual_seed(0), engine.batch_size
    try:
        engine(random_observations(policy, rows, generator), policy.noise(rows, None, generator))
    except Exception as error:  # the compiler's own, of many kinds
        raise BackendError(f"torch.compile cannot build this sampler: {_reason(error)}") from error
    return engine


@cache
def _compiled(function: Callable[..., Any], kind: str, sizes: Hashable) -> Callable[..., Any]:
    """``function`` compiled for one kind of block and for tensors of one size.

    Dynamo counts what it compiles for each code object, looks through all of it at each call, and gives up at
    eight: so each gets a code object of its own.
    """
    function = cast("FunctionType", function)
    code = function.__code__.replace(co_name=f"{kind}_{function.__name__}")
    own = FunctionType(code, function.__globals__, None, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, dynamic=False, fullgraph=True)


def _sizes(engine: Engine) -> Hashable:
    """All that the shapes, types and places of an engine's tensors depend on."""
    policy = engine.policy
    features, horizons = (
        tuple(policy.spec.features.items()),
        (policy.spec.obs_horizon, *policy.spec.noise_shape),
    )
    return repr(policy.config.model), features, horizons, engine.batch_size, engine.dtype, policy.device


def _reason(error: Exception) -> str:
    """What went wrong at the bottom of what torch reports, and the remedy where it is a missing compiler."""
    chain = list(_causes(error))
    words = next((str(cause).strip() for cause in reversed(chain) if str(cause).strip()), "")
    reason = f"{words.splitlines()[0][:200].rstrip('.')}" if words else type(chain[-1]).__name__
    if _NO_COMPILER.intersection(kind.__name__ for cause in chain for kind in type(cause).__mro__):
        return f"{reason}; it needs a C++ compiler on a CPU and Triton on a GPU."
    return f"{reason}."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "inner_exception", None) or error.__cause__
