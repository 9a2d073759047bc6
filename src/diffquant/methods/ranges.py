"""CalibrateRanges: scales and zero points of weights and activations from the values they take.

Activations are watched while the full-precision model runs on the recorded calls, each parameter set seeing the timesteps that the
quantizer's table gives it. ``mse`` looks at histograms, so memory does not grow with the number of samples.

Sources: error to the power 2.4 and 80 shrunken ranges, Q-Diffusion (Li et al. 2023, arXiv 2302.04304) after PTQ4DM (arXiv
2211.15736); moving average 0.95, TFMQ-DM (arXiv 2311.16503).
*Differs*: the two ends of an asymmetric range are shrunk one after the other, not together, since activations after SiLU reach far
up and hardly down; measured by the same error, it can only be lower.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from diffquant.calibration.fit import Run
from diffquant.calibration.recording import Trajectory
from diffquant.calibration.replay import call_recorded
from diffquant.calibration.timing import Work
from diffquant.core.affine import fake_quantize, scale_from_range
from diffquant.core.model import activation_quantizers, full_precision, quantized_layers
from diffquant.core.quantizer import Quantizer
from diffquant.core.spec import QuantSpec
from diffquant.core.watch import observing
from diffquant.errors import CalibrationError
from diffquant.methods.base import Figures, Pass, evaluating

BINS = 2048
CHUNK = 1 << 21  # values that a search holds at a time
POWER = 2.4  # of the error that ``mse`` minimises
MOMENTUM = 0.95  # of ``ema``
Method = Literal["minmax", "ema", "mse"]


@final
class CalibrateRanges(Pass):
    """Set every range by ``minmax``, ``ema`` (moving average of the batches' extremes) or ``mse``.

    ``mse`` minimises the mean of |x - quantized x| to the power 2.4 over ranges shrunk in `candidates` steps. ``samples`` is the
    number of recorded calls that are looked at, spread evenly over the timesteps.
    """

    weights: Method = "mse"
    activations: Method = "mse"
    samples: int = Field(default=512, ge=1)
    batch_size: int = Field(default=32, ge=1)
    candidates: int = Field(default=80, ge=2)

    def apply(self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run) -> Figures:
        """Calibrate all quantizers of `model`. Raises `CalibrationError` naming a quantizer that saw no or non-finite values."""
        rows: list[dict[str, object]] = []
        with evaluating(model), torch.no_grad():
            for name, layer in quantized_layers(model):
                if layer.weight_quantizer is not None:
                    weight = layer.weight_to_quantize()
                    error = self._calibrate_weight(layer.weight_quantizer, weight)
                    rows.append({"layer": name, "operand": "weight", "relative_error": error})
            rows += self.calibrate_activations(model, data, generator, run)
        return {"layers": rows, "samples": self.samples}

    @property
    def weight_options(self) -> dict[str, Any]:
        """Those of the search."""
        return self.model_dump(include={"weights", "candidates"})

    def work(self, blocks: int) -> Work:
        """Once over the samples for the extremes, once more for histograms."""
        return Work(self.samples * (2.0 if self.activations == "mse" else 1.0))

    def _calibrate_weight(self, quantizer: Quantizer, weight: Float[Tensor, "out in ..."]) -> float:
        sizes = quantizer.splits or (weight.shape[1],)
        for part, values in enumerate(weight.split(sizes, dim=1)):
            flat = values.reshape(quantizer.rows, -1)
            low, high = torch.aminmax(flat, dim=1)
            if self.weights == "mse":
                low, high = search_range(flat, quantizer.spec, (low, high), candidates=self.candidates)
            scale, zero_point = scale_from_range(low, high, quantizer.spec)
            quantizer.scale[:, part], quantizer.zero_point[:, part] = scale, zero_point
        quantizer.codes = None
        scale, zero_point = quantizer.operands(weight)
        error = fake_quantize(weight, scale, zero_point, quantizer.spec) - weight
        return float(error.norm() / weight.norm().clamp(min=1e-12))

    def calibrate_activations(
        self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run, only: Collection[str] | None = None
    ) -> list[dict[str, object]]:
        """Calibrate the quantizers of activations, or those named `only`; a row of figures for each."""
        watched = [(name, each) for name, each in activation_quantizers(model).items() if only is None or name in only]
        if not watched:
            return []
        indices = data.subset(min(self.samples, len(data)), generator)
        indices = indices[data.timestep_of[indices].argsort(descending=True, stable=True)]

        def watch(observers: Mapping[str, Callable[[Tensor], None]], label: str) -> None:
            with observing({quantizer: observers[name] for name, quantizer in watched}), full_precision(model):
                for picked in run.track(indices.split(self.batch_size), label):
                    call_recorded(model, data, picked)

        momentum = MOMENTUM if self.activations == "ema" else None
        ranges = {name: _Extremes(quantizer, momentum) for name, quantizer in watched}
        watch(ranges, "ranges of activations")
        for name, extremes in ranges.items():
            if not torch.isfinite(extremes.low).all():
                raise CalibrationError(f"{name}: saw no values, or inf or nan, for some timesteps; record more samples")
        histograms: dict[str, _Histogram] = {}
        if self.activations == "mse":
            histograms = {name: _Histogram(quantizer, ranges[name].low, ranges[name].high) for name, quantizer in watched}
            watch(histograms, "histograms of activations")
        rows: list[dict[str, object]] = []
        for name, quantizer in watched:
            low, high = widest = ranges[name].low, ranges[name].high  # [sets, parts]
            if name in histograms:
                values, counts = histograms[name].values(), histograms[name].counts
                flat = (low.flatten(), high.flatten())
                best = search_range(values.flatten(0, 1), quantizer.spec, flat, counts.flatten(0, 1), self.candidates)
                low, high = (end.view(quantizer.scale.shape) for end in best)
            quantizer.set_ranges(low, high)
            if quantizer.shift is not None:
                quantizer.shift.zero_()  # factors of an earlier range
            owner, _, operand = name.rpartition(".")
            share = (high - low) / (widest[1] - widest[0]).clamp(min=1e-12)
            rows.append({"layer": owner, "operand": operand, "range_kept": float(share.mean())})
        return rows


def search_range(
    values: Float[Tensor, "rows n"],
    spec: QuantSpec,
    widest: tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]],
    counts: Float[Tensor, "rows n"] | None = None,
    candidates: int = 80,
    power: float = POWER,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """The range inside `widest` that minimises the sum of `counts` (1 if None) times |x - quantized x| ** power, for each row.

    Both ends shrink together over `candidates` factors from 1 towards 0.2; asymmetric ranges then shrink each end alone.
    """
    low, high = (widest[0].clamp(max=0), widest[1].clamp(min=0))
    factors = torch.linspace(1.0, 0.2, candidates, device=values.device)[:, None]  # [candidates, 1], the whole range first
    chunk = max(1, CHUNK // values.numel())

    def error(low: Tensor, high: Tensor) -> Tensor:
        """``[candidates, rows]``"""
        scale, zero_point = scale_from_range(low, high, spec)
        repeated = values.expand(len(low), -1, -1)
        errors = fake_quantize(repeated, scale[..., None], zero_point[..., None], spec).sub_(values).abs_().pow_(power)
        return (errors if counts is None else errors * counts).sum(dim=-1)

    def shrink(low: Tensor, high: Tensor, at_low: bool, at_high: bool) -> tuple[Tensor, Tensor]:
        lows = low * factors if at_low else low.expand(candidates, -1)
        highs = high * factors if at_high else high.expand(candidates, -1)
        errors = [error(*ends) for ends in zip(lows.split(chunk), highs.split(chunk), strict=True)]
        best = torch.cat(errors).argmin(dim=0, keepdim=True)
        return lows.gather(0, best)[0], highs.gather(0, best)[0]

    low, high = shrink(low, high, True, True)
    if not spec.symmetric:
        low, high = shrink(low, high, False, True)
        low, high = shrink(low, high, True, False)
    return low, high


def _parts(quantizer: Quantizer, x: Tensor) -> list[tuple[int, int, Tensor]]:
    """The values of a batch by (row, part), each flat."""
    rows = quantizer.present_rows(x.device)
    groups = [(rows, x)] if isinstance(rows, int) else [(int(row), x[rows == row]) for row in rows.unique()]
    sizes = quantizer.splits or (x.shape[quantizer.axis],)
    return [
        (row, part, values.flatten().float())
        for row, samples in groups
        for part, values in enumerate(samples.split(sizes, dim=quantizer.axis))
    ]


class _Extremes:
    """Observer: smallest and largest value of each (row, part), or a moving average of those of the batches."""

    def __init__(self, quantizer: Quantizer, momentum: float | None) -> None:
        self.quantizer, self.momentum = quantizer, momentum
        self.low, self.high = torch.full_like(quantizer.scale, torch.inf), torch.full_like(quantizer.scale, -torch.inf)

    def __call__(self, x: Tensor) -> None:
        for row, part, values in _parts(self.quantizer, x):
            low, high = torch.aminmax(values)
            if self.momentum is not None and torch.isfinite(self.low[row, part]):
                self.low[row, part].lerp_(low, 1 - self.momentum)
                self.high[row, part].lerp_(high, 1 - self.momentum)
            else:
                self.low[row, part] = torch.minimum(low, self.low[row, part])
                self.high[row, part] = torch.maximum(high, self.high[row, part])


class _Histogram:
    """Observer: how often each (row, part) takes values in `BINS` equal bins of its range."""

    def __init__(self, quantizer: Quantizer, low: Tensor, high: Tensor) -> None:
        self.quantizer, self.low, self.high = quantizer, low, high
        self.counts = torch.zeros(*low.shape, BINS, device=low.device)

    def __call__(self, x: Tensor) -> None:
        for row, part, values in _parts(self.quantizer, x):
            low, high = float(self.low[row, part]), float(self.high[row, part])
            if high > low:
                self.counts[row, part] += torch.histc(values, BINS, low, high)
            else:
                self.counts[row, part, 0] += values.numel()

    def values(self) -> Float[Tensor, "rows parts bins"]:
        """The middle of each bin."""
        width = (self.high - self.low) / BINS
        return self.low[..., None] + width[..., None] * (torch.arange(BINS, device=width.device) + 0.5)
