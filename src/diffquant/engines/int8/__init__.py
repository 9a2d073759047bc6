"""The int8 engine: PyTorch's integer kernels on a CPU."""

from diffquant.engines.int8.engine import Int8

__all__ = ["Int8"]
