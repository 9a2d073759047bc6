"""What this machine multiplies exactly: every kernel computes its worst case once, and the integers are compared.

Some integer kernels add products of an unsigned code and a signed weight in pairs of 16 bits, which saturate without an error. No
list of processors says which ones do. A kernel multiplies the largest codes of 2 to 8 bits with weights of every magnitude from 1
to 128, of equal and of alternating signs, over at most 512 channels, so that outputs in float32 are exact integers. The answer is
the largest weight that comes out right beside codes of each width, and the speed of one large product relative to float32.

Each kernel is asked once in a process, when its answer is first needed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from diffquant.engines.exactness import onnxruntime_kernels, openvino_kernels, torch_kernels
from diffquant.engines.exactness.kernel import ALL, CODES, PAIR, PORTABLE, Answer, Kernel

__all__ = ["ALL", "CODES", "KERNELS", "PAIR", "PORTABLE", "Answer", "answer_of", "products_needed"]

KERNELS: dict[str, Kernel] = torch_kernels.KERNELS | openvino_kernels.KERNELS | onnxruntime_kernels.KERNELS


@functools.cache
def answer_of(kernel: str) -> Answer:
    """What `kernel`, one of `KERNELS`, multiplies exactly on this machine."""
    try:
        with torch.inference_mode():
            return KERNELS[kernel].answer(kernel)
    except Exception as error:  # whatever a missing operator or another processor raises, the kernel does not run here
        lines = str(error).splitlines() or [type(error).__name__]
        return Answer(kernel, (0,) * len(CODES), 0.0, lines[0])


def products_needed(kernels: Sequence[str]) -> str:
    """How many products these kernels, all usable, take for large weights, in words."""
    largest = min(answer_of(kernel).largest() for kernel in kernels)
    if largest >= ALL - 1:
        return "exact; every 8-bit weight is one product"
    return f"exact; weights beyond {largest} take two products, or floating point"
