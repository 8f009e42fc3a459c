"""ONNX Runtime sessions on fixed buffers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowpolicy.acceleration.onnx.graph import Graph, Quiet


class Session:
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

    with Quiet(), tempfile.TemporaryDirectory() as folder:
        before, folded, after = (str(Path(folder) / name) for name in ("model", "folded", "int8"))
        onnx.save(model, before)
        # Transposed weights become constants, which alone are quantised.
        quant_pre_process(before, folded, skip_symbolic_shape=True)
        quantize_dynamic(
            folded,
            after,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm"],  # a convolution would become slower
        )
        return onnx.load(after)
