"""The simulation: quantized values in floating point, on any device. It is the specification of every engine."""

from __future__ import annotations

from typing import final

from torch import nn

from diffquant.core.model import quantized_layers
from diffquant.engines.base import Engine, Lowered


@final
class Simulation(Engine):
    """Layers compute with dequantized codes."""

    name, rank = "simulate", 90

    @classmethod
    def unsupported(cls) -> str:
        return ""

    @classmethod
    def explained(cls) -> str:
        return "floating point; the specification of the others, no faster than the original"

    def install(self, model: nn.Module) -> list[Lowered]:
        return [Lowered(name, "the engine is simulate") for name, _ in quantized_layers(model)]

    def uninstall(self, model: nn.Module) -> None:
        pass
