"""ONNX Runtime as a backend: parts exported once, put together to graphs, run on fixed buffers."""
