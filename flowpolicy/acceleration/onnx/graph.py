"""Exports the parts of the network to ONNX, and puts them together in any order and number."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flowpolicy.errors import BackendError

OPSET = 20


class Part:
    """One module to be exported, and after :func:`export_parts` its nodes and weights.

    Args:
        name: unique in the graphs it goes into.
        module: what to export.
        examples: inputs of the shapes it will be called with.
        outputs: how many results it has.
    """

    def __init__(
        self, name: str, module: nn.Module, examples: Sequence[torch.Tensor], outputs: int = 1
    ) -> None:
        self.name, self.module, self.examples = name, module.eval(), tuple(examples)
        self.inputs = [f"in{i}" for i in range(len(examples))]
        self.outputs = [f"out{i}" for i in range(outputs)]
        self.nodes: list[Any] = []
        self.weights: dict[str, Any] = {}

    def read(self, content: bytes) -> None:
        """Take nodes and weights from an export."""
        model = import_onnx().load_model_from_string(content)
        self.nodes = list(model.graph.node)
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}

    def like(self, name: str, module: nn.Module) -> Part:
        """The same nodes with the parameters of another module of the same kind and sizes."""
        onnx = import_onnx()
        part = copy.copy(self)
        part.name, part.weights = name, dict(self.weights)
        for key, parameter in module.named_parameters():
            if key in part.weights:  # one that the call does not use is not exported
                part.weights[key] = onnx.numpy_helper.from_array(parameter.detach().numpy(), key)
        return part


def export_parts(parts: Sequence[Part], exports: dict[str, bytes]) -> None:
    """Fill in nodes and weights of the parts.

    What is missing is exported at once, since most of the seconds that the exporter takes do not depend on
    what it exports.

    Args:
        parts: without the same name twice.
        exports: parts exported before, by name: they are taken from there, and the others added.
    """
    missing = [part for part in parts if part.name not in exports]
    if missing:
        module = _SideBySide(missing).eval()
        graph = module.export().graph
        exports.update((part.name, _cut(graph, part, module)) for part in missing)
    for part in parts:
        part.read(exports[part.name])


class _SideBySide(nn.Module):
    """Parts that have nothing to do with one another, as one module."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        self.owners = nn.ModuleDict({part.name: part.module for part in parts})
        self.parts = parts

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results: list[torch.Tensor] = []
        given = iter(values)
        for part in self.parts:
            result = part.module(*islice(given, len(part.inputs)))
            results += [result] if isinstance(result, torch.Tensor) else result
        return tuple(results)

    def export(self) -> Any:
        """One model, whose inputs and outputs are called after the parts."""
        import_onnx()
        parts = self.parts
        # Clones: the exporter takes the same tensor given twice for one input.
        examples = tuple(value.clone() for part in parts for value in part.examples)
        with warnings.catch_warnings(), Quiet():
            warnings.simplefilter("ignore")
            # Not optimised: the runtime does that, and parameters keep their names.
            program = torch.onnx.export(
                self, examples, dynamo=True, verbose=False,
                input_names=[f"{part.name}.{name}" for part in parts for name in part.inputs],
                output_names=[f"{part.name}.{name}" for part in parts for name in part.outputs],
                opset_version=OPSET, external_data=False, optimize=False,
            )  # fmt: skip
        assert program is not None
        assert not program.model_proto.functions
        return program.model_proto


def _cut(graph: Any, part: Part, whole: _SideBySide) -> bytes:
    """What one part needs of the graph of them all, a model under the part's own names."""
    onnx = import_onnx()
    names = {f"{part.name}.{name}": name for name in (*part.inputs, *part.outputs)}
    # A parameter that parts share has the name that it has in one of them.
    own = {id(tensor): name for name, tensor in _tensors(part.module)}
    names |= {name: own[id(tensor)] for name, tensor in _tensors(whole) if id(tensor) in own}
    needed = {f"{part.name}.{name}" for name in part.outputs}
    nodes = []
    for node in reversed(graph.node):
        if needed.isdisjoint(node.output):
            continue
        needed.update(node.input)
        mine = onnx.NodeProto()
        mine.CopyFrom(node)
        mine.input[:] = [names.get(name, name) for name in node.input]
        mine.output[:] = [names.get(name, name) for name in node.output]
        nodes.append(mine)
    weights = []
    for tensor in graph.initializer:
        if tensor.name in needed:
            weight = onnx.TensorProto()
            weight.CopyFrom(tensor)
            weight.name = names.get(tensor.name, tensor.name)
            weights.append(weight)
    content: bytes = onnx.helper.make_model(
        onnx.helper.make_graph(nodes[::-1], part.name, [], [], weights)
    ).SerializeToString()
    return content


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers under every name that they have."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


