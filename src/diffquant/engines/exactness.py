"""What this machine multiplies exactly, found by asking: every kernel computes its worst case once, and the integers are compared.

Some integer kernels add products of an unsigned code and a signed weight in pairs of 16 bits, which saturate without an error. No
list of processors says which ones do. `ask` multiplies the largest codes of 2 to 8 bits with weights of every magnitude from 1 to
128, of equal and of alternating signs, over at most 512 channels, so that outputs in float32 are exact integers. The answer is the
largest weight that comes out right beside codes of each width, and the speed of one large product in parts of float32's.

Each kernel is asked once in a process, when its answer is first needed.
"""

from __future__ import annotations

import functools
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor
from torch.nn import functional

CODES = tuple((1 << bits) - 1 for bits in range(8, 1, -1))  # the largest codes of 8 to 2 bits
ALL = 128  # the largest magnitude of a signed weight of 8 bits; an answer of 128 means every weight
PORTABLE = 64  # largest weight whose product with two codes of 8 bits fits 16 bits everywhere: 2 * 255 * 64 <= 32767
PAIR = (1 << 15) - 1  # the largest sum of two products that 16 bits hold
SMALLEST = 8  # a kernel that is exact for smaller weights only would take too many products
CHANNELS = (16, 504)  # of the worst case; 504 = 56 * 3 * 3, for convolutions
LARGE = (512, 1024, 1024)  # rows, channels and outputs of the product whose speed is measured
HEAD = (
    256  # of rows, channels and outputs, in an attention; without a kernel for it PyTorch's own loop would take seconds for LARGE
)
ROUNDS = 5

Multiply = Callable[[Tensor, Tensor], Tensor]  # codes [rows, channels], weights [outputs, channels] -> [rows, outputs, ...]


class Answer(NamedTuple):
    """What one kernel multiplies. ``exact``: the largest exact weight beside codes up to each of `CODES`.

    ``speed``: the time of float32 in parts of the kernel's own, for one large product; 0 where it was not measured. ``reason``: why
    the kernel does not run here, else empty.
    """

    kernel: str
    exact: tuple[int, ...]
    speed: float
    reason: str

    def largest(self, last: int = CODES[0]) -> int:
        """The largest magnitude of a weight that is multiplied exactly beside codes from 0 to `last`; 0: none."""
        return next((bound for code, bound in zip(reversed(CODES), reversed(self.exact), strict=True) if code >= last), 0)

    @property
    def usable(self) -> bool:
        """Whether it multiplies 8-bit codes exactly with weights that are not too small to be worth it."""
        return self.largest() >= SMALLEST


def products_needed(kernels: Sequence[str]) -> str:
    """What these kernels, all usable, make of large weights, in words."""
    largest = min(answer_of(kernel).largest() for kernel in kernels)
    if largest >= ALL - 1:
        return "exact; every 8-bit weight is one product"
    return f"exact; weights beyond {largest} take two products, or floating point"


def answer_of(kernel: str) -> Answer:
    """What `kernel`, one of `KERNELS`, multiplies exactly on this machine."""
    return _answer(kernel)


@functools.cache
def _answer(kernel: str) -> Answer:
    try:
        with torch.inference_mode():
            return KERNELS[kernel](kernel)
    except Exception as error:  # whatever a missing operator or another processor raises, the kernel does not run here
        lines = str(error).splitlines() or [type(error).__name__]
        return Answer(kernel, (0,) * len(CODES), 0.0, lines[0])


def worst_case(channels: int) -> tuple[UInt8[Tensor, "codes channels"], Int8[Tensor, "outputs channels"]]:
    """Codes, a row for each of `CODES`, and for every magnitude from 1 to 128 four rows of weights: +, -, + + - -, + -."""
    position = torch.arange(channels)
    pairs, single = position // 2 % 2 == 0, position % 2 == 0
    rows = []
    for magnitude in range(1, ALL + 1):
        most = min(magnitude, ALL - 1)
        rows += [torch.full((channels,), most), torch.full((channels,), -magnitude)]
        rows += [torch.where(signs, most, -magnitude) for signs in (pairs, single)]
    codes = torch.tensor(CODES)[:, None].expand(-1, channels)
    return codes.to(torch.uint8).contiguous(), torch.stack(rows).to(torch.int8)


