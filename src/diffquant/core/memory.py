"""Memory: whether something may be kept that could be computed again, and giving freed memory back."""

from __future__ import annotations

import ctypes
import sys

import psutil
import torch

RESERVE = 0.25  # of all memory, that stays free


def allows(size: int, device: torch.device) -> bool:
    """Whether `size` bytes more leave a quarter of the memory of `device` free; never where that is not known."""
    if device.type == "cpu":
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        return False
    return bool(free - size > RESERVE * total)


def release_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it (glibc); elsewhere nothing.

    Unpacking and laying out the weights of a large model one by one leaves holes as large as half the model.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
