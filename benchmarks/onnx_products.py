"""What ONNX Runtime makes of quantized products: the kernel it chooses, and its time in parts of its own float32 product.

    python benchmarks/onnx_products.py

One product a graph, random weights, one thread, medians of `--runs` after a warm-up; all forms of a product take turns.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # it sends from its import on

import numpy as np
import onnx
import onnxruntime
import rows as results
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

CONV = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
STEP = 0.03


def graph(nodes: list[Any], constants: dict[str, np.ndarray], shape: tuple[int, ...]) -> bytes:
    """A model of `nodes` from x, of `shape`, to y."""
    made = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def quantized_input(zero: Any) -> tuple[list[Any], dict[str, np.ndarray]]:
    """x as codes `q`."""
    return [helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["q"])], {"step": np.float32(STEP), "zero": zero}


def qdq(operation: str, weight: np.ndarray, axis: int, shape: tuple[int, ...], attributes: dict[str, Any]) -> bytes:
    """The form that the export writes, without a bias."""
    nodes, constants = quantized_input(np.int8(0))
    nodes += [
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["w", "steps", "zeros"], ["wq"], axis=axis),
        helper.make_node(operation, ["xq", "wq"], ["y"], **attributes),
    ]
    outputs = weight.shape[axis]
    constants |= {"w": weight, "steps": np.full(outputs, 0.01, np.float32), "zeros": np.zeros(outputs, np.int8)}
    return graph(nodes, constants, shape)


def conv_integer(weight: np.ndarray, zero: Any, shape: tuple[int, ...]) -> bytes:
    nodes, constants = quantized_input(zero)
    nodes += [
        helper.make_node("ConvInteger", ["q", "w", "zero", "wzero"], ["sum"], **CONV),
        helper.make_node("Cast", ["sum"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "factor"], ["y"]),
    ]
    middle = np.uint8(128) if weight.dtype == np.uint8 else np.int8(0)
    constants |= {"w": weight, "wzero": middle, "factor": np.float32(STEP * 0.01)}
    return graph(nodes, constants, shape)


def forms(generator: np.random.Generator) -> dict[str, dict[str, bytes]]:
    """By product, the float32 form first."""
    rows, images = (8, 256, 512), (8, 64, 32, 32)
    matrix, kernel = (generator.integers(-7, 8, size, dtype=np.int8) for size in ((512, 512), (64, 64, 3, 3)))
    unsigned = (kernel.astype(np.int16) + 128).astype(np.uint8)
    plain = {
        operation: graph([helper.make_node(operation, ["x", "w"], ["y"], **more)], {"w": weight * np.float32(0.01)}, shape)
        for operation, weight, shape, more in (("MatMul", matrix, rows, {}), ("Conv", kernel, images, CONV))
    }
    return {
        "MatMul 512 to 512, 2048 rows": {"float32": plain["MatMul"], "QDQ": qdq("MatMul", matrix, 1, rows, {})},
        "Conv 3x3, 64 to 64, 8 x 32 x 32": {
            "float32": plain["Conv"],
            "QDQ": qdq("Conv", kernel, 0, images, CONV),
            "ConvInteger, int8 by uint8": conv_integer(unsigned, np.int8(0), images),
            "ConvInteger, uint8 by uint8": conv_integer(unsigned, np.uint8(128), images),
            "ConvInteger, int8 by int8": conv_integer(kernel, np.int8(0), images),
        },
    }


def session(model: bytes) -> tuple[Any, list[str]]:
    """A session of one thread, and the operations that it really computes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        made = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        kernels = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    return made, [kernel for kernel in kernels if "Conv" in kernel or "MatMul" in kernel]


def timed(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    arguments = parser.parse_args()
    generator, console = np.random.default_rng(0), Console()
    for product, models in forms(generator).items():
        sessions = {form: session(model) for form, model in models.items()}
        shape = next(iter(sessions.values()))[0].get_inputs()[0].shape
        x = {"x": generator.standard_normal(shape, dtype=np.float32)}
        for made, _ in sessions.values():
            made.run(None, x)
        times: dict[str, list[float]] = {form: [] for form in sessions}
        for _ in range(arguments.runs):
            for form, (made, _) in sessions.items():
                times[form].append(timed(partial(made.run, None, x)))
        for form, (_, kernels) in sessions.items():
            ratio = median(ours / theirs for ours, theirs in zip(times[form], times["float32"], strict=True))
            row = {"product": product, "form": form, "kernels": " ".join(kernels), "of_float32": round(ratio, 2)}
            row |= results.provenance() | {"engine": f"onnxruntime {onnxruntime.__version__}"}
            results.put(results.RESULTS / "onnx-products.csv", [row], ("product", "form"))
            console.print(f"{product}, {form}: {ratio:.2f} of float32, {' '.join(kernels)}")


if __name__ == "__main__":
    main()
