"""More bits for the few inputs that the model's output depends on most.

Quantizing the input of layer l with the error d_l changes the model's output, to first order, by J_l d_l, where J_l is the Jacobian
of the rest of the model. One backward pass from a random direction v of unit covariance gives v . J_l d_l for all layers at once,
and the mean square of that over directions is |J_l d_l|^2 (Hutchinson's estimator). Layers then get more bits in the order of the
error that this takes away for each multiplication of theirs, as long as their multiplications stay within a given share of the
model's.

Bits by sensitivity is common practice for weights and activations (MixDQ: Zhao et al. 2024, arXiv 2405.17873, measures layer after
layer and solves an integer program). *Chosen here*: the estimator, and its use for activations alone, whose bits cost no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from pydantic import Field
from torch import Tensor, nn

from diffquant.calibration.fit import Run, call_recorded
from diffquant.calibration.memory import checkpointed
from diffquant.calibration.observe import predicted
from diffquant.calibration.trajectory import Trajectory
from diffquant.core.affine import fake_quantize
from diffquant.core.layers import QuantizedLayer
from diffquant.core.quantizer import Quantizer
from diffquant.core.surgery import full_precision, quantized_layers, switched
from diffquant.methods.passes import Figures, Pass, evaluating


@final
class AllocateBits(Pass):
    """Quantize the inputs of the most sensitive layers at ``bits``, where that is more, as far as ``products`` goes.

    ``products``: the share of the model's multiplications (attention's own left out) that may take inputs of more bits.
    ``directions``: random directions for each batch of recorded samples; the estimate's relative standard deviation is about the
    square root of 2 over all of them. ``checkpointing`` where the model's graph does not fit: see `AccuQuant`. Ranges stay as they
    are; `CalibrateRanges` afterwards finds those that suit the new bits.
    """

    bits: int = Field(default=8, ge=2, le=8)
    products: float = Field(default=0.1, ge=0, le=1)
    samples: int = Field(default=256, ge=1)
    batch_size: int = Field(default=8, ge=1)
    directions: int = Field(default=2, ge=1)
    checkpointing: bool = False

    def apply(self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run) -> Figures:
        """Change the bits of the chosen quantizers. Raises `SpecError` where ranges were not calibrated."""
        inputs = {name: layer for name, layer in quantized_layers(model) if layer.input_quantizer is not None}
        quantizers = {name: layer.input_quantizer for name, layer in inputs.items() if layer.input_quantizer is not None}
        squares, products = self._measured(model, inputs, data, generator, run)
        bits = {name: quantizer.spec.bits for name, quantizer in quantizers.items()}
        chosen = self._chosen(bits, squares, products)
        for name in chosen:
            quantizers[name].set_bits(self.bits)
        total, whole = sum(squares.values()), sum(products.values())
        rows: list[dict[str, Any]] = [
            {
                "layer": name,
                "operand": "input",
                "bits_before": bits[name],
                "bits": quantizer.spec.bits,
                "error_share": squares[name] / total if total else 0.0,
                "products_share": products[name] / whole,
            }
            for name, quantizer in quantizers.items()
        ]
        return {
            "layers": sorted(rows, key=lambda row: -row["error_share"]),
            "mean_bits": sum(row["bits"] * row["products_share"] for row in rows),
            "products": sum(products[name] for name in chosen) / whole,
        }

    def sample_forwards(self, blocks: int) -> float:
        """A forward pass, and a backward pass for each direction."""
        return float(self.samples * (1 + 2 * self.directions))

    def _chosen(self, bits: dict[str, int], squares: dict[str, float], products: dict[str, int]) -> set[str]:
        """The layers that get more bits: most error for each multiplication first, those that do not fit any more left out."""
        gains = {name: squares[name] * (1 - 4.0 ** (count - self.bits)) / products[name] for name, count in bits.items()}
        left, chosen = self.products * sum(products.values()), set()
        for name in sorted(gains, key=gains.__getitem__, reverse=True):
            if gains[name] > 0 and products[name] <= left:
                chosen.add(name)
                left -= products[name]
        return chosen

    def _measured(
        self, model: nn.Module, inputs: dict[str, QuantizedLayer], data: Trajectory, generator: torch.Generator, run: Run
    ) -> tuple[dict[str, float], dict[str, int]]:
        """By layer: what its input's quantizer alone adds to the output, squared, and its multiplications for one sample."""
        batches = data.subset(min(self.samples, len(data)), generator).split(self.batch_size)
        squares, products = dict.fromkeys(inputs, 0.0), dict.fromkeys(inputs, 0)
        task = run.progress.add_task("sensitivity", total=len(batches))
        with (
            evaluating(model),
            switched(model, True),  # refuses where ranges are missing
            full_precision(model),
            _gated(inputs, products) as gates,
            checkpointed(model, self.checkpointing),
        ):
            for picked in batches:
                with torch.enable_grad():
                    output = predicted(model, call_recorded(model, data, picked)).float()
                for i in range(self.directions):
                    direction = torch.randn(output.shape, generator=generator).to(output.device)
                    found = torch.autograd.grad(
                        output, list(gates.values()), direction, retain_graph=i + 1 < self.directions, allow_unused=True
                    )
                    for name, value in zip(gates, found, strict=True):
                        squares[name] += 0.0 if value is None else float(value) ** 2
                run.progress.advance(task)
        run.progress.remove_task(task)
        calls = len(batches) * self.directions
        return {name: value / calls for name, value in squares.items()}, products


@contextmanager
def _gated(inputs: dict[str, QuantizedLayer], products: dict[str, int]) -> Iterator[dict[str, Tensor]]:
    """While the block runs, each layer's input has ``gate * (its quantization error)`` added, of a gate that is 0.

    `products` is filled with each layer's multiplications for one sample.
    """
    gates, handles = {}, []
    try:
        for name, layer in inputs.items():
            quantizer = layer.input_quantizer
            assert quantizer is not None
            gates[name] = torch.zeros((), device=quantizer.scale.device, requires_grad=True)
            quantizer.observer = _ignore  # with one, the quantizer is called although it is off
            handles.append(quantizer.register_forward_hook(_added_error(gates[name])))
            handles.append(layer.register_forward_hook(_counted(name, products)))
        yield gates
    finally:
        for layer in inputs.values():
            assert layer.input_quantizer is not None
            layer.input_quantizer.observer = None
        for handle in handles:
            handle.remove()


def _ignore(x: Tensor) -> None:
    pass


def _added_error(gate: Tensor) -> Callable[[Quantizer, Any, Tensor], Tensor]:
    def hook(quantizer: Quantizer, arguments: Any, output: Tensor) -> Tensor:
        with torch.no_grad():
            x = output.float()
            error = fake_quantize(x, *quantizer.operands(x), quantizer.spec) - x
        return output + (gate * error).to(output.dtype)

    return hook


def _counted(name: str, products: dict[str, int]) -> Callable[[QuantizedLayer, Any, Tensor], None]:
    def hook(layer: QuantizedLayer, arguments: Any, output: Tensor) -> None:
        products[name] = output[0].numel() * layer.weight[0].numel()

    return hook
