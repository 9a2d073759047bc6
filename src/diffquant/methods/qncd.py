"""QNCD's smoothing: the channels that the time embedding raises are divided down before the convolution that follows it.

In a residual block ``conv2(SiLU(h))`` follows ``h = norm(h + embedding)`` or ``h = norm(h) (1 + scale) + shift``, where the
embedding, or scale and shift, is projected from the timestep. How far that raises a channel is read from the projection alone,
averaged over the recorded timesteps and conditions, and becomes ``smooth`` of the convolution.

Source: Chu et al. 2024 (arXiv 2403.19140); released code.
*Differs*: magnitudes are floored at 1 (paper: no floor known; channels that the embedding hardly touches would be divided by nearly
nothing and become the largest); what makes a layer's own output worse is not used (``guard``); classes and texts enter by the mean
over recorded calls. Vectors of several methods on one layer multiply. What else was tried: docs/studies/qncd.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from diffquant.calibration.fit import Run
from diffquant.calibration.recording import Trajectory
from diffquant.calibration.replay import call_recorded, observe
from diffquant.calibration.timing import Work
from diffquant.core.model import clock_of, full_precision
from diffquant.core.watch import watching
from diffquant.errors import SpecError
from diffquant.host.structure import PlannedLayer, residual_blocks
from diffquant.methods.base import Figures, Pass, evaluating, scaled_layers
from diffquant.methods.scaling import Live, has_both, relative_error

NO_BLOCK = (
    "EmbeddingSmoothing: no residual block with a time embedding has smooth: true and both operands quantized on conv2; without "
    "such blocks take brecq, which does the rest of qncd"
)
SMALLEST = 1e-2  # of a norm's weight


@final
class EmbeddingSmoothing(Pass):
    """Multiply ``smooth`` of every residual block's second convolution by what the embedding raises its channels by.

    With ``guard`` a layer whose own output error would grow keeps its vector.
    """

    before_ranges: ClassVar[bool] = True

    guard: bool = True
    samples: int = Field(default=256, ge=1)
    batch_size: int = Field(default=32, ge=1)

    @property
    def needs(self) -> Literal["smooth"]:
        """The vector that is chosen."""
        return "smooth"

    def check(self, model: nn.Module, rows: Sequence[PlannedLayer], data: Trajectory) -> None:
        """Raise `SpecError` where no layer is of the kind that is smoothed."""
        if scaled_layers(rows).isdisjoint(f"{name}.conv2" for name in residual_blocks(model)):
            raise SpecError(NO_BLOCK)

    def apply(self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run) -> Figures:
        """Set the vectors; ranges have to be calibrated afterwards. Raises `SpecError` where no layer is of that kind."""
        blocks = {name: block for name, block in residual_blocks(model).items() if has_both(block.conv2)}
        if not blocks:
            raise SpecError(NO_BLOCK)
        indices = data.subset(min(self.samples, len(data)), generator)
        rows: list[dict[str, object]] = []
        with evaluating(model), torch.no_grad(), full_precision(model):
            embeddings = projected_embeddings(model, blocks, data, indices.split(self.batch_size))
            for name, block in run.track(list(blocks.items()), "embedding smoothing"):
                layer, factors = block.conv2, smoothing(block, embeddings[name])
                smooth = layer.smooth * factors
                row: dict[str, object] = {"layer": f"{name}.conv2", "operand": "smooth", "largest": float(factors.max())}
                row["least"], row["used"] = float(factors.min()), bool((factors != 1).any())
                if self.guard and row["used"]:
                    (calls,) = observe(model, [layer], data, indices, self.batch_size)
                    row["error_before"], row["error_after"] = before, after = tuple(
                        relative_error(layer, each, calls.arguments[0], calls.outputs[0], self.batch_size, Live(searched=True))
                        for each in (layer.smooth, smooth)
                    )
                    row["used"] = after < before
                if row["used"]:
                    layer.smooth = smooth
                rows.append(row)
        return {"layers": rows, "samples": len(indices)}

    def work(self, blocks: int) -> Work:
        """Once for the embeddings, and half the model for each residual block: taken to be every other unit."""
        return Work((1.0 + (0.25 * blocks if self.guard else 0.0)) * self.samples)


def projected_embeddings(
    model: nn.Module, blocks: dict[str, Any], data: Trajectory, batches: tuple[Tensor, ...]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Outputs of each block's projection in recorded calls: pairs of ``[n, channels]`` and the interval of each sample."""
    embeddings: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in blocks}
    clock = clock_of(model)

    def store(name: str, module: nn.Module, arguments: Any, output: Tensor) -> None:
        embeddings[name].append((output.float(), torch.as_tensor(clock.interval).expand(len(output))))

    with watching({block.time_emb_proj: partial(store, name) for name, block in blocks.items()}):
        for picked in batches:
            call_recorded(model, data, picked)
    return embeddings


def smoothing(block: Any, embeddings: list[tuple[Tensor, Tensor]]) -> Float[Tensor, " channels"]:
    """The vector of one block: a mean over timesteps of means over the samples of each."""
    values, intervals = torch.cat([values for values, _ in embeddings]), torch.cat([where for _, where in embeddings])
    if block.time_embedding_norm == "scale_shift":
        values = values.chunk(2, dim=1)[0]  # the shift raises nothing in proportion
        return _mean_over_time((1 + values).abs(), intervals).clamp(min=1.0)
    norm: nn.GroupNorm = block.norm2
    raised = _mean_over_time(group_normalised(values, norm).abs(), intervals)
    return norm.weight.float().abs().clamp(min=SMALLEST) * raised.clamp(min=1.0)


def group_normalised(embeddings: Float[Tensor, "n channels"], norm: nn.GroupNorm) -> Float[Tensor, "n channels"]:
    """An embedding as the norm after it would see it if it were all there is: by its groups and eps, without its weight."""
    groups = embeddings.unflatten(1, (norm.num_groups, -1))
    variance, mean = torch.var_mean(groups, dim=2, keepdim=True, correction=0)
    normalised: Tensor = ((groups - mean) / (variance + norm.eps).sqrt()).flatten(1)
    return normalised


def _mean_over_time(values: Float[Tensor, "n channels"], intervals: Tensor) -> Float[Tensor, " channels"]:
    return torch.stack([values[intervals == interval].mean(dim=0) for interval in intervals.unique()]).mean(dim=0)
