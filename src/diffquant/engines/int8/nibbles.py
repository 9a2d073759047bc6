"""Weights of up to 4 bits held in half a byte each, in the layout of a kernel, and unpacked into shared memory at each call.

A kernel's own layout of a weight is a tensor whose bytes are int8 values in another order, and padding. `Nibbles` holds two of them
in a byte: the first half of the bytes in the low bits, the second half in the high bits, so that whole vectors are unpacked. All
weights of one layout share one such tensor (`Scratch`), into which a weight is unpacked under a lock before its product. That takes
0.05 ns for each weight, which is a tenth of a product of 100 rows or so.

PyTorch gives no name to the bytes of such a tensor, but their place: ``torch.ops.mkldnn.data_ptr``. Every weight is unpacked once
where it is packed, and compared.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any, final
from weakref import WeakValueDictionary

import torch
from jaxtyping import Int8
from torch import Tensor

LEAST = 1 << 18  # weights; in a layer with fewer unpacking takes more than a tenth of the time, and gains little memory
PART = 1 << 22  # weights that are unpacked at once; larger layers are cut along their outputs
OUTPUTS = 64  # that kernels lay out together; a part with another number is padded
ROWS = 128  # of a product; with fewer, unpacking would take more than a tenth of its time
VECTOR = 128  # bytes that are unpacked together

_LOW = 0x0F0F0F0F0F0F0F0F  # the low half of each of 8 bytes


def packable(integers: Int8[Tensor, ...]) -> bool:
    """Whether a weight fits 4 bits, and is worth it."""
    return integers.numel() >= LEAST and bool((integers.amin() >= -8) & (integers.amax() <= 7))


def available() -> bool:
    """Whether this PyTorch gives the place of a laid-out weight's bytes."""
    return all(hasattr(torch.ops.mkldnn, name) for name in ("data_ptr", "_nbytes", "_get_mkldnn_serialized_md"))


@final
class Scratch:
    """The tensor that all weights of one layout are unpacked into, by one thread at a time."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.bytes, self.lock = weight, _bytes(weight), threading.RLock()
        self._parts: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self.four, self.eight = torch.tensor(4, dtype=torch.int8), torch.tensor(8, dtype=torch.int8)  # faster than numbers
        self.low = torch.tensor(_LOW)

    def parts(self, body: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first half of the first `body` bytes, the same as int64, the second half, and the rest."""
        if body not in self._parts:
            with torch.inference_mode(False):
                first, second, rest = self.bytes.tensor_split([body // 2, body])
                self._parts[body] = first, first.view(torch.int64), second, rest
        return self._parts[body]


@final
class Nibbles:
    """A laid-out weight whose values fit 4 bits. Entered, it is the scratch that holds the weight until it is left."""

    def __init__(self, weight: Tensor) -> None:
        with torch.inference_mode(False):  # written in calls outside of it
            values = _bytes(weight).clone()
            beyond = ((values < -8) | (values > 7)).nonzero()  # sums of the kernel's own stand at the end
            self._body = (int(beyond[0]) if len(beyond) else len(values)) // VECTOR * VECTOR
            low, high = values[: self._body // 2], values[self._body // 2 : self._body]
            self._packed = torch.bitwise_or(high << 4, low + 8)
            self._wide, self._rest = self._packed.view(torch.int64), values[self._body :].clone()
            layout = tuple(weight.shape), bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(weight).tolist())
            with _registry:
                self.scratch = _scratches.get(layout) or Scratch(weight)
                _scratches[layout] = self.scratch
        with self:
            if not torch.equal(self.scratch.bytes, values):
                raise RuntimeError("a weight of 4 bits cannot be unpacked as it was; use engine='simulate' and report this")

    @property
    def held(self) -> int:
        """Bytes that this weight takes, without the scratch."""
        return len(self._packed) + len(self._rest)

    def __enter__(self) -> Tensor:
        scratch = self.scratch
        scratch.lock.acquire()
        first, wide, second, rest = scratch.parts(self._body)
        torch.bitwise_right_shift(self._packed, scratch.four, out=second)
        torch.bitwise_and(self._wide, scratch.low, out=wide)
        first.sub_(scratch.eight)
        if len(self._rest):
            rest.copy_(self._rest)
        return scratch.weight

    def __exit__(self, *error: object) -> None:
        self.scratch.lock.release()


_registry = threading.Lock()
_scratches: WeakValueDictionary[Any, Scratch] = WeakValueDictionary()


def _bytes(weight: Tensor) -> Int8[Tensor, " bytes"]:
    """The bytes of a laid-out weight; valid while it lives."""
    place, count = torch.ops.mkldnn.data_ptr(weight), torch.ops.mkldnn._nbytes(weight)
    return torch.frombuffer((ctypes.c_int8 * count).from_address(place), dtype=torch.int8)
