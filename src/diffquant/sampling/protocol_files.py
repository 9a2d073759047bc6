"""Protocol files: the conditions of sampling in YAML, for recording and for evaluation.

A file describes one model and data set. It is in ``protocols/*.yaml`` of the package, or a path. Its keys are the fields of
`SamplingProtocol`; ``calibration`` holds what a recording does differently, such as its number of samples. ``prompts`` is a text
file with a prompt a line, a list, or ``builtin``. ``data`` is a folder of real pictures, the reference of FID. `docs/reproduce.md`
names the source of each shipped file.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from diffquant.errors import DiffquantError, EvaluationError
from diffquant.files import named_yaml, read_text
from diffquant.host.conditions import Calibration
from diffquant.host.pipeline import Host, Pipeline
from diffquant.sampling.protocol import SamplingProtocol, scheduler_of

BUILTIN = "builtin"  # prompts of the pipeline
RECORDED = 64  # trajectories, where nothing says how many
SHARED = ("steps", "seed", "prompts", "class_labels", "guidance_scale", "eta", "clip_sample")  # of a recording and of an evaluation


class ProtocolFile(BaseModel):
    """A checked protocol: how an evaluation samples, and how calibration data are recorded."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = ""
    summary: str = ""
    source: str = ""
    sampling: SamplingProtocol = SamplingProtocol()
    calibration: Calibration = Calibration(samples=RECORDED)
    data: Path | None = None


def load_protocol(texts: Sequence[str] = (), **options: Any) -> ProtocolFile:
    """The protocol described by `texts`: at most one name or path of a YAML file, and assignments such as ``eta=1``.

    `options` are fields that win over these; None leaves a field as it is. Fields that are not set have the defaults of
    `SamplingProtocol` and `Calibration`. Steps, seed, eta, guidance and conditions that are set hold for the recording too.
    Raises `EvaluationError` for unknown names, keys and values.
    """
    files = [text for text in texts if "=" not in text]
    if len(files) > 1:
        raise EvaluationError(f"--protocol: {' and '.join(files)}; one name or file is allowed, and assignments such as eta=1")
    raw, where = _read(files[0]) if files else ({}, "protocol")
    for text in texts:
        if "=" in text:
            path, value = (part.strip() for part in text.split("=", 1))
            _assign(raw, path, value if path in ("prompts", "data") else yaml.safe_load(value), where)
    for name, value in options.items():
        if value is not None:
            _assign(raw, name.replace("__", "."), value, where)
    return _checked(raw, where)


def varied_fields(texts: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Values by field of `SamplingProtocol`, of texts such as ``steps=10,20,50``.

    Raises `EvaluationError` for texts of another form, unknown fields, fields given twice, and values of another type.
    """
    kinds = get_type_hints(SamplingProtocol)
    varied: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        name, equals, values = (part.strip() for part in text.partition("="))
        if not equals or not values:
            raise EvaluationError(f"--vary {text!r}: a field and its values are allowed, such as steps=10,20,50")
        if name in varied:
            raise EvaluationError(f"--vary {name}: is given twice; give all its values at once")
        if name not in kinds:
            raise EvaluationError(f"--vary {name}: is no field of a protocol; allowed are {', '.join(kinds)}")
        try:
            varied[name] = tuple(TypeAdapter(kinds[name]).validate_python(yaml.safe_load(value)) for value in values.split(","))
        except ValidationError as error:
            raise EvaluationError(f"--vary {name}: is {values}: {error.errors()[0]['msg']}") from error
    return varied


@contextmanager
def recording_scheduler(pipe: Pipeline, protocol: ProtocolFile) -> Iterator[None]:
    """Give `pipe` the sampler of the protocol while the block runs, for recording.

    Raises `EvaluationError` where it cannot sample as the protocol says.
    """
    sampling = dataclasses.replace(protocol.sampling, steps=protocol.calibration.steps, clip_sample=None)  # `record` sets it
    if Host(pipe).takes_ddim_only and sampling.sampler not in ("pipeline", "ddim"):
        raise EvaluationError(f'protocol.sampler: is "{sampling.sampler}"; DDIMPipeline itself, which is recorded, takes ddim only')
    eta = protocol.calibration.eta or 0
    if eta > 0 and "eta" not in inspect.signature(pipe.__call__).parameters:
        raise EvaluationError(f"protocol.eta: is {eta}; {type(pipe).__name__} takes none; record with eta=0")
    with scheduler_of(pipe, sampling):
        yield


def _read(name: str) -> tuple[dict[str, Any], str]:
    """The mapping of a protocol file, its prompts read, and how to call it in messages."""
    raw = named_yaml("protocol", name, "protocols", EvaluationError)
    for key in ("prompts", "data"):  # beside the protocol file
        if isinstance(place := raw.get(key), str) and place != BUILTIN:
            raw[key] = str(Path(name).parent / place)
    return raw, f"protocol {name}"


def _assign(raw: dict[str, Any], path: str, value: Any, where: str) -> None:
    *parents, last = path.split(".")
    if parents not in ([], ["calibration"]):
        raise EvaluationError(f"{where}: {path}: leads nowhere; a key, or calibration and one of its keys, is allowed")
    (raw.setdefault("calibration", {}) if parents else raw)[last] = value


def _checked(raw: dict[str, Any], where: str) -> ProtocolFile:
    raw = dict(raw)
    about = {key: raw.pop(key) for key in ("name", "summary", "source", "data") if key in raw}
    recorded = raw.pop("calibration", None) or {}
    raw["prompts"] = _prompts(raw.get("prompts"), where)
    for name in ("class_labels", "prompts"):
        raw[name] = tuple(raw[name]) if isinstance(raw.get(name), list) else raw.get(name)
    _known(raw, SamplingProtocol, where, more=("calibration", "data"))
    _known(recorded, Calibration, f"{where}: calibration")
    shared = {name: raw[name] for name in SHARED if raw.get(name) is not None}
    try:
        return ProtocolFile.model_validate(about | {"sampling": raw, "calibration": {"samples": RECORDED} | shared | recorded})
    except ValidationError as error:
        first = error.errors()[0]
        raise EvaluationError(f"{where}: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from error
    except DiffquantError as error:
        raise EvaluationError(f"{where}: {error}") from error


def _known(raw: dict[str, Any], kind: type[Any], where: str, more: tuple[str, ...] = ()) -> None:
    allowed = [field.name for field in dataclasses.fields(kind)]
    for key in raw:
        if key not in allowed:
            raise EvaluationError(f"{where}: {key}: unknown key; allowed are {', '.join([*allowed, *more])}")


def _prompts(value: Any, where: str) -> tuple[str, ...] | None:
    """Prompts of a text file, of a list, or None for the built-in ones."""
    if value is None or value == BUILTIN:
        return None
    if isinstance(value, (list, tuple)):
        return tuple(str(prompt) for prompt in value)
    path = Path(value)
    if not path.is_file():
        raise EvaluationError(f"{where}: prompts {str(value)!r}: no such file; a text file with a prompt a line, or {BUILTIN}")
    text = read_text(path, f"{where}: prompts {str(value)!r}", EvaluationError)
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise EvaluationError(f"{where}: prompts {str(value)!r}: holds no line; write a prompt a line")
    return lines