class Graph:
    """An ONNX graph under construction; every value is addressed by its name."""

    def __init__(self) -> None:
        self.onnx = import_onnx()
        self.nodes: list[Any] = []
        self.weights: dict[str, Any] = {}
        self.inputs: dict[str, tuple[int, ...]] = {}
        self.outputs: dict[str, tuple[int, ...]] = {}

    def input(self, name: str, shape: Sequence[int]) -> str:
        """A float32 input; asked for twice it is the same one."""
        self.inputs[name] = tuple(shape)
        return name

    def output(self, value: str, name: str, shape: Sequence[int]) -> None:
        """Give a value out under a name."""
        self.nodes.append(self.onnx.helper.make_node("Identity", [value], [name]))
        self.outputs[name] = tuple(shape)

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """A constant; the same name is the same constant."""
        if name not in self.weights:
            self.weights[name] = self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def apply(self, operator: str, *values: str, **attributes: Any) -> str:
        """One operator with one result."""
        result = f"v{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(operator, list(values), [result], **attributes))
        return result

    def split(self, value: str, sizes: Sequence[int]) -> list[str]:
        """A vector cut into parts."""
        lengths = self.constant(f"sizes{len(self.nodes)}", np.array(sizes, dtype=np.int64))
        results = [f"s{len(self.nodes)}.{index}" for index in range(len(sizes))]
        self.nodes.append(self.onnx.helper.make_node("Split", [value, lengths], results, axis=0))
        return results

    def call(self, part: Part, *values: str) -> list[str]:
        """Put a part in, its weights shared between calls; the names of its results."""
        given = dict(zip(part.inputs, values, strict=True))
        prefix = f"c{len(self.nodes)}."

        def renamed(name: str) -> str:
            if not name or name in given:
                return given.get(name, "")
            if name in part.weights:
                shared = f"{part.name}.{name}"
                if shared not in self.weights:
                    weight = self.onnx.TensorProto()
                    weight.CopyFrom(part.weights[name])
                    weight.name = shared
                    self.weights[shared] = weight
                return shared
            return prefix + name

        for node in part.nodes:
            again = self.onnx.NodeProto()
            again.CopyFrom(node)
            again.name = ""
            again.input[:] = [renamed(name) for name in node.input]
            again.output[:] = [renamed(name) for name in node.output]
            self.nodes.append(again)
        return [renamed(name) for name in part.outputs]

    def model(self) -> Any:
        """The finished ModelProto, checked."""
        helper = self.onnx.helper
        kind = self.onnx.TensorProto.FLOAT

        def described(values: dict[str, tuple[int, ...]]) -> list[Any]:
            return [helper.make_tensor_value_info(name, kind, shape) for name, shape in values.items()]

        graph = helper.make_graph(
            self.nodes,
            "flowpolicy",
            described(self.inputs),
            described(self.outputs),
            list(self.weights.values()),
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
        self.onnx.checker.check_model(model)
        return model


def import_onnx() -> Any:
    """The onnx package, with what goes with it, or one sentence on how to get it."""
    try:
        import onnx
        import onnx.helper
        import onnx.numpy_helper
        import onnxruntime

        if find_spec("onnxscript") is None:  # the exporter imports it, which takes half a second
            raise ModuleNotFoundError(name="onnxscript")
    except ImportError as error:
        raise BackendError(
            f"backend=onnx needs '{error.name}', which is not installed; run: pip install 'flowpolicy[onnx]'."
        ) from error
    del onnxruntime  # needed by the sessions
    return onnx


class Quiet:
    """The exporter and the quantiser log what they skip on the way, the latter to the root logger."""

    NAMES = ("torch.onnx", "onnxscript", "onnx_ir", "")

    def __enter__(self) -> None:
        self.levels = [(logger, logger.level) for logger in map(logging.getLogger, self.NAMES)]
        for logger, _ in self.levels:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *error: object) -> None:
        for logger, level in self.levels:
            logger.setLevel(level)
