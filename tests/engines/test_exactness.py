"""What the machine multiplies exactly: the worst case against kernels that saturate, and the digits that are made of the answer."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffquant.engines import exactness
from diffquant.engines.exactness import ALL, CODES, PAIR, PORTABLE, answer_of
from diffquant.engines.exactness.kernel import Kernel, bounds, worst_case
from diffquant.engines.graph import portable
from diffquant.engines.int8.packed import digits

ROOT = Path(__file__).parents[2]
X86 = platform.machine().lower() in ("x86_64", "amd64")


def exact(codes: Tensor, weights: Tensor) -> Tensor:
    return (codes.double() @ weights.double().t()).float()


def in_pairs(codes: Tensor, weights: Tensor) -> Tensor:
    """Products of unsigned codes and signed weights, neighbours added in 16 bits that saturate."""
    products = codes.int()[:, None] * weights.int()[None]
    pairs = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-PAIR - 1, PAIR)
    return pairs.sum(-1).float()


def halving(codes: Tensor, weights: Tensor) -> Tensor:
    """A kernel that makes room by halving the weights, and so rounds them."""
    return exact(codes, torch.round(weights.float() / 2)) * 2


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [(exact, (ALL,) * 7), (in_pairs, (PORTABLE, *(ALL,) * 6)), (halving, (0,) * 7), (lambda *_: torch.zeros(7, 512), (0,) * 7)],
)
def test_the_worst_case_finds_the_largest_exact_weight(kernel, expected):
    for channels in (16, 504):
        assert bounds(kernel(*worst_case(channels)), channels) == expected


def test_every_place_of_an_output_counts():
    codes, weights = worst_case(16)
    pixels = exact(codes, weights)[..., None, None].expand(-1, -1, 2, 2).clone()
    assert bounds(pixels, 16) == (ALL,) * 7
    pixels[0, 4 * (100 - 1), 1, 1] += 1  # the first row of weights of 100, beside codes of 255
    assert bounds(pixels, 16) == (99, *(ALL,) * 6)


def test_an_answer_holds_for_narrower_codes():
    answer = exactness.Answer("one", (64, 128, 128, 128, 128, 128, 128), 2.0, "")
    assert [answer.largest(last) for last in (255, 254, 128, 127, 100, 3, 1)] == [64, 64, 64, 128, 128, 128, 128]
    assert answer.usable and answer.largest(256) == 0
    assert not exactness.Answer("two", (7, 128, 128, 128, 128, 128, 128), 2.0, "").usable


def test_16_bits_hold_every_pair_of_the_portable_bound():
    assert portable(CODES[0]) == PORTABLE
    for last in range(1, 256):
        largest = portable(last)
        assert 2 * last * largest <= PAIR and (largest == ALL or 2 * last * (largest + 1) > PAIR)


@pytest.mark.parametrize("kernel", exactness.KERNELS)
def test_every_kernel_of_this_machine_has_an_answer(kernel):
    answer = answer_of(kernel)
    assert answer is answer_of(kernel)
    assert answer.kernel == kernel and len(answer.exact) == len(CODES)
    if X86:  # the portable bound holds on all of them
        assert not answer.reason
        assert all(largest >= portable(last) for largest, last in zip(answer.exact, CODES, strict=True))


def test_a_kernel_that_is_not_there_is_not_usable(monkeypatch):
    def missing(codes, weights, integer):
        raise AttributeError("'_OpNamespace' 'onednn' object has no attribute 'qlinear_prepack'\nand more")

    monkeypatch.setitem(exactness.KERNELS, "missing", Kernel(missing))
    answer = answer_of("missing")
    assert answer.reason == "'_OpNamespace' 'onednn' object has no attribute 'qlinear_prepack'" and not answer.usable


@given(st.integers(2, 128), st.lists(st.integers(-(2**20), 2**20), min_size=1))
def test_digits_add_up_and_stay_within_the_bound(largest, values):
    integers = torch.tensor(values, dtype=torch.int32)
    parts = list(digits(integers, largest))
    assert torch.equal(sum(digit.int() * factor for digit, factor in parts), integers)
    assert all(digit.dtype == torch.int8 and int(digit.int().abs().max()) <= largest for digit, _ in parts)
    assert len(parts) == 1 or int(integers.abs().max()) > min(largest, 127)


@pytest.mark.parametrize(
    ("low", "high", "largest", "count"), [(-128, 127, 128, 1), (-64, 64, 64, 1), (-128, 127, 64, 2), (-255, 255, 128, 2)]
)
def test_how_many_products_a_weight_costs(low, high, largest, count):
    assert len(list(digits(torch.arange(low, high + 1, dtype=torch.int32), largest))) == count


SATURATING = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.mark.skipif(not X86, reason="switches of x86 kernels")
def test_every_layer_is_exact_where_kernels_add_in_16_bits():
    """PyTorch and OpenVINO with the kernels of an older processor, which saturate, in a process of its own."""
    run = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "saturating.py")],
        env={**os.environ, **SATURATING, "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "layers are exact" in run.stdout
