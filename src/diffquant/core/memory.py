"""Whether something may be kept in memory that could be computed again."""

from __future__ import annotations

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
