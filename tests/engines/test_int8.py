"""The int8 engine against integer arithmetic in float64, and against the simulation, layer by layer."""

import copy
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, UNet2DModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import diffquant as dq
import pipelines
from diffquant import engines
from diffquant.core.attention import AttentionProducts
from diffquant.core.clock import StepClock
from diffquant.core.layers import QuantizedConv2d, QuantizedLinear, make_quantizable
from diffquant.core.model import quantizers
from diffquant.core.quantizer import Quantizer
from diffquant.core.spec import AttentionSpec, LayerRule, LayerSpec, QuantSpec
from diffquant.engines.int8 import attention, integer_blocks, kernels
from diffquant.engines.int8 import engine as int8
from diffquant.engines.int8.integer_blocks import IntegerFeedForward, IntegerResnetBlock2D, IntegerUpsample
from diffquant.engines.int8.integer_layers import IntegerConv2d, IntegerLinear, PackedCodes
from diffquant.errors import CheckpointError

pytestmark = pytest.mark.skipif(bool(int8.Int8.unsupported()), reason=int8.Int8.unsupported() or "integer kernels")


@pytest.fixture(autouse=True)
def of_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where two products of integers take longer than one in floating point."""
    monkeypatch.setattr(int8, "faster_in_float", lambda layer, products, largest: False)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 5), (2, 3, 12)),
    "linear without bias": (lambda: nn.Linear(12, 5, bias=False), (3, 12)),
    "conv": (lambda: nn.Conv2d(12, 5, 3, padding=1), (2, 12, 6, 5)),
    "pointwise conv": (lambda: nn.Conv2d(12, 5, 1), (2, 12, 6, 5)),
    "strided conv": (lambda: nn.Conv2d(12, 5, 3, stride=2, padding=(1, 0), dilation=(1, 2)), (2, 12, 8, 9)),
    "grouped conv": (lambda: nn.Conv2d(12, 6, 3, groups=3), (2, 12, 6, 5)),
    "depthwise conv": (lambda: nn.Conv2d(12, 12, 3, groups=12, padding=1, bias=False), (2, 12, 5, 5)),
    "conv of one channel": (lambda: nn.Conv2d(1, 8, 3, padding=1), (2, 1, 6, 6)),
}


def lowered(layer: nn.Module, spec: LayerSpec, unit_steps: bool = False, timesteps: tuple[float, ...] = ()) -> nn.Module:
    """`layer` with random codes and parameters, frozen and lowered. With `unit_steps` its output is the integer accumulators."""
    layer.requires_grad_(False)
    make_quantizable(layer, spec, StepClock(timesteps))
    assert isinstance(layer, (QuantizedLinear, QuantizedConv2d))
    weight, given = layer.weight_quantizer, layer.input_quantizer
    assert weight is not None and given is not None and spec.weight is not None and spec.input is not None
    weight.codes = torch.randint(spec.weight.code_min, spec.weight.code_max + 1, layer.weight.shape).to(
        torch.int8 if spec.weight.symmetric else torch.uint8
    )
    layer.weight = None  # type: ignore[assignment]
    for quantizer, one in ((weight, spec.weight), (given, spec.input)):
        shape = quantizer.scale.shape
        quantizer.scale.copy_(torch.ones(shape) if unit_steps else torch.rand(shape) * 0.05 + 0.01)
        quantizer.zero_point.copy_(torch.zeros(shape) if one.symmetric else torch.randint(0, one.code_max + 1, shape))
        quantizer.enabled = True
    if given.shift is not None:
        given.shift.copy_(torch.randint(0, 4, given.shift.shape))
    if layer.smooth is not None:
        layer.smooth.copy_(torch.ones_like(layer.smooth) if unit_steps else torch.rand_like(layer.smooth) + 0.5)
    if unit_steps:
        layer.bias = None
    assert int8.lower_layer(layer) == ""
    return layer


def specs(bits: int, symmetric: bool, weight_bits: int, weight_symmetric: bool, **options: object) -> LayerSpec:
    return LayerSpec.model_validate(
        {
            "weight": {"bits": weight_bits, "symmetric": weight_symmetric, "granularity": "channel"},
            "input": {"bits": bits, "symmetric": symmetric},
            **options,
        }
    )


def output_of_codes(layer: nn.Module, codes: list[Tensor], row: int) -> Tensor:
    """The layer's output for unsigned input codes, in float64, from its spec's formula; splits one after the other."""
    assert isinstance(layer, (QuantizedLinear, QuantizedConv2d))
    weight, given = layer.weight_quantizer, layer.input_quantizer
    assert weight is not None and given is not None
    axis = 1 if isinstance(layer, QuantizedConv2d) else -1
    raised = -given.spec.code_min
    parts = [
        (part.double() - raised - given.zero_point[row, index].double()) * given.scale[row, index].double()
        for index, part in enumerate(codes)
    ]
    x = torch.cat(parts, dim=axis)
    if given.shift is not None:
        x = x * torch.exp2(given.shift[row].double()).view((-1, 1, 1) if axis == 1 else (-1,))
    codes_of_weight = weight.codes
    assert codes_of_weight is not None
    scale, zero_point = weight.operands(codes_of_weight)
    dense = (codes_of_weight.double() - zero_point.double()) * scale.double()
    bias = None if layer.bias is None else layer.bias.double()
    if isinstance(layer, QuantizedConv2d):
        return functional.conv2d(x, dense, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return functional.linear(x, dense, bias)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_accumulators_are_exact(kind: str, bits: int, symmetric: bool) -> None:
    """Steps of one and integer inputs: the output is the sum of products of codes, below 2^24, so float32 holds it."""
    make, shape = LAYERS[kind]
    for weight_bits in range(2, 9):
        layer = lowered(make(), specs(bits, symmetric, weight_bits, symmetric), unit_steps=True)
        given = layer.input_quantizer
        assert isinstance(given, Quantizer)
        codes = torch.randint(given.spec.code_min, given.spec.code_max + 1, shape)
        unsigned = (codes - given.spec.code_min).to(torch.uint8)
        output = layer((codes - given.zero_point.view(())).float())
        assert torch.equal(output.double(), output_of_codes(layer, [unsigned], 0))


OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "splits": {"splits": (5, 7)},
    "smooth": {"smooth": True},
    "shift": {"shift": True},
    "shift in sets": {"shift": True, "sets": 3},
    "sets": {"sets": 3},
    "all": {"smooth": True, "shift": True, "sets": 3, "splits": (5, 7)},
}


@pytest.mark.parametrize("kind", ["linear", "conv", "strided conv", "grouped conv"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("weight_bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False)])
def test_codes_and_outputs_of_every_option(kind: str, option: str, weight_bits: int, symmetric: bool) -> None:
    """Codes equal the simulation's but on the edge of rounding; the output is that of the codes up to float32 sums."""
    if kind == "grouped conv" and {"splits", "smooth"} & OPTIONS[option].keys():
        pytest.skip("splits and smooth are refused for grouped layers")
    make, shape = LAYERS[kind]
    timesteps = (900.0, 500.0, 100.0)
    layer = lowered(make(), specs(8, False, weight_bits, symmetric, **OPTIONS[option]), timesteps=timesteps)
    assert isinstance(layer, (IntegerLinear, IntegerConv2d))
    given = layer.input_quantizer
    assert given is not None and given.clock is not None
    for row in range(given.rows):
        given.clock.set_interval(row)
        x = torch.randn(shape)
        codes = layer.product.codes(x, row)
        smoothed = x if layer.smooth is None else x / layer.smooth.view((-1, 1, 1) if x.dim() == 4 else (-1,))
        simulated = given.quantize(smoothed) - given.spec.code_min
        difference = (torch.cat(codes, dim=1 if x.dim() == 4 else -1).float() - simulated).abs()
        assert difference.max() <= 1 and difference.mean() < 0.01  # a tie in a hundred would be far too many
        expected = output_of_codes(layer, codes, row)
        magnitude = output_of_codes_magnitude(layer, codes, row)
        assert ((layer(x).double() - expected).abs() <= 1e-6 * magnitude).all()


