"""ONNX Runtime: the whole loop as one graph where it is short, else a graph for each distinct evaluation."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowpolicy.acceleration.engine import Engine, random_observations
from flowpolicy.acceleration.onnx.builder import Builder, build, input_name, kept_name
from flowpolicy.acceleration.onnx.graph import Graph, import_onnx
from flowpolicy.acceleration.onnx.session import Session
from flowpolicy.errors import BackendError, ConfigError, FlowPolicyError

WHOLE_LOOP = 16
"""Most network evaluations that are unrolled into one graph."""
ROUNDINGS = 16
"""Of a command in float32, between what is learnt of it and back."""
TOLERANCE = {"float32": 1e-4, "int8": 0.5}
"""Largest difference to the eager engine, in normalised actions, that an export may show."""


class OnnxEngine:
    """Computes what an engine does in ONNX Runtime on the CPU, with as many threads as torch has when it is
    built.

    Every part of the network is exported once from the module that the eager engine runs. Where the whole
    loop is too long for one graph, each distinct evaluation (which blocks are recomputed, which kept sums
    are added) is a graph; kept outputs stay in buffers that are bound to those graphs once.

    Args:
        engine: what it computes; of a policy on the CPU.
        exports: parts that an earlier engine of this policy exported, by name; those that are missing are
            added. They are checked like fresh ones.

    Raises:
        BackendError: a policy on another device, or packages that are missing.
        ConfigError: a dtype it does not have.
        FlowPolicyError: the exported graphs do not compute what the eager engine does.
    """

    def __init__(self, engine: Engine, exports: dict[str, bytes] | None = None) -> None:
        import_onnx()
        self._dtype = engine.sampling.dtype
        if self._dtype not in TOLERANCE:
            raise ConfigError(f"dtype is '{self._dtype}'; backend=onnx takes {' or '.join(TOLERANCE)}.")
        if engine.policy.device.type != "cpu":
            raise BackendError("backend=onnx runs on the CPU; load the policy with device='cpu'.")
        self.policy, self.batch_size = engine.policy, engine.batch_size
        builder = build(engine, {} if exports is None else exports)
        self._encode = Session(builder.encoder(), self._dtype)
        short = len(engine.evaluations) <= WHOLE_LOOP
        self._loop = (_Loop if short else _Steps)(builder, self._dtype)
        self.parity = self._check(engine)

    def __call__(self, observation: Mapping[str, Tensor], noise: Tensor, **options: Any) -> Tensor:
        """See :class:`~flowpolicy.acceleration.sampler.Compute`."""
        chunk = torch.from_numpy(self._loop(self.encode(observation), noise.numpy()).copy())
        return self.policy.decode(chunk, observation)

    def encode(self, observation: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """What is computed once for an observation, in fixed buffers."""
        for key, value in observation.items():
            self._encode.inputs[input_name(key)][...] = value.numpy()
        self._encode.run()
        return self._encode.outputs

    def _check(self, eager: Engine) -> float:
        """Largest difference to the eager engine on three random inputs."""
        policy, rows = self.policy, self.batch_size
        generator = torch.Generator().manual_seed(0)
        worst, allowed = 0.0, TOLERANCE[self._dtype]
        for _ in range(3):
            observation = random_observations(policy, rows, generator)
            noise = torch.randn(rows, *policy.spec.noise_shape, generator=generator)
            chunks = self(observation, noise), eager(observation, noise)
            ours, wanted = (policy.encode(chunk, observation) for chunk in chunks)
            worst = max(worst, float((ours - wanted).abs().max()))
            if policy.action_space.has_state:  # small moves of large commands are rounded as those are
                scale = float(policy.action_normalizer.inverse_scale.abs().max())
                rounding = ROUNDINGS * 2.0**-24 * float(chunks[1].abs().max()) * scale
                allowed = max(allowed, TOLERANCE[self._dtype] + rounding)
        if not worst <= allowed:
            raise FlowPolicyError(
                f"The ONNX export differs from the policy by {worst:.2g} in normalised actions (allowed: "
                f"{allowed:.2g}); it is not used."
            )
        return worst


class _Loop:
    """All evaluations and the solver in one graph."""

    def __init__(self, builder: Builder, dtype: str) -> None:
        graph, engine = Graph(), builder.engine
        kept: dict[Any, str] = {}
        numbers = iter(range(len(engine.evaluations)))

        def velocity(x: Any, t: float, h: float) -> Any:
            return _Value(graph, builder.evaluate(graph, next(numbers), x.name, None, kept))

        start: Any = _Value(graph, graph.input("noise", builder.chunk))
        end: Any = engine.policy.objective.sample(velocity, start, engine.sampling)
        for name in builder.context:
            builder.context_input(graph, name)
        graph.output(graph.call(builder.finish, end.name)[0], "chunk", builder.chunk)
        self._session = Session(graph, dtype)

    def __call__(self, context: Mapping[str, Any], noise: Any) -> Any:
        session = self._session
        for name in context:
            if name in session.inputs:
                session.inputs[name][...] = context[name]
        session.inputs["noise"][...] = noise
        session.run()
        return session.outputs["chunk"]


class _Value:
    """A value of the graph that a solver calculates with."""

    def __init__(self, graph: Graph, name: str) -> None:
        self.graph, self.name = graph, name

    def __add__(self, other: _Value) -> _Value:
        return _Value(self.graph, self.graph.apply("Add", self.name, other.name))

    def __radd__(self, other: float) -> _Value:  # sum() begins with 0
        return self if other == 0 else NotImplemented

    def __sub__(self, other: _Value) -> _Value:
        return _Value(self.graph, self.graph.apply("Sub", self.name, other.name))

    def __rmul__(self, factor: float) -> _Value:
        constant = self.graph.constant(f"h{factor!r}", np.array(factor, dtype=np.float32))
        return _Value(self.graph, self.graph.apply("Mul", constant, self.name))

    def __mul__(self, factor: float) -> _Value:
        return factor * self

    def __neg__(self) -> _Value:
        return -1.0 * self

    def __truediv__(self, divisor: float) -> _Value:
        return (1.0 / divisor) * self


class _Steps:
    """One graph for each distinct evaluation, on common buffers."""

    def __init__(self, builder: Builder, dtype: str) -> None:
        engine = builder.engine
        self._policy, self._sampling = engine.policy, engine.sampling
        self._buffers: dict[str, Any] = {}
        count = len(engine.evaluations)
        self._patterns = [builder.pattern(number) for number in range(count)]
        self._sessions: dict[Hashable, Session] = {}
        for number, pattern in enumerate(self._patterns):
            if pattern not in self._sessions:
                self._sessions[pattern] = Session(self._graph(builder, number), dtype, self._buffers)
        self._tables = [builder.table(number) for number in range(count)]
        graph = Graph()
        end = graph.input("end", builder.chunk)
        graph.output(graph.call(builder.finish, end)[0], "chunk", builder.chunk)
        self._finish = Session(graph, dtype)

    def _graph(self, builder: Builder, number: int) -> Graph:
        graph = Graph()
        x = graph.input("x", builder.chunk)
        table = graph.input("table", builder.table(number).shape)
        stream = getattr(builder, "stream", ())
        kept: dict[Any, str] = {what: graph.input(kept_name(what), stream) for what in builder.reads(number)}
        before = dict(kept)
        graph.output(builder.evaluate(graph, number, x, table, kept), "velocity", builder.chunk)
        for what, value in kept.items():
            if before.get(what) != value:
                graph.output(value, "new_" + kept_name(what), stream)
        return graph

    def __call__(self, context: Mapping[str, Any], noise: Any) -> Any:
        buffers = self._buffers
        for name, value in context.items():
            if name in buffers:
                buffers[name][...] = value
        numbers = iter(range(len(self._patterns)))

        def velocity(x: Any, t: float, h: float) -> Any:
            number = next(numbers)
            buffers["x"][...] = x
            buffers["table"][...] = self._tables[number]
            self._sessions[self._patterns[number]].run()
            return buffers["velocity"].copy()  # a solver may still need the ones before

        end = self._policy.objective.sample(velocity, noise, self._sampling)
        self._finish.inputs["end"][...] = end
        self._finish.run()
        return self._finish.outputs["chunk"]
