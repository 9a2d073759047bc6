"""A GGUF file of the denoiser, which diffusers loads by ``from_single_file``: 4-bit codes stay 4 bits.

The blocks are made of our codes, not by gguf's own quantizer. A block is 32 codes of one output channel and that channel's scale
in float16: Q4_0 where the codes minus the zero point fit 4 bits, Q8_0 where they fit 8. Linear layers are written so; what else is
quantized, as dequantized float32. GGUF quantizes no activations.

Of diffusers 0.42: it multiplies code and scale in float16. Tensors have its own names, which other programs that read GGUF do not
know. It reads the classes that have ``from_single_file``.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, NamedTuple, final

import diffusers
import numpy as np
import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn

from diffquant.checkpoint.targets.base import (
    ROUNDING,
    Target,
    counted,
    refuse_adapter,
    refuse_difference,
    refuse_dropped,
    relative_error,
)
from diffquant.checkpoint.targets.stock import LayersReport, empty_model, float_weight, integers_of, model_class
from diffquant.core.layers import QuantizedLayer
from diffquant.core.model import correction_of, quantized_layers
from diffquant.engines.base import attentions
from diffquant.errors import CheckpointError
from diffquant.host.pipeline import Host, predicted

FILE = "model.gguf"
BLOCK = 32  # codes with one scale
LARGEST = {"Q4_0": 7, "Q8_0": 127}  # code; the smallest is one further from zero
SMALLEST_SCALE = 2.0**-14  # the smallest float16 with all its digits


class Blocks(NamedTuple):
    """The weight of a linear layer in a type of gguf: its integers, and a scale for each output."""

    kind: str
    integers: Int8[Tensor, "out in"]
    scale: Float[Tensor, "out 1"]  # float16

    def values(self) -> Float[Tensor, "out in"]:
        """The weight that diffusers makes of it, a product in float16."""
        return (self.scale * self.integers).float()

    def packed(self) -> UInt8[np.ndarray, "out bytes"]:
        """The blocks as the file holds them: the scale, then 32 codes, or 16 bytes with code i and code i + 16."""
        codes = self.integers.numpy().reshape(-1, BLOCK)
        scales = self.scale.numpy().repeat(self.integers.shape[1] // BLOCK, axis=0).view(np.uint8)
        if self.kind == "Q4_0":
            unsigned = (codes + 8).astype(np.uint8)
            codes = unsigned[:, : BLOCK // 2] | unsigned[:, BLOCK // 2 :] << 4
        return np.concatenate([scales, codes.view(np.uint8)], axis=1).reshape(len(self.integers), -1)


@final
class Gguf(Target):
    """A file and the model's config.json, loaded with diffusers to check them."""

    name = "gguf"

    def require(self) -> None:
        package()

    def write(self, host: Host, folder: Path, form: str, lossy: bool) -> LayersReport:
        """As of every target.

        Raises `CheckpointError` too for a class that diffusers reads no GGUF for, where the loaded weights are not those that were
        written, and where the output is not that of a float model with these weights.
        """
        denoiser = host.denoiser
        refuse_adapter(denoiser)
        if not hasattr(model_class(denoiser), "from_single_file"):
            raise CheckpointError(
                f"export: diffusers reads no GGUF file of a {type(denoiser).__name__}; allowed are classes with from_single_file, "
                "such as UNet2DConditionModel or FluxTransformer2DModel"
            )
        dropped = losses(denoiser)
        refuse_dropped(self.name, dropped, lossy)
        blocks = {name: blocks_of(layer) for name, layer in quantized_layers(denoiser)}
        plain = _plain(denoiser, blocks)
        plain.save_config(folder)
        _save(plain, blocks, folder / FILE)
        loaded = _load(denoiser, folder)
        _check_weights(loaded, plain)
        arguments, expected = host.example_call(steps=1)
        with torch.no_grad():
            output = predicted(loaded, loaded(**arguments))
            held = predicted(plain, plain(**arguments))
        refuse_difference(output, held, ROUNDING)
        layers = {name: "float32 weight" if each is None else f"{each.kind} weight" for name, each in blocks.items()}
        return LayersReport(
            target=self.name,
            file=FILE,
            error=relative_error(output, expected),
            dropped=dropped,
            layers=layers,
            note=_note(denoiser),
        )