def output_of_codes_magnitude(layer: nn.Module, codes: list[Tensor], row: int) -> float:
    """A bound on the terms of any sum in the layer: what float32 rounding is relative to."""
    given = layer.input_quantizer
    weight = layer.weight_quantizer
    assert isinstance(given, Quantizer) and isinstance(weight, Quantizer) and weight.codes is not None
    exponent = 0 if given.shift is None else int(given.shift.max())
    largest = 255.0 * float(given.scale[row].max()) * 2.0**exponent * 255.0 * float(weight.scale.max())
    return largest * weight.codes[0].numel()


def test_padding_is_the_zero_point() -> None:
    layer = lowered(nn.Conv2d(4, 3, 3, padding=1, bias=False), specs(8, False, 4, True))
    codes = layer.product.codes(torch.zeros(1, 4, 3, 3), 0)  # type: ignore[union-attr, operator]
    step = layer.product.sets[0][0]
    # the integers cancel; the kernel scales them and the bias in float32, each rounded once
    rounding = 2.0**-23 * step.zero_point * step.scale * max(float(packed.sums.abs().max()) for packed in step.matrices)
    assert len(codes[0].unique()) == 1 and layer(torch.zeros(1, 4, 3, 3)).abs().max() <= rounding


def test_samples_at_different_timesteps() -> None:
    layer = lowered(nn.Linear(6, 4), specs(8, False, 4, True, sets=3), timesteps=(900.0, 500.0, 100.0))
    given = layer.input_quantizer
    assert isinstance(given, Quantizer) and given.clock is not None
    x = torch.randn(5, 2, 6)
    apart = []
    for index, sample in zip([2, 0, 2, 1, 0], x, strict=True):
        given.clock.set_interval(index)
        apart.append(layer(sample[None]))
    given.clock.set_interval(torch.tensor([2, 0, 2, 1, 0]))
    assert torch.equal(layer(x), torch.cat(apart))


