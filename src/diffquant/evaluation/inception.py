"""InceptionFeatures: the 2048 features that published FIDs are computed on, from a local weights file.

The network is the Inception v3 of 2015-12-05 as FID uses it: average pools that do not count padding, a maximum pool in the last
block, and a bilinear resize to 299 pixels without half-pixel centres. The weights are not part of the package; the file is
``pt_inception-2015-12-05-6726825d.pth`` of the FID ports, converted once to safetensors, since pickles are never read here
(``docs/evaluation.md``).

Sources: Szegedy et al. 2016 (arXiv 1512.00567) for the blocks; Heusel et al. 2017 (arXiv 1706.08500) for FID.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from diffquant.errors import EvaluationError

SIZE = 299  # pixels that the network sees
LOGITS = 1008
POOL = "branch_pool"

Layer = tuple[Any, ...]  # a convolution: output channels, kernel, and with a third entry, its stride, no padding
Stage = dict[str, Layer]  # convolutions of one input, by name
Branches = list[list[Stage]]  # side by side, each its stages in a row; the last one sees the block's pooled input

STEM: dict[str, Layer] = {
    "Conv2d_1a_3x3": (32, 3, 2),
    "Conv2d_2a_3x3": (32, 3, 1),
    "Conv2d_2b_3x3": (64, 3),
    "Conv2d_3b_1x1": (80, 1),
    "Conv2d_4a_3x3": (192, 3, 1),
}
HALVED = ("Conv2d_3b_1x1", "Mixed_5b")  # they see their input through a maximum pool


def _row(name: str, *layers: Layer) -> list[Stage]:
    return [{f"{name}_{number}": layer} for number, layer in enumerate(layers, 1)]


def _fork(name: str) -> Stage:
    return {f"{name}a": (384, (1, 3)), f"{name}b": (384, (3, 1))}


def _a(pooled: int) -> Branches:
    double = _row("branch3x3dbl", (64, 1), (96, 3), (96, 3))
    return [[{"branch1x1": (64, 1)}], _row("branch5x5", (48, 1), (64, 5)), double, [{POOL: (pooled, 1)}]]


def _c(width: int) -> Branches:
    across, down = (width, (1, 7)), (width, (7, 1))
    single = _row("branch7x7", (width, 1), across, (192, (7, 1)))
    double = _row("branch7x7dbl", (width, 1), down, across, down, (192, (1, 7)))
    return [[{"branch1x1": (192, 1)}], single, double, [{POOL: (192, 1)}]]


_B: Branches = [[{"branch3x3": (384, 3, 2)}], _row("branch3x3dbl", (64, 1), (96, 3), (96, 3, 2)), []]
_SEVEN = _row("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2))
_D: Branches = [_row("branch3x3", (192, 1), (320, 3, 2)), _SEVEN, []]
_SINGLE: list[Stage] = [{"branch3x3_1": (384, 1)}, _fork("branch3x3_2")]
_DOUBLE = [*_row("branch3x3dbl", (448, 1), (384, 3)), _fork("branch3x3dbl_3")]
_E: Branches = [[{"branch1x1": (320, 1)}], _SINGLE, _DOUBLE, [{POOL: (192, 1)}]]

_average = functools.partial(functional.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum = functools.partial(functional.max_pool2d, kernel_size=3, stride=1, padding=1)
_halve = functools.partial(functional.max_pool2d, kernel_size=3, stride=2)

BLOCKS: dict[str, tuple[Branches, Callable[[Tensor], Tensor]]] = {
    "Mixed_5b": (_a(32), _average),
    "Mixed_5c": (_a(64), _average),
    "Mixed_5d": (_a(64), _average),
    "Mixed_6a": (_B, _halve),
    "Mixed_6b": (_c(128), _average),
    "Mixed_6c": (_c(160), _average),
    "Mixed_6d": (_c(160), _average),
    "Mixed_6e": (_c(192), _average),
    "Mixed_7a": (_D, _halve),
    "Mixed_7b": (_E, _average),
    "Mixed_7c": (_E, _maximum),  # a peculiarity of the original graph
}


@final
class _Convolution(nn.Module):
    """Convolution without bias, batch normalisation, ReLU; without a stride in `layer` padding keeps the size."""

    def __init__(self, inputs: int, layer: Layer) -> None:
        super().__init__()
        outputs, kernel, *stride = layer
        padding = "valid" if stride else "same"
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride[0] if stride else 1, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


@final
class Inception(nn.Module):
    """The network, with the names of the published weights; it returns the 2048 pooled features."""

    def __init__(self) -> None:
        super().__init__()
        width = 3
        for name, layer in STEM.items():
            self.add_module(name, _Convolution(width, layer))
            width = layer[0]
        for name, (branches, _) in BLOCKS.items():
            block, joined = nn.ModuleDict(), 0
            for stages in branches:
                widths = [width]
                for stage in stages:
                    block.update({part: _Convolution(widths[0], layer) for part, layer in stage.items()})
                    widths = [layer[0] for layer in stage.values()]
                joined += sum(widths)
            self.add_module(name, block)
            width = joined
        self.fc = nn.Linear(width, LOGITS)

    def forward(self, x: Float[Tensor, "n 3 299 299"]) -> Float[Tensor, "n 2048"]:
        """Features of pictures in [-1, 1)."""
        for name in STEM:
            x = self.get_submodule(name)(_halve(x) if name in HALVED else x)
        for name, (branches, pool) in BLOCKS.items():
            x = _halve(x) if name in HALVED else x
            joined: list[Tensor] = []
            for stages in branches:
                outputs = [pool(x) if stages is branches[-1] else x]
                for stage in stages:
                    outputs = [self.get_submodule(f"{name}.{part}")(outputs[0]) for part in stage]
                joined += outputs
            x = torch.cat(joined, dim=1)
        return x.mean(dim=(2, 3))


@final
class InceptionFeatures:
    """Inception as a feature extractor. Its classes are photographs, so it returns no confidence and no agreement."""

    name = "inception-2015-12-05"

    def __init__(self, network: Inception, sha256: str) -> None:
        self.network, self.sha256 = network.eval(), sha256

    @classmethod
    def from_file(cls, path: str | Path) -> InceptionFeatures:
        """Weights from a safetensors file. Raises `EvaluationError` where it is missing, damaged, or of another network."""
        path = Path(path)
        try:
            weights = load_file(path)
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        except (OSError, SafetensorError) as error:
            raise EvaluationError(f"{path}: no safetensors file ({error}); see docs/evaluation.md for how to make it") from error
        network = Inception()
        try:
            differing = network.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            raise EvaluationError(f"{path}: {str(error).splitlines()[-1].strip()}; the weights are of another network") from error
        if names := sorted(differing.missing_keys + differing.unexpected_keys):
            raise EvaluationError(f"{path}: tensor {names[0]!r} does not fit; the file holds another network's weights")
        return cls(network, sha256)

    @torch.no_grad()
    def features(self, pictures: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """Pooled features; grey pictures are repeated over three channels."""
        if pictures.shape[1] == 1:
            pictures = pictures.expand(-1, 3, -1, -1)
        batches = [self.network((resize(part.float()) - 128) / 128) for part in pictures.split(16)]
        return torch.cat(batches)

    def confidence(self, pictures: UInt8[Tensor, "n c h w"]) -> Float[Tensor, " n"] | None:
        """None."""
        return None

    def agreement(self, pictures: UInt8[Tensor, "n c h w"], conditions: Sequence[str | int]) -> Float[Tensor, " n"] | None:
        """None."""
        return None


def resize(pictures: Float[Tensor, "n c h w"], size: int = SIZE) -> Float[Tensor, "n c size size"]:
    """Bilinear without half-pixel centres and without antialiasing: output pixel i lies at input i * in / out."""
    for axis in (2, 3):
        length = pictures.shape[axis]
        place = torch.arange(size, device=pictures.device) * (length / size)
        below = place.floor().long()
        above = (below + 1).clamp(max=length - 1)
        share = (place - below).view([-1 if dimension == axis else 1 for dimension in range(4)])
        low, high = pictures.index_select(axis, below), pictures.index_select(axis, above)
        pictures = low + (high - low) * share
    return pictures
