"""ONNX Runtime: the whole loop as one graph where it is short, else a graph for each distinct evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowpolicy.acceleration.caching.program import Evaluation, Recompute
from flowpolicy.acceleration.engine import Engine, Plan, random_observations
from flowpolicy.acceleration.onnx.builder import Builder, input_name
from flowpolicy.acceleration.onnx.graph import Graph, import_onnx
from flowpolicy.acceleration.onnx.session import Session
from flowpolicy.errors import BackendError, ConfigError, FlowPolicyError
from flowpolicy.flow.solvers import SOLVERS, integrate
from flowpolicy.policy import FlowPolicy

WHOLE_LOOP = 16
"""Most network evaluations that are unrolled into one graph."""
TOLERANCE = {"float32": 1e-4, "int8": 0.5}
"""Largest difference to the eager engine, in normalised actions, that an export may show."""


class OnnxEngine:
    """Runs a plan in ONNX Runtime on the CPU, with as many threads as torch has when it is built.

    Every part of the network is exported once from the module that the eager engine runs. Where the whole
    loop is too long for one graph, each distinct evaluation (which blocks are recomputed, which kept sums
    are added) is a graph; kept outputs stay in buffers that are bound to those graphs once.

    Args:
        policy: on the CPU.
        plan: what it is fixed to.
        exports: parts that an earlier engine of this policy exported, by name; those that are missing are
            added. They are checked like fresh ones.

    Raises:
        BackendError: a policy on another device, or packages that are missing.
        ConfigError: a dtype it does not have.
        FlowPolicyError: the exported graphs do not compute what the eager engine does.
    """

    def __init__(self, policy: FlowPolicy, plan: Plan, exports: dict[str, bytes] | None = None) -> None:
        import_onnx()
        if plan.dtype not in TOLERANCE:
            raise ConfigError(f"dtype is '{plan.dtype}'; backend=onnx takes {' or '.join(TOLERANCE)}.")
        if policy.device.type != "cpu":
            raise BackendError("backend=onnx runs on the CPU; load the policy with device='cpu'.")
        self.plan, self.policy = plan, policy
        eager = Engine(policy, Plan(plan.batch_size, plan.num_steps, plan.solver, plan.schedule))
        builder = Builder(policy, plan, eager, {} if exports is None else exports)
        self._encode = Session(builder.encoder(), plan.dtype)
        self._loop: _Loop | _Steps = _Loop(builder) if len(eager.program) <= WHOLE_LOOP else _Steps(builder)
        self.parity = self._check(eager)

    def __call__(self, observation: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        """See :class:`~flowpolicy.acceleration.sampler.Compute`."""
        return torch.from_numpy(self._loop(self.encode(observation), noise.numpy()).copy())

    def encode(self, observation: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """What is computed once for an observation: keys and values of every layer, in fixed buffers."""
        for key, value in observation.items():
            self._encode.inputs[input_name(key)][...] = value.numpy()
        self._encode.run()
        return self._encode.outputs

    def _check(self, eager: Engine) -> float:
        """Largest difference to the eager engine on three random inputs."""
        policy, rows = self.policy, self.plan.batch_size
        generator = torch.Generator().manual_seed(0)
        worst = 0.0
        for _ in range(3):
            observation = random_observations(policy, rows, generator)
            noise = torch.randn(rows, policy.action_horizon, policy.action_dim, generator=generator)
            normalize = policy.action_normalizer.normalize
            difference = normalize(self(observation, noise)) - normalize(eager(observation, noise))
            worst = max(worst, float(difference.abs().max()))
        if not worst <= TOLERANCE[self.plan.dtype]:
            raise FlowPolicyError(
                f"The ONNX export differs from the policy by {worst:.2g} in normalised actions (allowed: "
                f"{TOLERANCE[self.plan.dtype]:g}); it is not used."
            )
        return worst


class _Loop:
    """All evaluations and the solver in one graph."""

    def __init__(self, builder: Builder) -> None:
        graph, engine, plan = Graph(), builder.eager, builder.plan
        kept: dict[Any, str] = {}
        evaluations = iter(range(len(engine.program)))

        def velocity(x: _Value, t: float) -> _Value:
            e = next(evaluations)
            tables: list[Sequence[str]] = [
                [graph.constant(f"m{e}.{b}.{i}", part.numpy()) for i, part in enumerate(modulation)]
                for b, modulation in enumerate(engine.modulations[e])
            ]
            last = graph.constant(f"l{e}", engine.last[e].numpy())
            return _Value(graph, builder.evaluate(graph, engine.program[e], x.name, tables, last, kept))

        start = _Value(graph, graph.input("noise", builder.chunk))
        end: Any = integrate(velocity, start, plan.num_steps, SOLVERS[plan.solver])  # type: ignore[arg-type]
        for name in builder.context_names():
            graph.input(name, builder.context_shape)
        graph.output(graph.call(builder.finish, end.name)[0], "chunk", builder.chunk)
        self._session = Session(graph, plan.dtype)

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

    def __rmul__(self, factor: float) -> _Value:
        constant = self.graph.constant(f"h{factor!r}", np.array(factor, dtype=np.float32))
        return _Value(self.graph, self.graph.apply("Mul", constant, self.name))


class _Steps:
    """One graph for each distinct evaluation, on common buffers."""

    def __init__(self, builder: Builder) -> None:
        engine, plan = builder.eager, builder.plan
        self._plan, self._program = plan, engine.program
        self._buffers: dict[str, Any] = {}
        self._sessions: dict[Evaluation, Session] = {}
        count = len(builder.blocks)
        for evaluation in engine.program:
            if evaluation not in self._sessions:
                graph = self._graph(builder, evaluation, count)
                self._sessions[evaluation] = Session(graph, plan.dtype, self._buffers)
        self._velocities = np.zeros((2, *builder.chunk), dtype=np.float32)
        graph = Graph()
        end = graph.input("end", builder.chunk)
        graph.output(graph.call(builder.finish, end)[0], "chunk", builder.chunk)
        self._finish = Session(graph, plan.dtype)
        self._tables = [
            torch.cat([*(part for modulation in blocks for part in modulation), last.flatten()]).numpy()
            for blocks, last in zip(engine.modulations, engine.last, strict=True)
        ]

    def _graph(self, builder: Builder, evaluation: Evaluation, count: int) -> Graph:
        graph = Graph()
        x = graph.input("x", builder.chunk)
        width = builder.width
        table = graph.input("table", ((3 * count + 2) * width,))
        modulations: list[Sequence[str]] = [()] * count
        if any(isinstance(operation, Recompute) for operation in evaluation):
            names = [f"t{index}" for index in range(3 * count + 1)]
            sizes = graph.constant("sizes", np.array([width] * (3 * count) + [2 * width], dtype=np.int64))
            graph.nodes.append(graph.onnx.helper.make_node("Split", [table, sizes], names, axis=0))
            modulations, last = [names[i : i + 3] for i in range(0, 3 * count, 3)], names[-1]
        else:
            bounds = [
                graph.constant(f"bound{i}", np.array([value * width], dtype=np.int64))
                for i, value in enumerate((3 * count, 3 * count + 2))
            ]
            last = graph.apply("Slice", table, *bounds)
        last = graph.apply("Reshape", last, graph.constant("pair", np.array([1, 2, width], dtype=np.int64)))
        kept: dict[Any, str] = {}
        read = _reads(evaluation)
        for what in read:
            kept[what] = graph.input(_name(what), builder.stream)
        before = dict(kept)
        velocity = builder.evaluate(graph, evaluation, x, modulations, last, kept)
        graph.output(velocity, "velocity", builder.chunk)
        for what, value in kept.items():
            if before.get(what) != value:
                graph.output(value, "new_" + _name(what), builder.stream)
        return graph

    def __call__(self, context: Mapping[str, Any], noise: Any) -> Any:
        buffers = self._buffers
        for name, value in context.items():
            if name in buffers:
                buffers[name][...] = value
        evaluations = iter(range(len(self._program)))

        def velocity(x: Any, t: float) -> Any:
            e = next(evaluations)
            buffers["x"][...] = x
            buffers["table"][...] = self._tables[e]
            self._sessions[self._program[e]].run()
            found = self._velocities[e % 2]  # a solver may still need the one before
            found[...] = buffers["velocity"]
            return found

        end = integrate(velocity, noise, self._plan.num_steps, SOLVERS[self._plan.solver])
        self._finish.inputs["end"][...] = end
        self._finish.run()
        return self._finish.outputs["chunk"]


def _name(what: int | tuple[int, ...]) -> str:
    return f"kept{what}" if isinstance(what, int) else "sum" + "_".join(map(str, what))


def _reads(evaluation: Evaluation) -> list[int | tuple[int, ...]]:
    """What an evaluation takes from earlier ones."""
    read: list[int | tuple[int, ...]] = []
    for operation in evaluation:
        if isinstance(operation, Recompute):
            continue
        if len(operation.blocks) == 1 or operation.fresh:
            read += operation.blocks
        else:
            read.append(operation.blocks)
    return read
