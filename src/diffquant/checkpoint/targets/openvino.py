"""OpenVINO IR."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn

from diffquant.checkpoint.targets.base import Target
from diffquant.engines import openvino
from diffquant.engines.openvino_graph import package


@final
class OpenVinoIr(Target):
    """OpenVINO's own files."""

    name, file = "openvino", openvino.FILE

    def require(self) -> None:
        """OpenVINO."""
        package()

    def build(self, model: nn.Module, example: Mapping[str, Any], form: str) -> Any:
        """An `openvino.Model`."""
        return openvino.build(model, example, form)

    def pair(self, graph: Any) -> int:
        """As `build` noted it."""
        return openvino.pair_of(graph)

    def signed_weights(self, graph: Any) -> bool:
        """Always."""
        return True

    def save(self, graph: Any, folder: Path) -> None:
        """Constants as they are."""
        openvino.save_ir(graph, folder)

    def load(self, folder: Path) -> Any:
        """Compiled in float32."""
        return openvino.compile_graph(openvino.load_ir(folder))

    def run(self, compiled: Any, model: nn.Module, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """One request."""
        return openvino.run(compiled, model, arguments)

    def products(self, compiled: Any) -> Iterator[tuple[str, bool]]:
        """As OpenVINO states its kernels."""
        return openvino.products(compiled)
