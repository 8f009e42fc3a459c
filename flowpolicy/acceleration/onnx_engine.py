"""ONNX Runtime: the whole loop as one graph where it is short, else a graph for each distinct evaluation."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowpolicy.acceleration.engine import Engine, Plan, random_observations
from flowpolicy.acceleration.onnx_graph import Graph, Part, import_onnx
from flowpolicy.acceleration.program import Evaluation, Recompute
from flowpolicy.errors import BackendError, ConfigError, FlowPolicyError
from flowpolicy.flow.solvers import SOLVERS, integrate
from flowpolicy.models.blocks import Branch, KeyValue, Modulation
from flowpolicy.models.transformer import VelocityTransformer
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

    Raises:
        BackendError: a policy on another device, or packages that are missing.
        ConfigError: a dtype it does not have.
        FlowPolicyError: the exported graphs do not compute what the eager engine does.
    """

    def __init__(self, policy: FlowPolicy, plan: Plan) -> None:
        import_onnx()
        if plan.dtype not in TOLERANCE:
            raise ConfigError(f"dtype is '{plan.dtype}'; backend=onnx takes {' or '.join(TOLERANCE)}.")
        if policy.device.type != "cpu":
            raise BackendError("backend=onnx runs on the CPU; load the policy with device='cpu'.")
        self.plan, self.policy = plan, policy
        eager = Engine(policy, Plan(plan.batch_size, plan.num_steps, plan.solver, plan.schedule))
        builder = _Builder(policy, plan, eager)
        self._encode = _Session(builder.encoder(), plan.dtype)
        self._loop: _Loop | _Steps = _Loop(builder) if len(eager.program) <= WHOLE_LOOP else _Steps(builder)
        self.parity = self._check(eager)

    def __call__(self, observation: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        """See :class:`~flowpolicy.acceleration.sampler.Compute`."""
        for key, value in observation.items():
            self._encode.inputs[key][...] = value.numpy()
        self._encode.run()
        return torch.from_numpy(self._loop(self._encode.outputs, noise.numpy()).copy())

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


class _Builder:
    """Exports the parts, and writes evaluations into graphs."""

    def __init__(self, policy: FlowPolicy, plan: Plan, eager: Engine) -> None:
        network, rows = eager.network, plan.batch_size
        self.policy, self.plan, self.eager, self.rows = policy, plan, eager, rows
        self.width, self.depth = network.config.width, network.config.depth
        self.stream = (rows, policy.action_horizon, self.width)
        self.chunk = (rows, policy.action_horizon, policy.action_dim)
        self.observation = {
            key: torch.zeros(rows, policy.obs_horizon, *shape)
            for key, shape in policy.observation_shapes.items()
        }
        context = network.encode(self.observation)
        self.context_shape = tuple(context[0].key.shape)
        x, h = torch.zeros(self.chunk), torch.zeros(self.stream)
        modulation, pair = torch.zeros(3, self.width).unbind(0), context[0]
        self.enter = Part("enter", _Enter(network), [x])
        self.leave = Part("leave", _Leave(network), [h, torch.zeros(1, 2, self.width)])
        self.finish = Part("finish", _Finish(policy), [x])
        kinds: dict[str, Part] = {}
        self.blocks: list[Part] = []
        for index, block in enumerate(network.blocks()):
            name, module = f"b{index}", _Block(block.module)
            if block.kind not in kinds:
                kinds[block.kind] = Part(name, module, [h, *modulation, pair.key, pair.value])
            self.blocks.append(kinds[block.kind].like(name, module))

    def encoder(self) -> Graph:
        """From observations to keys and values of every layer."""
        graph, module = Graph(), _Encode(self.policy, self.eager.network)
        values = [graph.input(key, value.shape) for key, value in self.observation.items()]
        part = Part(
            "encode",
            module,
            list(self.observation.values()),
            2 * self.depth,
        )
        for result, name in zip(graph.call(part, *values), self.context_names(), strict=True):
            graph.output(result, name, self.context_shape)
        return graph

    def context_names(self) -> list[str]:
        """Of the keys and values, layer by layer."""
        return [f"{what}{layer}" for layer in range(self.depth) for what in ("key", "value")]

    def evaluate(
        self,
        graph: Graph,
        evaluation: Evaluation,
        x: str,
        modulations: list[Sequence[str]],
        last: str,
        kept: dict[Any, str],
    ) -> str:
        """One network evaluation; ``kept``: blocks and runs of blocks to the values that stand for them."""
        (h,) = graph.call(self.enter, x)
        for operation in evaluation:
            if isinstance(operation, Recompute):
                block = operation.block
                layer = self.eager.layers[block]
                pair = [graph.input(f"{what}{layer}", self.context_shape) for what in ("key", "value")]
                (output,) = graph.call(self.blocks[block], h, *modulations[block], *pair)
                if operation.kept:
                    kept[block] = output
            elif operation.fresh and len(operation.blocks) > 1:
                output = kept[operation.blocks[0]]
                for block in operation.blocks[1:]:
                    output = graph.apply("Add", output, kept[block])
                kept[operation.blocks] = output
            else:
                output = kept[operation.blocks if len(operation.blocks) > 1 else operation.blocks[0]]
            h = graph.apply("Add", h, output)
        (velocity,) = graph.call(self.leave, h, last)
        return velocity


class _Loop:
    """All evaluations and the solver in one graph."""

    def __init__(self, builder: _Builder) -> None:
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
        self._session = _Session(graph, plan.dtype)

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

    def __init__(self, builder: _Builder) -> None:
        engine, plan = builder.eager, builder.plan
        self._plan, self._program = plan, engine.program
        self._buffers: dict[str, Any] = {}
        self._sessions: dict[Evaluation, _Session] = {}
        count = len(builder.blocks)
        for evaluation in engine.program:
            if evaluation not in self._sessions:
                graph = self._graph(builder, evaluation, count)
                self._sessions[evaluation] = _Session(graph, plan.dtype, self._buffers)
        self._velocities = np.zeros((2, *builder.chunk), dtype=np.float32)
        graph = Graph()
        end = graph.input("end", builder.chunk)
        graph.output(graph.call(builder.finish, end)[0], "chunk", builder.chunk)
        self._finish = _Session(graph, plan.dtype)
        self._tables = [
            torch.cat([*(part for modulation in blocks for part in modulation), last.flatten()]).numpy()
            for blocks, last in zip(engine.modulations, engine.last, strict=True)
        ]

    def _graph(self, builder: _Builder, evaluation: Evaluation, count: int) -> Graph:
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


class _Session:
    """An ONNX Runtime session whose inputs and outputs are NumPy arrays bound once.

    ``new_NAME`` is written to the buffer that another session reads as NAME.
    """

    def __init__(self, graph: Graph, dtype: str, buffers: dict[str, Any] | None = None) -> None:
        import onnxruntime as runtime

        buffers = {} if buffers is None else buffers
        model = graph.model()
        if dtype == "int8":
            model = _quantized(model)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"],
            disabled_optimizers=["MatMulAddFusion"],  # for few rows, two reshapes cost more than a sum
        )  # fmt: skip
        self._binding = self._session.io_binding()
        self.inputs = {name: self._buffer(buffers, name, shape) for name, shape in graph.inputs.items()}
        self.outputs = {
            name: self._buffer(buffers, name.removeprefix("new_"), shape)
            for name, shape in graph.outputs.items()
        }
        for name, array in self.inputs.items():
            self._binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        for name, array in self.outputs.items():
            self._binding.bind_output(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)

    def run(self) -> None:
        """From the input arrays to the output arrays."""
        self._session.run_with_iobinding(self._binding)

    @staticmethod
    def _buffer(buffers: dict[str, Any], name: str, shape: tuple[int, ...]) -> Any:
        if name not in buffers:
            buffers[name] = np.zeros(shape, dtype=np.float32)
        return buffers[name]