def bounds(outputs: Float[Tensor, "codes outputs ..."], channels: int) -> tuple[int, ...]:
    """The largest exact weight beside codes up to each of `CODES`, from what a kernel made of the worst case."""
    codes, weights = worst_case(channels)
    expected = codes.double() @ weights.double().t()
    right = (outputs.double().flatten(2) == expected[..., None]) if outputs.dim() > 2 else (outputs == expected)[..., None]
    exact = right.all(-1).view(len(CODES), ALL, -1).all(-1)  # [codes, magnitudes]
    return tuple(int(row.int().cumprod(0).sum()) for row in exact)


def _asked(kernel: str, multiply: Multiply, channels: Sequence[int], speed: Callable[[], float]) -> Answer:
    """The answer of a kernel over several numbers of channels, also for a single row of codes."""
    found = []
    for count in channels:
        codes, weights = worst_case(count)
        found.append(bounds(multiply(codes, weights), count))
        first = multiply(codes[:1].contiguous(), weights)
        found.append((bounds(first.expand(len(CODES), *first.shape[1:]), count)[0], *found[-1][1:]))
    exact = tuple(map(min, zip(*found, strict=True)))
    return Answer(kernel, exact, speed() if exact[0] >= SMALLEST else 0.0, "")


def ratio(slow: Callable[[], object], fast: Callable[[], object]) -> float:
    """Median over rounds, in which both take turns, of the first one's time in parts of the second's."""
    ratios = []
    for index in range(ROUNDS + 1):
        times = []
        for run in (slow, fast):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        if index:  # the first round sets up
            ratios.append(times[0] / times[1])
    return statistics.median(ratios)


def large_product() -> tuple[UInt8[Tensor, "rows channels"], Int8[Tensor, "outputs channels"]]:
    """Codes and weights of one large product, for its speed."""
    rows, channels, outputs = LARGE
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, CODES[0] + 1, (rows, channels), dtype=torch.uint8, generator=generator)
    return codes, torch.randint(-8, 8, (outputs, channels), dtype=torch.int8, generator=generator)


# ---- PyTorch