def test_half_precision_inputs() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        layer = lowered(nn.Linear(8, 4), specs(8, False, 4, True))
        x = torch.randn(3, 8).to(dtype)
        assert layer(x).dtype == dtype
        assert torch.allclose(layer(x).float(), layer(x.float()), rtol=2.0**-7)  # one rounding to 8 bits of mantissa


def quantized_unet() -> UNet2DModel:
    """A frozen UNet with attention, one layer of it in floating point and one with its weight only quantized."""
    last = LayerRule(match="@last", weight_bits="float", input_bits="float", reason="last layer")
    model = pipelines.freeze_by_hand(
        pipelines.unet(), rules=[last, LayerRule(match="mid_block.resnets.0.conv1", input_bits="float")]
    )
    assert isinstance(model, UNet2DModel)
    return model


def test_a_model_is_lowered_and_raised_again() -> None:
    model = quantized_unet()
    x = torch.randn(2, 3, 8, 8)
    before, state = model(x, 500).sample, copy.deepcopy(model.state_dict())
    rows = dict(engines.use_engine(model, "int8"))
    assert rows["mid_block.resnets.0.conv1"] == "its input stays in floating point" and "conv_out" not in rows
    assert sum(not reason for reason in rows.values()) == len(rows) - 1
    lowered_state = model.state_dict()
    assert state.keys() == lowered_state.keys() and all(torch.equal(tensor, lowered_state[name]) for name, tensor in state.items())
    after = model(x, 500).sample
    assert not torch.equal(after, before) and (after - before).norm() < 0.1 * before.norm()  # 0.014: codes on an edge, amplified
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x, 500).sample, after)
    assert {row.reason for row in engines.use_engine(model, "simulate")} == {"the engine is simulate"}
    assert torch.equal(model(x, 500).sample, before)
    assert torch.equal(twin(x, 500).sample, after)