def _quantized(model: Any) -> Any:
    """Weights of matrix products as int8, activations quantised as they come."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        before, folded, after = (str(Path(folder) / name) for name in ("model", "folded", "int8"))
        onnx.save(model, before)
        # Transposed weights become constants, which alone are quantised.
        quant_pre_process(before, folded, skip_symbolic_shape=True)
        quantize_dynamic(folded, after, weight_type=QuantType.QInt8, per_channel=True)
        return onnx.load(after)


class _Enter(nn.Module):
    def __init__(self, network: VelocityTransformer) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.enter(x)


class _Leave(nn.Module):
    def __init__(self, network: VelocityTransformer) -> None:
        super().__init__()
        self.network = network

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        return self.network.leave(h, modulation)


class _Finish(nn.Module):
    def __init__(self, policy: FlowPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, chunk: Tensor) -> Tensor:
        return self.policy.finish(chunk)


class _Block(nn.Module):
    def __init__(self, branch: Branch) -> None:
        super().__init__()
        self.branch = branch

    def forward(
        self, h: Tensor, shift: Tensor, factor: Tensor, gate: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        return self.branch.gated(h, Modulation(shift, factor, gate), KeyValue(key, value))


class _Encode(nn.Module):
    def __init__(self, policy: FlowPolicy, network: VelocityTransformer) -> None:
        super().__init__()
        self.policy, self.network = policy, network

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        observation = dict(zip(self.policy.observation_shapes, values, strict=True))
        pairs = self.network.encode(self.policy.normalize(observation))
        return tuple(tensor for pair in pairs for tensor in pair)
