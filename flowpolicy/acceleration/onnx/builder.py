"""From a policy to ONNX graphs: its parts, exported once, and network evaluations put together from them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from flowpolicy.acceleration.caching.program import Evaluation, Recompute
from flowpolicy.acceleration.engine import BlockEngine, Engine
from flowpolicy.acceleration.onnx.graph import Graph, Part, export_parts
from flowpolicy.models.blocks import Branch, KeyValue, Modulation


class Builder:
    """Exports the parts of an engine, and writes its evaluations into graphs, each as one whole part.

    Args:
        engine: in float32.
        exports: parts that were exported before, by name; those that are missing are added.
    """

    def __init__(self, engine: Engine, exports: dict[str, bytes]) -> None:
        self.engine, policy, rows = engine, engine.policy, engine.batch_size
        self.chunk = (rows, *policy.spec.noise_shape)
        self.observation = {
            key: torch.zeros(rows, policy.spec.obs_horizon, *shape)
            for key, shape in policy.spec.observation_shapes.items()
        }
        parts, self._structure = tree_flatten(engine.network.encode(self.observation))
        self.context = {f"context{index}": tensor for index, tensor in enumerate(parts)}
        self.finish = Part("finish", Call(policy, policy.finish), [torch.zeros(self.chunk)])
        self.encode = Part("encode", self._encoding(), list(self.observation.values()), len(self.context))
        export_parts([self.finish, self.encode, *self.velocity_parts()], exports)

    def velocity_parts(self) -> list[Part]:
        """What is exported for the evaluations."""
        engine, structure = self.engine, self._structure

        def velocity(x: Tensor, t: Tensor, d: Tensor, *context: Tensor) -> Tensor:
            return engine.network.velocity(x, t, d, tree_unflatten(list(context), structure))

        t, d = engine.times[0]
        examples = [torch.zeros(self.chunk), t, d, *self.context.values()]
        self.velocity = Part("velocity", Call(engine.network, velocity), examples)
        return [self.velocity]

    def _encoding(self) -> nn.Module:
        policy, network = self.engine.policy, self.engine.network

        def encode(*given: Tensor) -> tuple[Tensor, ...]:
            observation = dict(zip(self.observation, given, strict=True))
            parts, _ = tree_flatten(network.encode(policy.normalize(observation)))
            return tuple(parts)

        return Call(nn.ModuleList([policy, network]), encode)

    def encoder(self) -> Graph:
        """From observations to the context's tensors."""
        graph = Graph()
        values = [graph.input(input_name(key), value.shape) for key, value in self.observation.items()]
        results = graph.call(self.encode, *values)
        for result, (name, tensor) in zip(results, self.context.items(), strict=True):
            graph.output(result, name, tensor.shape)
        return graph

    def context_input(self, graph: Graph, name: str) -> str:
        """One of the context's tensors as an input."""
        return graph.input(name, self.context[name].shape)

    def table(self, evaluation: int) -> NDArray[np.float32]:
        """The numbers that tell an evaluation from others of its pattern, as one vector."""
        return torch.cat(self.engine.times[evaluation]).numpy()

    def pattern(self, evaluation: int) -> Hashable:
        """Evaluations of one pattern are one graph."""
        return "whole"

    def reads(self, evaluation: int) -> list[Any]:
        """What it takes from earlier evaluations."""
        return []

    def evaluate(self, graph: Graph, evaluation: int, x: str, table: str | None, kept: dict[Any, str]) -> str:
        """Write one evaluation; the name of its velocity.

        Args:
            graph: takes it.
            evaluation: its number.
            x: name of the noisy chunk.
            table: name of :meth:`table` as an input; None writes the numbers down as constants.
            kept: what later evaluations take to the values that stand for it; changed in place.
        """
        if table is None:
            t, d = (
                graph.constant(f"{name}{evaluation}", number.numpy())
                for name, number in zip("td", self.engine.times[evaluation], strict=True)
            )
        else:
            t, d = graph.split(table, [1, 1])
        context = [self.context_input(graph, name) for name in self.context]
        (velocity,) = graph.call(self.velocity, x, t, d, *context)
        return velocity