def test_what_stays_in_floating_point_writes_channels_last_too() -> None:
    """Or all that follows it, up to the end of the model, copies what it reads."""
    model = quantized_unet()
    layer = model.get_submodule("mid_block.resnets.0.conv1")
    x = torch.randn(2, layer.in_channels, 4, 4)
    before = layer(x)
    assert before.is_contiguous()
    engines.use_engine(model, "int8")
    after = layer(x)
    assert torch.equal(after, before) and after.is_contiguous(memory_format=torch.channels_last)
    engines.use_engine(model, "simulate")
    assert type(layer) is QuantizedConv2d


def test_layers_compute_with_integers_while_quantizers_are_on() -> None:
    model = quantized_unet()
    engines.use_engine(model, "int8")
    layer = model.get_submodule("down_blocks.0.resnets.0.conv1")
    assert isinstance(layer, IntegerConv2d) and layer.input_quantizer is not None
    x = torch.randn(1, 8, 8, 8)
    integer = layer(x)
    seen: list[Tensor] = []
    layer.input_quantizer.observer = seen.append
    simulated = layer(x)
    layer.input_quantizer.observer = None
    assert torch.equal(seen[0], x) and not torch.equal(simulated, integer)
    assert torch.allclose(simulated, integer, atol=0.05)
    layer.input_quantizer.enabled = False
    assert torch.equal(layer(x), functional.conv2d(x, layer.weight_quantizer.dequantized_codes(), layer.bias, padding=1))  # type: ignore[union-attr]


def test_moving_to_another_device_unpacks() -> None:
    model = quantized_unet()
    engines.use_engine(model, "int8")
    moved = model.to("meta")
    assert not any(isinstance(quantizer, PackedCodes) for _, quantizer in quantizers(moved))
    assert all(tensor.device.type == "meta" for tensor in moved.state_dict().values())


def test_a_kind_of_layer_without_a_kernel_is_named() -> None:
    layer = nn.Conv3d(4, 4, 1)
    make_quantizable(layer, specs(8, False, 4, True), StepClock())
    layer.weight_quantizer.scale.fill_(0.1)
    layer.freeze()
    assert int8.lower_layer(layer) == "PyTorch has no integer kernel for Conv3d"


def test_circular_padding_stays_simulated() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
    make_quantizable(layer, specs(8, False, 4, True), StepClock())
    assert isinstance(layer, QuantizedConv2d) and layer.weight_quantizer is not None
    layer.weight_quantizer.scale.fill_(0.1)
    assert int8.lower_layer(layer) == "its weight is not frozen"
    layer.freeze()
    assert int8.lower_layer(layer) == "padding (1, 1), mode 'circular'"


