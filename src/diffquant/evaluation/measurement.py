"""What was measured of one model: its figures by metric, its sampling time and its file size."""

from __future__ import annotations

import functools
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, field_serializer, field_validator
from pydantic_core import PydanticCustomError

from diffquant.evaluation.metrics import registered


class Measurement(BaseModel):
    """The figures of one model by the metric's name, of the metrics that apply to it.

    `ratio` is `file_bytes` over those of full precision. `engine` is the engine that the model computed with. In a report that was
    read, figures of metrics that are not registered here stay as they are in the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    engine: str = ""
    seconds: float | None = None
    file_bytes: int | None = None
    ratio: float | None = None
    figures: dict[str, Any] = {}

    @field_validator("figures")
    @classmethod
    def _typed(cls, figures: dict[str, Any]) -> dict[str, Any]:
        metrics = registered()
        return {name: _checked(name, metrics[name].figure, value) if name in metrics else value for name, value in figures.items()}

    @field_serializer("figures")
    def _plain(self, figures: dict[str, Any]) -> dict[str, Any]:
        metrics = registered()
        return {
            name: json.loads(_adapter(metrics[name].figure).dump_json([value]))[0] if name in metrics else value
            for name, value in figures.items()
        }


@functools.cache
def _adapter(figure: Any) -> Any:
    """Of a list of one figure: pydantic takes no configuration for a dataclass alone."""
    return TypeAdapter(list[figure], config=ConfigDict(extra="forbid", ser_json_inf_nan="strings"))


def _checked(name: str, figure: Any, value: Any) -> Any:
    """The value as the type of the metric's figure, or pydantic's error with the place in it."""
    try:
        return _adapter(figure).validate_python([value])[0]
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in (name, *first["loc"][1:]))
        raise PydanticCustomError("figure", "{place}: {message}", {"place": place, "message": first["msg"]}) from error
