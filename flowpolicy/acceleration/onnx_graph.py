"""Exports the parts of the network to ONNX one by one, and puts them together in any order and number."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flowpolicy.errors import BackendError

OPSET = 20


class Part:
    """One exported module: its nodes and weights.

    Args:
        name: unique in the graphs it goes into.
        module: what to export.
        examples: inputs of the shapes it will be called with.
        exports: parts exported before, by name: this one is taken from there, or added.
        outputs: how many results it has.
    """

    def __init__(
        self, name: str, module: nn.Module, examples: Sequence[torch.Tensor], exports: dict[str, bytes],
        outputs: int = 1,
    ) -> None:  # fmt: skip
        onnx = import_onnx()
        self.name = name
        self.inputs = [f"in{i}" for i in range(len(examples))]
        self.outputs = [f"out{i}" for i in range(outputs)]
        if name not in exports:
            exports[name] = self._export(module, examples)
        model = onnx.load_model_from_string(exports[name])
        assert not model.functions
        self.nodes = list(model.graph.node)
        self.weights: dict[str, Any] = {tensor.name: tensor for tensor in model.graph.initializer}

    def _export(self, module: nn.Module, examples: Sequence[torch.Tensor]) -> bytes:
        with warnings.catch_warnings(), Quiet():
            warnings.simplefilter("ignore")
            # Not optimised: the runtime does that, and parameters keep their names.
            program = torch.onnx.export(
                module.eval(), tuple(examples), dynamo=True, verbose=False, opset_version=OPSET,
                input_names=self.inputs, output_names=self.outputs, external_data=False, optimize=False,
            )  # fmt: skip
        assert program is not None
        content: bytes = program.model_proto.SerializeToString()
        return content

    def like(self, name: str, module: nn.Module) -> Part:
        """The same nodes with the parameters of another module of the same kind and sizes."""
        onnx = import_onnx()
        part = copy.copy(self)
        part.name, part.weights = name, dict(self.weights)
        for key, parameter in module.named_parameters():
            if key in part.weights:  # one that the call does not use is not exported
                part.weights[key] = onnx.numpy_helper.from_array(parameter.detach().numpy(), key)
        return part


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
