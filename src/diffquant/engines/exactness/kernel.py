"""The worst case of an integer kernel: its operands, what comes out right of it, and the speed of one large product.

A kernel is asked as a `Kernel`: a function that prepares a product of codes and weights, of integers or of float32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

CODES = tuple((1 << bits) - 1 for bits in range(8, 1, -1))  # the largest codes of 8 to 2 bits
ALL = 128  # the largest magnitude of a signed weight of 8 bits; an answer of 128 means every weight
PAIR = (1 << 15) - 1  # the largest sum of two products that 16 bits hold
PORTABLE = 64  # largest weight whose product with two codes of 8 bits fits 16 bits everywhere: 2 * 255 * 64 <= 32767
SMALLEST = 8  # a kernel that is exact for smaller weights only would take too many products
CHANNELS = (16, 504)  # of the worst case; 504 = 56 * 3 * 3, for convolutions
LARGE = (512, 1024, 1024)  # rows, channels and outputs of the product whose speed is measured
ROUNDS = 5

Run = Callable[[], Tensor]
Operands = tuple[Tensor, Tensor]  # uint8 codes and int8 weights


class Answer(NamedTuple):
    """What one kernel multiplies. ``exact``: the largest exact weight beside codes up to each of `CODES`.

    ``speed``: the time of float32 over the kernel's own, for one large product; 0 where it was not measured. ``reason``: why the
    kernel does not run here, else empty.
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


def bounds(outputs: Float[Tensor, "codes outputs ..."], channels: int, centre: int = 0) -> tuple[int, ...]:
    """The largest exact weight beside codes up to each of `CODES`, from a kernel's outputs for the worst case, less `centre`."""
    codes, weights = worst_case(channels)
    expected = (codes.double() - centre) @ weights.double().t()
    right = (outputs.double().flatten(2) == expected[..., None]) if outputs.dim() > 2 else (outputs == expected)[..., None]
    exact = right.all(-1).view(len(CODES), ALL, -1).all(-1)  # [codes, magnitudes]
    return tuple(int(row.int().cumprod(0).sum()) for row in exact)


def pictures(codes: Tensor, weights: Tensor) -> Operands:
    """The operands of a 3x3 convolution: those of a linear product as pictures of one code each, of 6 x 6 pixels."""
    if codes.dim() == 4:
        return codes, weights
    channels = codes.shape[1] // 9
    return codes[:, :channels, None, None].expand(-1, -1, 6, 6), weights.view(-1, channels, 3, 3)


def large_product() -> Operands:
    """Codes and weights of one large product, for its speed."""
    rows, channels, outputs = LARGE
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, CODES[0] + 1, (rows, channels), dtype=torch.uint8, generator=generator)
    return codes, torch.randint(-8, 8, (outputs, channels), dtype=torch.int8, generator=generator)


def large_convolution() -> Operands:
    """The same of a convolution."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, CODES[0] + 1, (1, 128, 32, 32), dtype=torch.uint8, generator=generator)
    return codes, torch.randint(-8, 8, (128, 128, 3, 3), dtype=torch.int8, generator=generator)


class Kernel(NamedTuple):
    """How a kernel is asked.

    ``prepare(codes, weights, integer)``: a product that is ready to run, ``[rows, outputs, ...]``, of the kernel or of float32.
    ``channels`` of the worst cases. ``large``: what its speed is measured with; None: it is not. ``centre``: the code that it
    multiplies as zero.
    """

    prepare: Callable[[Tensor, Tensor, bool], Run]
    channels: tuple[int, ...] = CHANNELS
    large: Callable[[], Operands] | None = large_product
    centre: int = 0

    def answer(self, name: str) -> Answer:
        """What it multiplies exactly, also for a single row of codes."""
        largest = []
        for channels in self.channels:
            codes, weights = worst_case(channels)
            every, single = (self.prepare(rows, weights, True)().float() for rows in (codes, codes[:1].contiguous()))
            exact = bounds(every, channels, self.centre)
            alone, *_ = bounds(single.expand(len(CODES), *single.shape[1:]), channels, self.centre)
            largest.append((min(exact[0], alone), *exact[1:]))
        exact = tuple(map(min, zip(*largest, strict=True)))
        return Answer(name, exact, self._speed() if exact[0] >= SMALLEST else 0.0, "")

    def _speed(self) -> float:
        """Median over rounds, in which both take turns, of the time of float32 over the kernel's own."""
        if self.large is None:
            return 0.0
        codes, weights = self.large()
        runs, ratios = [self.prepare(codes, weights, integer) for integer in (False, True)], []
        for _ in range(ROUNDS + 1):
            times = []
            for run in runs:
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            ratios.append(times[0] / times[1])
        return statistics.median(ratios[1:])  # the first round sets up
