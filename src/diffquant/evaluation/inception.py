"""InceptionFeatures: the 2048 features that published FIDs are computed on, from a local weights file.

The network is the Inception v3 of 2015-12-05 as FID uses it: average pools that do not count padding, a maximum pool in the last
block, and a bilinear resize to 299 pixels without half-pixel centres. The weights are not part of the package; the file is
``pt_inception-2015-12-05-6726825d.pth`` of the FID ports, converted once to safetensors, since pickles are never read here
(``docs/evaluation.md``).

Sources: Szegedy et al. 2016 (arXiv 1512.00567) for the blocks; Heusel et al. 2017 (arXiv 1706.08500) for FID.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from diffquant.errors import EvaluationError

SIZE = 299  # pixels that the network sees
LOGITS = 1008
Shape = int | tuple[int, int]


@final
class _Convolution(nn.Module):
    """Convolution without bias, batch normalisation, ReLU; padding keeps the size unless `padding` says otherwise."""

    def __init__(self, inputs: int, outputs: int, kernel: Shape, stride: int = 1, padding: Shape | None = None) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        same = (sides[0] // 2, sides[1] // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, same if padding is None else padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _halve(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, stride=2)


@final
class _BlockA(nn.Module):
    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Convolution(inputs, 64, 1)
        self.branch5x5_1 = _Convolution(inputs, 48, 1)
        self.branch5x5_2 = _Convolution(48, 64, 5)
        self.branch3x3dbl_1 = _Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3)
        self.branch_pool = _Convolution(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_average(x))], dim=1)


@final
class _BlockB(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = _Convolution(inputs, 384, 3, stride=2, padding=0)
        self.branch3x3dbl_1 = _Convolution(inputs, 64, 1)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, _halve(x)], dim=1)


@final
class _BlockC(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branch1x1 = _Convolution(inputs, 192, 1)
        self.branch7x7_1 = _Convolution(inputs, width, 1)
        self.branch7x7_2 = _Convolution(width, width, (1, 7))
        self.branch7x7_3 = _Convolution(width, 192, (7, 1))
        self.branch7x7dbl_1 = _Convolution(inputs, width, 1)
        self.branch7x7dbl_2 = _Convolution(width, width, (7, 1))
        self.branch7x7dbl_3 = _Convolution(width, width, (1, 7))
        self.branch7x7dbl_4 = _Convolution(width, width, (7, 1))
        self.branch7x7dbl_5 = _Convolution(width, 192, (1, 7))
        self.branch_pool = _Convolution(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], dim=1)


@final
class _BlockD(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Convolution(inputs, 192, 1)
        self.branch3x3_2 = _Convolution(192, 320, 3, stride=2, padding=0)
        self.branch7x7x3_1 = _Convolution(inputs, 192, 1)
        self.branch7x7x3_2 = _Convolution(192, 192, (1, 7))
        self.branch7x7x3_3 = _Convolution(192, 192, (7, 1))
        self.branch7x7x3_4 = _Convolution(192, 192, 3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, _halve(x)], dim=1)


@final
class _BlockE(nn.Module):
    def __init__(self, inputs: int, maximum: bool) -> None:
        super().__init__()
        self.maximum = maximum  # the last block pools by maximum, a peculiarity of the original graph
        self.branch1x1 = _Convolution(inputs, 320, 1)
        self.branch3x3_1 = _Convolution(inputs, 384, 1)
        self.branch3x3_2a = _Convolution(384, 384, (1, 3))
        self.branch3x3_2b = _Convolution(384, 384, (3, 1))
        self.branch3x3dbl_1 = _Convolution(inputs, 448, 1)
        self.branch3x3dbl_2 = _Convolution(448, 384, 3)
        self.branch3x3dbl_3a = _Convolution(384, 384, (1, 3))
        self.branch3x3dbl_3b = _Convolution(384, 384, (3, 1))
        self.branch_pool = _Convolution(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = functional.max_pool2d(x, 3, stride=1, padding=1) if self.maximum else _average(x)
        branches = [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single)]
        branches += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(branches, dim=1)


@final
class Inception(nn.Module):
    """The network, with the names of the published weights; it returns the 2048 pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _BlockA(192, 32), _BlockA(256, 64), _BlockA(288, 64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b, self.Mixed_6c = _BlockC(768, 128), _BlockC(768, 160)
        self.Mixed_6d, self.Mixed_6e = _BlockC(768, 160), _BlockC(768, 192)
        self.Mixed_7a = _BlockD(768)
        self.Mixed_7b, self.Mixed_7c = _BlockE(1280, maximum=False), _BlockE(2048, maximum=True)
        self.fc = nn.Linear(2048, LOGITS)

    def forward(self, x: Float[Tensor, "n 3 299 299"]) -> Float[Tensor, "n 2048"]:
        """Features of pictures in [-1, 1)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = _halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halve(x))))
        for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d):
            x = block(x)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        return x.mean(dim=(2, 3))


@final
class InceptionFeatures:
    """Inception as a feature extractor for the evaluation; it has no confidence to offer."""

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
        counters = {name for name in network.state_dict() if name.endswith("num_batches_tracked")}
        wanted = network.state_dict().keys() - counters
        differing = sorted(wanted ^ (weights.keys() - counters))
        if differing:
            raise EvaluationError(f"{path}: tensor {differing[0]!r} does not fit; the file holds another network's weights")
        try:
            network.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            raise EvaluationError(f"{path}: {str(error).splitlines()[-1].strip()}; the weights are of another network") from error
        return cls(network, sha256)

    @torch.no_grad()
    def features(self, pictures: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """Pooled features; grey pictures are repeated over three channels."""
        if pictures.shape[1] == 1:
            pictures = pictures.expand(-1, 3, -1, -1)
        batches = [self.network((resize(part.float()) - 128) / 128) for part in pictures.split(16)]
        return torch.cat(batches)

    def confidence(self, pictures: UInt8[Tensor, "n c h w"]) -> Float[Tensor, " n"] | None:
        """None: classes of photographs say nothing of legibility."""
        return None

    def agreement(self, pictures: UInt8[Tensor, "n c h w"], conditions: Sequence[str | int]) -> Float[Tensor, " n"] | None:
        """None: features name no class."""
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