def _torch_linear(kernel: str) -> Answer:
    def packed(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs = len(weights)
        return torch.ops.onednn.qlinear_prepack(weights, None), torch.ones(outputs), torch.zeros(outputs, dtype=torch.int32)

    def product(codes: Tensor, weights: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        output: Tensor = torch.ops.onednn.qlinear_pointwise(codes, 1.0, 0, *weights, None, 1.0, 0, torch.float32, "none", [], "")
        return output

    def speed() -> float:
        codes, weights = large_product()
        x, dense, laid_out = codes.float(), weights.float(), packed(weights)
        return ratio(lambda: functional.linear(x, dense), lambda: product(codes, laid_out))

    return _asked(kernel, lambda codes, weights: product(codes, packed(weights)), CHANNELS, speed)


def _torch_convolution(kernel: str) -> Answer:
    geometry = ([1, 1], [0, 0], [1, 1], 1)

    def packed(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs = len(weights)
        layout = torch.ops.onednn.qconv_prepack(weights, torch.ones(outputs), 1.0, 0, *geometry, None)
        return layout, torch.ones(outputs), torch.zeros(outputs, dtype=torch.int32)

    def product(codes: Tensor, weights: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        output: Tensor = torch.ops.onednn.qconv2d_pointwise(
            codes, 1.0, 0, *weights, None, *geometry, 1.0, 0, torch.float32, "none", [], None
        )
        return output

    def multiply(codes: Tensor, weights: Tensor) -> Tensor:
        """Pictures of one code each, of 6 x 6 pixels."""
        channels = codes.shape[1] // 9
        pictures = codes[:, :channels, None, None].expand(-1, -1, 6, 6)
        return product(pictures.contiguous(memory_format=torch.channels_last), packed(weights.view(-1, channels, 3, 3)))

    def speed() -> float:
        generator = torch.Generator().manual_seed(0)
        picture = torch.randint(0, 256, (1, 128, 32, 32), dtype=torch.uint8, generator=generator)
        weights = torch.randint(-8, 8, (128, 128, 3, 3), dtype=torch.int8, generator=generator)
        codes, laid_out = picture.contiguous(memory_format=torch.channels_last), packed(weights)
        x, dense = codes.float(), weights.float().contiguous(memory_format=torch.channels_last)
        return ratio(lambda: functional.conv2d(x, dense), lambda: product(codes, laid_out))

    return _asked(kernel, multiply, (3 * 9, 504), speed)


def _torch_int_mm(kernel: str) -> Answer:
    """Signed codes on both sides, as the second product of an attention has them."""

    def product(codes: Tensor, weights: Tensor) -> Tensor:
        return torch._int_mm(codes, weights)

    def multiply(codes: Tensor, weights: Tensor) -> Tensor:
        moved = (codes.int() - 128).to(torch.int8)
        return (product(moved, weights.t().contiguous()) + 128 * weights.sum(1, dtype=torch.int32)).float()

    def speed() -> float:
        codes, weights = (operand[:HEAD, :HEAD].contiguous() for operand in large_product())
        x, dense, moved, turned = codes.float(), weights.float().t(), (codes.int() - 128).to(torch.int8), weights.t().contiguous()
        return ratio(lambda: x @ dense, lambda: product(moved, turned))

    return _asked(kernel, multiply, CHANNELS, speed)


# ---- OpenVINO


def _compiled_openvino(node: Any, inputs: list[Any]) -> Callable[..., Tensor]:
    openvino = importlib.import_module("openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    operators = importlib.import_module("openvino.opset13")
    compiled = openvino.Core().compile_model(openvino.Model([operators.result(node)], inputs), "CPU", settings)
    request = compiled.create_infer_request()
    return lambda *tensors: torch.from_numpy(request.infer([tensor.numpy() for tensor in tensors])[0])


def _openvino_weights(weights: Tensor) -> Any:
    operators = importlib.import_module("openvino.opset13")
    ones = torch.ones(len(weights), *[1] * (weights.dim() - 1)).numpy()
    return operators.multiply(operators.convert(operators.constant(weights.numpy()), "f32"), operators.constant(ones))


def _openvino_codes(parameter: Any, low: float = 0.0) -> Any:
    operators = importlib.import_module("openvino.opset13")
    low_, high = (operators.constant(torch.tensor(value).numpy()) for value in (low, low + 255.0))
    return operators.fake_quantize(parameter, low_, high, low_, high, 256)


def _openvino_parameter(*sizes: int) -> Any:
    single = importlib.import_module("openvino").Type.f32
    return importlib.import_module("openvino.opset13").parameter(list(sizes), single)


def _openvino_linear(kernel: str) -> Answer:
    operators = importlib.import_module("openvino.opset13")

    def compiled(weights: Tensor, rows: int, integer: bool = True) -> Callable[..., Tensor]:
        given = _openvino_parameter(rows, weights.shape[1])
        held = _openvino_weights(weights) if integer else operators.constant(weights.float().numpy())
        codes = _openvino_codes(given) if integer else given
        return _compiled_openvino(operators.matmul(codes, held, False, True), [given])

    def speed() -> float:
        codes, weights = large_product()
        x, runs = codes.float(), [compiled(weights, len(codes), integer) for integer in (False, True)]
        return ratio(lambda: runs[0](x), lambda: runs[1](x))

    return _asked(kernel, lambda codes, weights: compiled(weights, len(codes))(codes.float()), CHANNELS[1:], speed)


def _openvino_convolution(kernel: str) -> Answer:
    operators = importlib.import_module("openvino.opset13")

    def compiled(weights: Tensor, shape: tuple[int, ...], integer: bool = True) -> Callable[..., Tensor]:
        given = _openvino_parameter(*shape)
        held = _openvino_weights(weights) if integer else operators.constant(weights.float().numpy())
        codes = _openvino_codes(given) if integer else given
        return _compiled_openvino(operators.convolution(codes, held, [1, 1], [0, 0], [0, 0], [1, 1]), [given])

    def multiply(codes: Tensor, weights: Tensor) -> Tensor:
        channels = codes.shape[1] // 9
        pictures = codes[:, :channels, None, None].expand(-1, -1, 6, 6).float().contiguous()
        return compiled(weights.view(-1, channels, 3, 3), tuple(pictures.shape))(pictures)

    def speed() -> float:
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(0, 256, (1, 128, 32, 32), generator=generator).float()
        weights = torch.randint(-8, 8, (128, 128, 3, 3), dtype=torch.int8, generator=generator)
        runs = [compiled(weights, tuple(x.shape), integer) for integer in (False, True)]
        return ratio(lambda: runs[0](x), lambda: runs[1](x))

    return _asked(kernel, multiply, CHANNELS[1:], speed)


def _openvino_attention(kernel: str) -> Answer:
    """Two activations: unsigned codes as of a softmax, beside signed ones as of the values."""
    operators = importlib.import_module("openvino.opset13")

    def multiply(codes: Tensor, weights: Tensor) -> Tensor:
        given = [_openvino_parameter(1, *codes.shape), _openvino_parameter(1, *weights.shape)]
        product = operators.matmul(_openvino_codes(given[0]), _openvino_codes(given[1], -128.0), False, True)
        return _compiled_openvino(product, given)(codes.float()[None], weights.float()[None])[0]

    return _asked(kernel, multiply, CHANNELS[1:], lambda: 0.0)


# ---- ONNX Runtime


def _onnxruntime_linear(kernel: str) -> Answer:
    """The form of an exported file, MatMul between quantizers, with signed weights of 8 bits."""
    onnx = importlib.import_module("onnx")
    onnxruntime = importlib.import_module("onnxruntime")
    helper, of_array, kind = onnx.helper, onnx.numpy_helper.from_array, onnx.TensorProto.FLOAT

    def compiled(weights: Tensor, integer: bool = True) -> Callable[[Tensor], Tensor]:
        outputs, channels = weights.shape
        values = {"scale": torch.tensor(1.0), "zero": torch.tensor(0, dtype=torch.uint8)}
        values |= {
            "weight": weights.t().contiguous(),
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
            values, nodes = {"weights": weights.t().float().contiguous()}, [helper.make_node("MatMul", ["x", "weights"], ["y"])]
        places = [helper.make_tensor_value_info(name, kind, ["rows", size]) for name, size in (("x", channels), ("y", outputs))]
        constants = [of_array(value.numpy(), name) for name, value in values.items()]
        graph = helper.make_graph(nodes, "product", places[:1], places[1:], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    def speed() -> float:
        codes, weights = large_product()
        x, runs = codes.float(), [compiled(weights, integer) for integer in (False, True)]
        return ratio(lambda: runs[0](x), lambda: runs[1](x))

    return _asked(kernel, lambda codes, weights: compiled(weights)(codes.float()), CHANNELS, speed)


KERNELS: dict[str, Callable[[str], Answer]] = {
    "torch linear": _torch_linear,
    "torch convolution": _torch_convolution,
    "torch attention": _torch_int_mm,
    "openvino linear": _openvino_linear,
    "openvino convolution": _openvino_convolution,
    "openvino attention": _openvino_attention,
    "onnxruntime linear": _onnxruntime_linear,
}
