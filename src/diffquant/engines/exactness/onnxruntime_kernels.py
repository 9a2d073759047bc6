"""The product of ONNX Runtime in the form of an exported file, a MatMul between quantizers, as a kernel to be asked."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from diffquant.engines.exactness.kernel import Kernel, Run


def _linear(codes: Tensor, weights: Tensor, integer: bool) -> Run:
    """With signed weights of 8 bits."""
    onnx, onnxruntime = importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    helper, (outputs, channels), transposed = onnx.helper, weights.shape, weights.t().contiguous()
    values = {
        "scale": torch.tensor(1.0),
        "zero": torch.tensor(0, dtype=torch.uint8),
        "weight": transposed,
        "scales": torch.ones(outputs),
        "zeros": torch.zeros(outputs, dtype=torch.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["values"]),
        helper.make_node("DequantizeLinear", ["weight", "scales", "zeros"], ["weights"], axis=1),
        helper.make_node("MatMul", ["values", "weights"], ["y"]),
    ]
    if not integer:
        values, nodes = {"weights": transposed.float()}, [helper.make_node("MatMul", ["x", "weights"], ["y"])]
    first, last = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", size])
        for name, size in (("x", channels), ("y", outputs))
    )
    constants = [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "product", [first], [last], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = codes.float()
    return lambda: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


KERNELS = {"onnxruntime linear": Kernel(_linear)}