def blocks_of(layer: QuantizedLayer) -> Blocks | None:
    """The weight of a frozen layer in blocks; None where it has to be written in floating point."""
    integers, quantizer = integers_of(layer), layer.weight_quantizer
    if integers is None or quantizer is None or not isinstance(layer, nn.Linear) or layer.smooth is not None:
        return None
    outputs, channels = integers.shape
    scale = quantizer.scale.expand(outputs, 1)
    if channels % BLOCK or float(scale.min()) < SMALLEST_SCALE or float(scale.max()) > torch.finfo(torch.float16).max:
        return None
    low, high = (int(value) for value in integers.aminmax())
    kind = next(kind for kind, largest in LARGEST.items() if -largest - 1 <= low and high <= largest)
    return Blocks(kind, integers.cpu(), scale.half().cpu())


def losses(denoiser: nn.Module) -> list[str]:
    """What is not written, a line for each kind, with the number of layers and the first one."""
    inputs = [name for name, layer in quantized_layers(denoiser) if layer.input_quantizer is not None]
    lines = [
        counted(what, names)
        for what, names in (("inputs", inputs), ("operands of attention products", [*attentions(denoiser)]))
        if names
    ]
    return [*lines, *(["the correction while sampling"] if correction_of(denoiser) is not None else [])]


def package() -> Any:
    """The package gguf. Raises `CheckpointError` where it is missing."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise CheckpointError("gguf: the package gguf is missing; pip install 'diffquant[gguf]'") from error


def _plain(denoiser: nn.Module, blocks: dict[str, Blocks | None]) -> Any:
    """A float model of diffusers' own class with the weights that the file holds."""
    layers, model, ours = (
        dict(quantized_layers(denoiser)),
        empty_model(denoiser).requires_grad_(False).eval(),
        denoiser.state_dict(),
    )
    state = {}
    for name in model.state_dict():
        path = name.removesuffix(".weight")
        each = blocks.get(path) if name.endswith(".weight") else None
        if each is not None:
            state[name] = each.values()
        else:
            state[name] = float_weight(layers[path]) if name.endswith(".weight") and path in layers else ours[name]
    model.load_state_dict(state, assign=True)
    return model.float()


def _save(plain: nn.Module, blocks: dict[str, Blocks | None], file: Path) -> None:
    """Write the float tensors of a model, those in blocks as these."""
    gguf = package()
    writer = gguf.GGUFWriter(file, "diffusers")
    for name, tensor in plain.state_dict().items():
        each = blocks.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if each is None:
            writer.add_tensor(name, tensor.cpu().contiguous().numpy())
        else:
            writer.add_tensor(name, each.packed(), raw_dtype=gguf.GGMLQuantizationType[each.kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _load(denoiser: nn.Module, folder: Path) -> nn.Module:
    config = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    model: nn.Module = model_class(denoiser).from_single_file(
        str(folder / FILE), config=str(folder), quantization_config=config, dtype=torch.float32
    )
    return model


def _check_weights(loaded: nn.Module, plain: nn.Module) -> None:
    """Raises where a tensor that diffusers loaded is not bit-equal to the one that was written."""
    dequantize = importlib.import_module("diffusers.quantizers.gguf.utils").dequantize_gguf_tensor
    theirs = loaded.state_dict()
    for name, parameter in loaded.named_parameters():
        theirs[name] = dequantize(parameter)
    for name, tensor in plain.state_dict().items():
        if not torch.equal(theirs[name].float(), tensor):
            raise CheckpointError(f"export: diffusers loads another {name!r} than was written; nothing was written")


def _note(denoiser: nn.Module) -> str:
    kind = type(denoiser).__name__
    return f"load it with {kind}.from_single_file({FILE!r}, config=FOLDER, quantization_config=GGUFQuantizationConfig(...))"
