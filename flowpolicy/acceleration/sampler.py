"""Samplers that are built once and called many times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from flowpolicy.acceleration.caching.schedule import Schedule
from flowpolicy.acceleration.engine import BlockEngine, Engine, SteeredEngine
from flowpolicy.errors import ConfigError
from flowpolicy.flow.guidance import refuse_options
from flowpolicy.flow.sampler_spec import SamplerSpec
from flowpolicy.models.blocks import AddressableBlocks
from flowpolicy.policy import FlowPolicy, Observations
from flowpolicy.settings import choose, require
from flowpolicy.spec import PolicySpec


class Compute(Protocol):
    """A backend at work: checked observations and x_0 to a chunk in physical units, for one batch size."""

    def __call__(self, observation: Mapping[str, Tensor], noise: Tensor, **options: Any) -> Tensor:
        """``(B, T, A)`` from key -> ``(B, T_o, *shape)`` and ``(B, T, A)``, with the guidance's options."""
        ...


class Sampler:
    """A policy fixed to one way of sampling, one batch size and one backend; see :func:`build_sampler`.

    It acts as the policy does, so that evaluation and control take one in place of the other. The weights
    are those of the moment it was built.

    Attributes:
        spec: the policy's.
        sampling: how it samples; every entry has a value.
        schedule: of the cache; None where everything is computed.
        options: keywords of :meth:`act` that its guidance reads.
    """

    def __init__(self, policy: FlowPolicy, engine: Engine, compute: Compute) -> None:
        self.policy, self.compute = policy, compute
        self.spec: PolicySpec = policy.spec
        self.sampling, self.batch_size = engine.sampling, engine.batch_size
        self.schedule = engine.schedule if isinstance(engine, BlockEngine) else None
        self.guidance = engine.guidance
        self.options = () if engine.guidance is None else engine.guidance.options
        self._nfe = len(engine.evaluations) * policy.config.draws()

    @property
    def device(self) -> torch.device:
        """Where chunks are computed."""
        return self.policy.device

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
        **options: Any,
    ) -> Tensor:
        """As :meth:`FlowPolicy.act`; any number of rows, in parts of ``batch_size``.

        Args:
            observations: key -> ``(B, T_o, *shape)`` in physical units.
            num_steps: K, only the one it was built for.
            solver: likewise.
            noise: x_0 ``(B, T, A)``; drawn from ``generator`` where None.
            generator: source of x_0.
            options: of the guidance, such as ``prefix``; with them all rows are one part.

        Raises:
            ConfigError: a K or solver it was not built for, or an option that its guidance does not read.
            FlowPolicyError: observations or noise of a wrong shape, with NaN, or with a missing key.
        """
        own, policy = self.sampling, self.policy
        if (num_steps or own.num_steps, solver or own.solver) != (own.num_steps, own.solver):
            asked = SamplerSpec(num_steps=num_steps, solver=solver).filled(own)
            raise ConfigError(f"This sampler was built for {own}; build another one for {asked}.")
        refuse_options(self.guidance, options)
        observation = policy.check_observations(observations)
        rows = len(next(iter(observation.values())))
        noise = policy.noise(rows, noise, generator)
        if self.guidance is not None:
            return self.compute(observation, noise, **options)
        parts = []
        for start in range(0, rows, self.batch_size):
            end = min(start + self.batch_size, rows)
            missing = self.batch_size - (end - start)
            part = {key: _padded(value[start:end], missing) for key, value in observation.items()}
            parts.append(self.compute(part, _padded(noise[start:end], missing))[: end - start])
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def nfe(self, num_steps: int | None = None, solver: str | None = None) -> int:
        """Network evaluations of a chunk, whole or partly reused; guidance by a prefix costs twice as many
        more, and as many backward passes."""
        return self._nfe