@pytest.mark.parametrize(("kernel", "channels", "kind"), [(1, 128, "matmul"), (3, 12, "convolution")])
def test_no_weight_is_laid_out_again_at_a_call(capfd: pytest.CaptureFixture[str], kernel: int, channels: int, kind: str) -> None:
    """oneDNN says what it does: a reorder at every call where a convolution has a zero point, or is pointwise with 128 channels."""
    layer = lowered(nn.Conv2d(channels, channels, kernel, padding=kernel // 2), specs(8, False, 4, True))
    assert layer.product.sets[0][0].zero_point != 0
    x = torch.randn(2, channels, 6, 5)
    layer(x)
    capfd.readouterr()
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        layer(x)
    done = [line.split(",")[5] for line in capfd.readouterr().out.splitlines() if ",exec," in line]
    assert done == [kind]


def test_convolutions_that_a_kernel_lays_out_again_are_cut(capfd: pytest.CaptureFixture[str]) -> None:
    """Of 192 outputs, for small pictures; cut in two, each is one convolution and nothing else, and the integers are the same."""
    layer = lowered(nn.Conv2d(256, 192, 3, padding=1), specs(8, False, 4, True), unit_steps=True)
    (packed,) = layer.product.sets[0][0].matrices
    assert [(part.first, part.end) for part in packed.halves[0]] == [(0, 128), (128, 192)]
    codes = torch.randint(0, 256, (2, 256, 8, 8))
    x = (codes - layer.input_quantizer.zero_point.view(())).float()  # type: ignore[union-attr]
    expected = output_of_codes(layer, [codes.to(torch.uint8)], 0)
    assert (layer(x).double() - expected).abs().max() <= 2.0**-23 * expected.abs().max() * 4  # beyond 2^24 float32 rounds
    capfd.readouterr()
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        layer(x)
    done = [line.split(",")[5] for line in capfd.readouterr().out.splitlines() if ",exec," in line]
    assert set(done) == {"convolution"}


@pytest.mark.parametrize("padded", [0, 1 << 30])
@pytest.mark.parametrize("kind", ["conv", "strided conv", "grouped conv", "depthwise conv"])
def test_edges_given_here_and_by_the_kernel(monkeypatch: pytest.MonkeyPatch, padded: int, kind: str) -> None:
    """Outside of a picture is the code of zero; both ways the integers are those of the formula."""
    monkeypatch.setattr(kernels, "PADDED", padded)
    make, shape = LAYERS[kind]
    layer = lowered(make(), specs(8, False, 8, False, splits=(5, 7) if kind in ("conv", "strided conv") else ()), unit_steps=True)
    given = layer.input_quantizer
    codes = torch.randint(0, 256, shape)
    parts = list(codes.to(torch.uint8).split(given.splits or [12], dim=1))
    zero_points = given.zero_point[0].repeat_interleave(torch.tensor(given.splits or [12]))
    output = layer((codes - zero_points.view(-1, 1, 1)).float())
    assert torch.equal(output.double(), output_of_codes(layer, parts, 0))


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("activation", ["gelu", "gelu-approximate", "geglu"])
def test_feed_forward_some_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch, bits: int, activation: str) -> None:
    """A transformer's: with 8 bits GELU's kernel puts out codes, with 6 floating point; GEGLU's two halves are multiplied apart."""
    monkeypatch.setattr(kernels, "TOKENS", 4)  # of 15
    block = nn.Sequential(FeedForward(12, activation_fn=activation)).eval()
    forward = block[0]
    assert isinstance(forward, FeedForward)
    codes = {}
    for name, layer in (("first", forward.net[0].proj), ("second", forward.net[2])):
        lowered(layer, specs(bits, False, 4, True, sets=2), timesteps=(900.0, 100.0))
        codes[name] = layer.weight_quantizer.codes.clone()
    rows = int8.Int8().install(block)
    assert isinstance(forward, IntegerFeedForward) and not any(row.reason for row in rows)
    assert torch.equal(forward.net[0].proj.weight_quantizer.codes, codes["first"])
    x = torch.randn(3, 5, 12)
    together = []
    for interval in (0, 1):
        for _, quantizer in quantizers(block):
            if quantizer.clock is not None:
                quantizer.clock.set_interval(interval)
        together.append(forward(x))
        parts = FeedForward.forward(forward, x)  # layer by layer
        moved = (together[-1] - parts).abs() > 1e-5 * parts.abs().max()
        # a value on the edge of rounding moves an output by the second layer's step times a weight
        step = forward.net[2].input_quantizer.scale[interval].max() * (forward.net[2].weight_quantizer.scale * 8).max()
        assert (together[-1] - parts).abs().max() <= 2 * step and moved.float().mean() < 0.05
    assert not torch.equal(*together)
    seen = []
    hook = forward.net[2].register_forward_hook(lambda module, given, output: seen.append(given[0].dtype))
    assert torch.equal(forward(x), parts) and seen == [torch.float32]  # who looks at the layer sees what the model computes
    hook.remove()
    own, seen[:] = forward.net[2].forward, []
    forward.net[2].forward = lambda x: seen.append(x.dtype) or own(x)  # as offloading does
    assert torch.equal(forward(x), parts) and seen == [torch.float32]
    del forward.net[2].forward
    layer, forward.net[2] = forward.net[2], nn.Sequential(forward.net[2])  # as an adapter does
    assert torch.equal(forward(x), parts)
    forward.net[2] = layer
    int8.Int8().uninstall(block)
    simulated = forward(x)
    assert type(forward) is FeedForward and (together[1] - simulated).norm() < 0.01 * simulated.norm()
    assert torch.equal(forward.net[0].proj.weight_quantizer.codes, codes["first"])


@pytest.mark.parametrize("batch", [2, 64])  # from 64 on diffusers changes the memory format
@pytest.mark.parametrize("size", [None, (7, 10)])
@pytest.mark.parametrize("options", [{}, {"splits": (8, 4)}, {"smooth": True}], ids=str)
def test_upsampling_repeats_codes(
    monkeypatch: pytest.MonkeyPatch, batch: int, size: tuple[int, int] | None, options: dict[str, object]
) -> None:
    """Equal to quantizing what was upsampled, bit for bit: every value is quantized by itself."""
    block = nn.Sequential(Upsample2D(12, use_conv=True, out_channels=6)).eval()
    upsample = block[0]
    assert isinstance(upsample, Upsample2D)
    lowered(upsample.conv, specs(6, False, 4, True, sets=2, **options), timesteps=(900.0, 100.0))
    int8.Int8().install(block)
    assert isinstance(upsample, IntegerUpsample)
    x = torch.randn(batch, 12, 4, 5)
    seen = []
    for interval in (0, 1):
        for _, quantizer in quantizers(block):
            if quantizer.clock is not None:
                quantizer.clock.set_interval(interval)
        repeated = upsample(x, size)
        assert repeated.shape[2:] == (size or (8, 10)) and torch.equal(repeated, Upsample2D.forward(upsample, x, size))
        seen.append(repeated)
    assert not torch.equal(*seen)
    given = []
    monkeypatch.setattr(type(upsample.conv.product), "codes", lambda product, x, row: given.append(x.shape[2:]) or [])
    monkeypatch.setattr(integer_blocks, "multiply", lambda *_: torch.zeros(1))
    upsample(x, size)
    assert given == [(4, 5)]  # before they are more
    monkeypatch.undo()
    shapes = []
    hook = upsample.conv.register_forward_hook(lambda module, given, output: shapes.append(given[0].shape[2:]))
    assert torch.equal(upsample(x, size), seen[1]) and shapes == [size or (8, 10)]  # who looks at the layer sees its input
    hook.remove()
    int8.Int8().uninstall(block)
    assert type(upsample) is Upsample2D


@pytest.mark.parametrize("embedded", ["default", "scale_shift", None])
@pytest.mark.parametrize("options", [{}, {"out_channels": 6}, {"output_scale_factor": 2.0, "skip_time_act": True}], ids=str)
def test_residual_blocks_write_into_their_own_tensors(embedded: str | None, options: dict[str, Any]) -> None:
    """Equal to diffusers' forward, bit for bit; nothing that anyone else can see is overwritten."""
    torch.manual_seed(0)
    given = {"temb_channels": None} if embedded is None else {"temb_channels": 6, "time_embedding_norm": embedded}
    block = nn.Sequential(ResnetBlock2D(in_channels=8, groups=2, **given, **options)).eval()
    resnet = block[0]
    assert isinstance(resnet, ResnetBlock2D)
    for conv in (resnet.conv1, resnet.conv2):
        lowered(conv, specs(8, False, 4, True))
    x, embedding = torch.randn(3, 8, 4, 4), None if embedded is None else torch.randn(3, 6)
    kept = x.clone(), None if embedding is None else embedding.clone()
    int8.Int8().install(block)
    assert type(resnet) is IntegerResnetBlock2D
    with torch.no_grad():
        expected = ResnetBlock2D.forward(resnet, x, embedding)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ResnetBlock2D, "forward", None)
            assert torch.equal(resnet(x, embedding), expected)
            assert torch.equal(copy.deepcopy(resnet)(x, embedding), expected)
        assert torch.equal(x, kept[0]) and (embedding is None or torch.equal(embedding, kept[1]))
        seen = []
        for watched in (resnet.norm1, resnet.conv1, resnet.norm2, resnet.conv2):
            hook = watched.register_forward_hook(lambda module, given, output: seen.append((output, output.clone())))
            assert torch.equal(resnet(x, embedding), expected)
            hook.remove()
        assert len(seen) == 4 and all(torch.equal(*pair) for pair in seen)  # who looks at a layer keeps what it put out
        layer, resnet.conv1 = resnet.conv1, nn.Sequential(resnet.conv1)  # as an adapter does
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ResnetBlock2D, "forward", lambda *_: expected)
            assert resnet(x, embedding) is expected
        resnet.conv1 = layer
    int8.Int8().uninstall(block)
    assert type(resnet) is ResnetBlock2D