class BlockBuilder(Builder):
    """Writes evaluations block by block, as a cache schedule's program says."""

    engine: BlockEngine

    def velocity_parts(self) -> list[Part]:
        """The embedding, the readout, and a block of each kind, whose nodes serve all blocks of the kind."""
        engine, rows = self.engine, self.engine.batch_size
        network: Any = engine.network
        context: list[KeyValue] = network.encode(self.observation)
        h = network.embed(torch.zeros(self.chunk))
        self.stream, self.width = tuple(h.shape), h.shape[-1]
        assert rows == len(h)
        modulation, pair = torch.zeros(3, self.width).unbind(0), context[0]
        self.embed = Part("embed", Call(network, network.embed), [torch.zeros(self.chunk)])
        last = torch.zeros(1, 2, self.width)
        self.readout = Part("readout", Call(network, network.readout), [h, last])
        kinds: dict[str, Part] = {}
        modules = [_block(block.module) for block in engine.blocks]
        for index, (block, module) in enumerate(zip(engine.blocks, modules, strict=True)):
            if block.kind not in kinds:
                kinds[block.kind] = Part(f"b{index}", module, [h, *modulation, pair.key, pair.value])
        self._kinds, self._modules = kinds, modules
        return [self.embed, self.readout, *kinds.values()]

    @property
    def blocks(self) -> list[Part]:
        """One part for each block."""
        if not hasattr(self, "_blocks"):
            self._blocks = [
                self._kinds[block.kind].like(f"b{index}", module)
                for index, (block, module) in enumerate(zip(self.engine.blocks, self._modules, strict=True))
            ]
        return self._blocks

    def table(self, evaluation: int) -> NDArray[np.float32]:
        """Modulations of every block and of the readout."""
        blocks, last = self.engine.modulations[evaluation], self.engine.last[evaluation]
        return torch.cat([*(part for modulation in blocks for part in modulation), last.flatten()]).numpy()

    def pattern(self, evaluation: int) -> Hashable:
        """Which blocks are recomputed, and which kept sums are added."""
        return self.engine.program[evaluation]

    def reads(self, evaluation: int) -> list[Any]:
        """Blocks and runs of blocks whose outputs, or sums of them, are added again."""
        return _reads(self.engine.program[evaluation])

    def evaluate(self, graph: Graph, evaluation: int, x: str, table: str | None, kept: dict[Any, str]) -> str:
        """See :meth:`Builder.evaluate`."""
        modulations, last = self._modulations(graph, evaluation, table)
        (h,) = graph.call(self.embed, x)
        for operation in self.engine.program[evaluation]:
            if isinstance(operation, Recompute):
                block = operation.block
                layer = self.engine.layers[block]
                pair = [self.context_input(graph, f"context{2 * layer + part}") for part in (0, 1)]
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
        (velocity,) = graph.call(self.readout, h, last)
        return velocity

    def _modulations(
        self, graph: Graph, evaluation: int, table: str | None
    ) -> tuple[Sequence[Sequence[str]], str]:
        """Names of each block's three parts, and of the readout's."""
        count, width = len(self.engine.blocks), self.width
        if table is None:
            parts = [
                [graph.constant(f"m{evaluation}.{b}.{i}", part.numpy()) for i, part in enumerate(modulation)]
                for b, modulation in enumerate(self.engine.modulations[evaluation])
            ]
            return parts, graph.constant(f"l{evaluation}", self.engine.last[evaluation].numpy())
        pair = graph.constant("pair", np.array([1, 2, width], dtype=np.int64))
        if any(isinstance(operation, Recompute) for operation in self.engine.program[evaluation]):
            names = graph.split(table, [width] * (3 * count) + [2 * width])
            return [names[i : i + 3] for i in range(0, 3 * count, 3)], graph.apply("Reshape", names[-1], pair)
        bounds = [
            graph.constant(f"bound{i}", np.array([value * width], dtype=np.int64))
            for i, value in enumerate((3 * count, 3 * count + 2))
        ]
        return [()] * count, graph.apply("Reshape", graph.apply("Slice", table, *bounds), pair)


def build(engine: Engine, exports: dict[str, bytes]) -> Builder:
    """The builder for an engine."""
    return BlockBuilder(engine, exports) if isinstance(engine, BlockEngine) else Builder(engine, exports)


def input_name(key: str) -> str:
    """An observation in the encoder's graph: no key is the name of something else there."""
    return f"observation {key}"


def kept_name(what: int | tuple[int, ...]) -> str:
    """Of a block's kept output, or of the sum of a run of them."""
    return f"kept{what}" if isinstance(what, int) else "sum" + "_".join(map(str, what))


class Call(nn.Module):
    """A function and the module whose parameters it uses, as the exporter wants them."""

    def __init__(self, owner: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.owner, self.function = owner, function

    def forward(self, *values: Tensor) -> Any:
        """The function's results."""
        return self.function(*values)


def _block(branch: Branch) -> Call:
    def gated(h: Tensor, shift: Tensor, factor: Tensor, gate: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return branch.forward(h, Modulation(shift, factor, gate), KeyValue(key, value))

    return Call(branch, gated)


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