def build_sampler(
    policy: FlowPolicy,
    sampling: SamplerSpec | None = None,
    *,
    batch_size: int = 1,
    schedule: Schedule | None = None,
    exports: dict[str, bytes] | None = None,
    **settings: Any,
) -> Sampler:
    """Build a sampler.

    Args:
        policy: any policy; cache schedules need a network of addressable blocks and guidance needs a flow.
        sampling: how to sample; the policy's own way in eager PyTorch where None.
        batch_size: rows computed at once.
        schedule: which blocks are recomputed when, in place of the file that ``sampling`` names.
        exports: what ``onnx`` exported for an earlier sampler of the same policy, by name; what is missing is
            exported and added, which takes most of the time that a sampler is built in.
        settings: entries that replace those of ``sampling``, such as ``num_steps=4, backend="onnx"``.

    Raises:
        ConfigError: a K, solver or grid that the policy does not have, a schedule made for something else.
        BackendError: a backend that cannot run here.
    """
    require(batch_size >= 1, "batch_size", batch_size, "at least 1")
    sampling = policy.checked(replace(sampling or SamplerSpec(backend="eager"), **settings))
    if policy.steering is not None:
        backend = "eager" if sampling.backend == "auto" else sampling.backend
        is_plain = not (sampling.guidance or sampling.schedule or schedule) and sampling.dtype == "float32"
        if backend != "eager" or not is_plain:
            policy.require_unsteered("A sampler with a backend, a dtype, a schedule or a guidance")
        sampling = replace(sampling, backend=backend)
    if sampling.backend == "auto":
        sampling = replace(sampling, backend=fastest_backend(policy.device, sampling))
    make = choose(BACKENDS, sampling.backend, "backend")
    if sampling.dtype == "int8":
        require(sampling.backend == "onnx", "dtype", "int8", f"float32 or bfloat16 for {sampling.backend}")
    if sampling.guidance:
        allowed = "eager, which alone can take gradients, where there is guidance"
        require(sampling.backend == "eager", "backend", sampling.backend, allowed)
    if schedule is None and sampling.schedule is not None:
        schedule = Schedule.load(sampling.schedule)
    engine = build_engine(policy, sampling, batch_size, schedule)
    return Sampler(policy, engine, make(engine, {} if exports is None else exports))


def accelerate(policy: FlowPolicy, schedule: Schedule, **settings: Any) -> Sampler:
    """The policy sampled as a cache schedule says; other settings as in :func:`build_sampler`."""
    return build_sampler(policy, schedule=schedule, **schedule.key.sampling(), **settings)


def build_engine(
    policy: FlowPolicy, sampling: SamplerSpec, batch_size: int, schedule: Schedule | None
) -> Engine:
    """What a sampler computes with: block by block where the network has addressable blocks."""
    if policy.steering is not None:
        return SteeredEngine(policy, sampling, batch_size)
    if schedule is not None:
        schedule.check(policy, sampling)
    if not isinstance(policy.network, AddressableBlocks) or not policy.objective.is_flow:
        return Engine(policy, sampling, batch_size)
    return BlockEngine(policy, sampling, batch_size, schedule)


def _eager(engine: Engine, exports: dict[str, bytes]) -> Compute:
    return engine


def _compile(engine: Engine, exports: dict[str, bytes]) -> Compute:
    from flowpolicy.acceleration.compiled import compiled

    return compiled(engine)


def _cuda_graph(engine: Engine, exports: dict[str, bytes]) -> Compute:
    from flowpolicy.acceleration.cuda_graph import Captured

    return Captured(engine)


def _onnx(engine: Engine, exports: dict[str, bytes]) -> Compute:
    from flowpolicy.acceleration.onnx.engine import OnnxEngine

    return OnnxEngine(engine, exports)


BACKENDS: dict[str, Callable[[Engine, dict[str, bytes]], Compute]] = {
    "eager": _eager,
    "compile": _compile,
    "cuda_graph": _cuda_graph,
    "onnx": _onnx,
}


def fastest_backend(device: torch.device, sampling: SamplerSpec | None = None) -> str:
    """The backend to take where nobody measured: a CUDA graph on a GPU, ONNX Runtime where it is installed,
    else eager; eager also where there is guidance."""
    if sampling is not None and sampling.guidance:
        return "eager"
    if device.type == "cuda":
        return "cuda_graph"
    has_onnx = all(find_spec(package) for package in ("onnx", "onnxscript", "onnxruntime"))
    return "onnx" if has_onnx else "eager"


def _padded(rows: Tensor, missing: int) -> Tensor:
    return rows if missing == 0 else F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing))