def test_norms_before_attention_keep_the_layout_of_tokens() -> None:
    model = nn.Sequential(Attention(8, heads=2, dim_head=4, norm_num_groups=2)).eval()
    norm = model[0].group_norm
    x = torch.randn(2, 6, 8)
    with torch.no_grad():
        expected = norm(x.transpose(1, 2)).transpose(1, 2)
        int8.Int8().install(model)
        output = norm(x.transpose(1, 2)).transpose(1, 2)
        picture = x.view(2, 8, 3, 2)
        assert torch.equal(norm(picture), nn.GroupNorm.forward(norm, picture))
    assert not expected.is_contiguous() and output.is_contiguous() and torch.allclose(output, expected, atol=1e-6)
    int8.Int8().uninstall(model)
    assert type(norm) is nn.GroupNorm


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_codes_with_and_without_the_kernel_of_one_pass(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Also of a part of the channels, and of values beyond all codes; half a step may go to either side."""
    x = torch.randn(2, 24, 5, 5).contiguous(memory_format=torch.channels_last)[:, 8:]
    x[0, 0, 0, :4] = torch.tensor([1e30, -1e30, 0.25, 0.75])
    zero_point = 100 if dtype == torch.uint8 else -3
    expected = (x / 0.5).round().add(zero_point).clamp(*((0, 255) if dtype == torch.uint8 else (-128, 127)))
    halves = (x / 0.5).frac().abs() == 0.5
    for one_pass in {kernels.ONE_PASS, False}:
        monkeypatch.setattr(kernels, "ONE_PASS", one_pass)
        codes = kernels.quantized(x, 0.5, zero_point, dtype)
        assert codes.dtype == dtype and torch.equal(codes.float()[~halves], expected[~halves])
        assert ((codes.float() - expected)[halves].abs() <= 1).all() and halves.sum() == 2


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scores", [1 << 20, 100])
@pytest.mark.parametrize("integers", [0, 1 << 20])
@pytest.mark.parametrize("spec", [QuantSpec(bits=8), QuantSpec(bits=8, symmetric=True), QuantSpec(bits=6)], ids=str)
def test_attention_in_blocks(monkeypatch: pytest.MonkeyPatch, masked: bool, scores: int, integers: int, spec: QuantSpec) -> None:
    monkeypatch.setattr(attention, "SCORES", scores)
    monkeypatch.setattr(attention, "INTEGER_SCORES", integers)
    probabilities = QuantSpec(bits=spec.bits)
    products = AttentionProducts(AttentionSpec(query=spec, key=spec, value=spec, softmax=probabilities), StepClock())
    for name, quantizer in products.named_children():
        assert isinstance(quantizer, Quantizer)
        quantizer.scale.fill_(1 / probabilities.code_max if name == "softmax" else 8 / 2**spec.bits)
        quantizer.zero_point.fill_(0 if name == "softmax" or spec.symmetric else 2 ** (spec.bits - 1) - 3)
        quantizer.enabled = True
    query, key, value = (3 * torch.randn(2, 3, tokens, 8) for tokens in (20, 9, 9))  # some beyond all codes
    mask = (torch.rand(2, 1, 20, 9) > 0.3) if masked else None
    if mask is not None:
        mask[..., 0] = True
    with torch.no_grad():
        simulated = products(query, key, value, mask)
        products.__class__ = attention.BlockedProducts
        blocked = products(query, key, value, mask)
        added = products(query, key, value, mask.float().sub(1).mul(1e9)) if mask is not None else blocked
    # a probability on the edge of rounding moves an output by one step of it times a value
    moved = (blocked - simulated).abs() > 1e-5
    assert (blocked - simulated).abs().max() <= 2 * value.abs().max() / probabilities.code_max and moved.float().mean() < 0.01
    assert torch.equal(added, blocked)


COMPILED = """
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from pipelines import freeze_by_hand
from torch import nn
from diffquant import engines

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.attention = Attention(8, heads=2, dim_head=4)
        self.forward_part = FeedForward(8, activation_fn="gelu")

    def forward(self, sample, timestep):
        tokens = self.conv(sample).flatten(2).transpose(1, 2)
        return self.forward_part(self.attention(tokens))

torch.manual_seed(0)
model = freeze_by_hand(Block().eval(), sets=3)
assert not any(row.reason for row in engines.use_engine(model, "int8"))
x = torch.randn(2, 3, 4, 4)
graphs = []

def backend(graph, inputs):  # without code generation, which needs a compiler
    graphs.append(str(graph.code))
    return graph.forward

with torch.no_grad():
    expected = [model(x, torch.tensor(timestep)) for timestep in (900, 500, 100)]
    compiled = torch.compile(model, backend=backend)
    found = [compiled(x, torch.tensor(timestep)) for timestep in (900, 500, 100)]
assert not torch.equal(expected[0], expected[1])
assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected))
assert len(graphs) == 2, len(graphs)  # that of the clock, and the model's
assert all(f"diffquant.{operator}" in graphs[1] for operator in ("product", "feed_forward", "attention"))
"""


def test_compiled_models_are_one_graph_that_follows_the_clock() -> None:
    """In a process of its own: the shape checks of these tests cannot be compiled."""
    tests = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", COMPILED], env={**os.environ, "PYTHONPATH": str(tests)}, check=True, timeout=240)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe = DDIMPipeline(quantized_unet(), pipelines.ddim().scheduler)
    return dq.save(pipe, tmp_path_factory.mktemp("saved") / "pipe")


def test_from_pretrained_chooses(saved: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def packed(model: nn.Module) -> int:
        return sum(isinstance(quantizer, PackedCodes) for _, quantizer in quantizers(model))

    assert packed(DDIMPipeline.from_pretrained(saved).unet) > 0 and packed(dq.load(saved).unet) > 0
    assert packed(dq.load(saved, engine="simulate").unet) == 0
    with dq.engine("simulate"):
        assert packed(UNet2DModel.from_pretrained(saved / "unet")) == 0
    monkeypatch.setattr(int8.Int8, "unsupported", lambda: "this CPU is old")
    with caplog.at_level(logging.WARNING):
        assert packed(dq.load(saved).unet) == 0
    assert "this CPU is old; quantized models are simulated" in caplog.text
    with pytest.raises(CheckpointError, match="engine: 'int8', but this CPU is old; use engine='simulate'"):
        dq.load(saved, engine="int8")
    with pytest.raises(CheckpointError, match="engine: 'int9'; allowed are int8, openvino, openvino-bf16, simulate"):
        dq.load(saved, engine="int9")
    monkeypatch.undo()
    monkeypatch.setenv("DIFFQUANT_ENGINE", "simulate")
    assert packed(dq.load(saved).unet) == 0 and packed(dq.load(saved, engine="int8").unet) > 0
    monkeypatch.setenv("DIFFQUANT_ENGINE", "fast")
    with pytest.raises(CheckpointError, match="engine: 'fast'; allowed are int8, openvino, openvino-bf16, simulate"):
        dq.load(saved)


def test_what_holds_no_quantized_model() -> None:
    with pytest.raises(CheckpointError, match="DDIMPipeline: holds no quantized model"):
        dq.use_engine(pipelines.ddim())


def test_a_loaded_model_is_saved_again(saved: Path, tmp_path: Path) -> None:
    dq.save(dq.load(saved), tmp_path / "again")
    name = "unet/diffusion_pytorch_model.safetensors"
    ours, theirs = (load_file(folder / name) for folder in (saved, tmp_path / "again"))
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize("engine", ["int8", "simulate"])
def test_no_file_stays_mapped(saved: Path, engine: str) -> None:
    pipe = dq.load(saved, engine=engine)
    assert str(saved) not in Path("/proc/self/maps").read_text()
    assert pipe.unet is not None
