"""From a policy to ONNX graphs: its parts, exported once, and network evaluations put together from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowpolicy.acceleration.caching.program import Evaluation, Recompute
from flowpolicy.acceleration.engine import Engine, Plan
from flowpolicy.acceleration.onnx.graph import Graph, Part, export_parts
from flowpolicy.models.blocks import Branch, KeyValue, Modulation
from flowpolicy.policy import FlowPolicy


class Builder:
    """Exports the parts, and writes evaluations into graphs."""

    def __init__(self, policy: FlowPolicy, plan: Plan, eager: Engine, exports: dict[str, bytes]) -> None:
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
        self.enter = Part("enter", _Call(network, network.enter), [x])
        last = torch.zeros(1, 2, self.width)
        self.leave = Part("leave", _Call(network, network.leave), [h, last])
        self.finish = Part("finish", _Call(policy, policy.finish), [x])
        self.encode = Part("encode", self._encoding(), list(self.observation.values()), 2 * self.depth)
        kinds: dict[str, Part] = {}
        modules = [_block(block.module) for block in network.blocks()]
        for index, (block, module) in enumerate(zip(network.blocks(), modules, strict=True)):
            if block.kind not in kinds:
                kinds[block.kind] = Part(f"b{index}", module, [h, *modulation, pair.key, pair.value])
        export_parts([self.enter, self.leave, self.finish, self.encode, *kinds.values()], exports)
        self.blocks = [
            kinds[block.kind].like(f"b{index}", module)
            for index, (block, module) in enumerate(zip(network.blocks(), modules, strict=True))
        ]

    def _encoding(self) -> nn.Module:
        network = self.eager.network

        def encode(*given: Tensor) -> tuple[Tensor, ...]:
            observation = dict(zip(self.observation, given, strict=True))
            pairs = network.encode(self.policy.normalize(observation))
            return tuple(tensor for pair in pairs for tensor in pair)

        return _Call(nn.ModuleList([self.policy, network]), encode)

    def encoder(self) -> Graph:
        """From observations to keys and values of every layer."""
        graph = Graph()
        values = [graph.input(input_name(key), value.shape) for key, value in self.observation.items()]
        for result, name in zip(graph.call(self.encode, *values), self.context_names(), strict=True):
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


def input_name(key: str) -> str:
    """An observation in the encoder's graph: no key is the name of something else there."""
    return f"observation {key}"


class _Call(nn.Module):
    """A function and the module whose parameters it uses, as the exporter wants them."""

    def __init__(self, owner: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.owner, self.function = owner, function

    def forward(self, *values: Tensor) -> Any:
        return self.function(*values)


def _block(branch: Branch) -> _Call:
    def gated(h: Tensor, shift: Tensor, factor: Tensor, gate: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return branch.gated(h, Modulation(shift, factor, gate), KeyValue(key, value))

    return _Call(branch, gated)
