"""A cache of what pipelines draw: a folder with a safetensors file for each draw.

The key of a draw is everything that decides it: weights and configuration of all components, scheduler, protocol, seed, device,
dtype, and the versions of torch, diffusers and this package. It stands in the header of the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from diffquant.calibration.fit import load_tensors, save_tensors
from diffquant.engines.base import engine_of
from diffquant.errors import EvaluationError
from diffquant.files import digest_tensor
from diffquant.host.pipeline import Host, Pipeline
from diffquant.sampling.correction import attachment_of
from diffquant.sampling.observers import Snapshots, Trajectory, TrajectoryRecorder
from diffquant.sampling.protocol import SamplingProtocol, scheduler_config
from diffquant.sampling.sample import OnProgress, sample

FORMAT = 1
_NOISY = "noisy."


@dataclass(frozen=True)
class Draw:
    """Pictures, last samples, the trajectory of the first samples or None, and the noisy samples by the number of steps.

    `seconds` is None for a draw from disk: it was timed in another run.
    """

    pictures: UInt8[Tensor, "n c h w"]
    last_samples: Float[Tensor, "n *shape"]
    seconds: float | None
    trajectory: Trajectory | None = None
    noisy: dict[int, Tensor] = field(default_factory=dict)


def draw(
    pipe: Pipeline,
    protocol: SamplingProtocol,
    *,
    seed: int,
    name: str,
    trajectory: bool = False,
    snapshots: Sequence[int] = (),
    folder: Path | None = None,
    progress: OnProgress | None = None,
) -> Draw:
    """Sample `pipe`, or load the same draw from `folder`; `snapshots` are numbers of steps.

    Raises EvaluationError for samples that are not finite, and for a file that holds another draw.
    """
    key = _key(pipe, protocol, seed, trajectory, snapshots) if folder is not None else ""
    path = None if folder is None else Path(folder) / f"draw-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    if path is not None and path.exists():
        return _load(path, key)
    recorder = TrajectoryRecorder(protocol) if trajectory else None
    noisy = Snapshots(name, snapshots, recorder)
    drawn = sample(pipe, protocol, seed=seed, on_step=noisy, progress=progress, name=name)
    recorded = None if recorder is None else recorder.trajectory()
    result = Draw(drawn.pictures, drawn.last_samples, drawn.seconds, recorded, noisy.pictures())
    if path is not None:
        _save(path, key, result)
    return result


def _key(pipe: Pipeline, protocol: SamplingProtocol, seed: int, trajectory: bool, snapshots: Sequence[int]) -> str:
    values: dict[str, Any] = identity(pipe) | {
        "format": FORMAT,
        "scheduler": scheduler_config(pipe, protocol),
        "protocol": asdict(protocol) | {"seed": seed},
        "kept": {"trajectory": trajectory, "snapshots": list(snapshots)},
    }
    return json.dumps(values, sort_keys=True, default=str)


def identity(pipe: Pipeline) -> dict[str, Any]:
    """What decides what a pipeline draws, but for its scheduler: components, correction, versions, where and how it computes."""
    attached = attachment_of(pipe)
    return {
        "versions": {name: metadata.version(name) for name in ("diffquant", "torch", "diffusers")},
        "pipeline": type(pipe).__name__,
        "components": {name: _component(part) for name, part in pipe.components.items() if name != "scheduler"},
        "device": str(pipe.device),
        "dtype": str(pipe.dtype),
        "engine": engine_of(Host(pipe).denoiser),
        "correction": attached.correction.model_dump(mode="json") if attached is not None else None,
    }


def _component(part: Any) -> Any:
    """What a component computes with: all tensors (integer codes are buffers) and its configuration; of a tokenizer, its words."""
    if hasattr(part, "get_vocab"):
        return [type(part).__name__, hashlib.sha256(json.dumps(part.get_vocab(), sort_keys=True).encode()).hexdigest()]
    if not isinstance(part, nn.Module):
        return type(part).__name__
    digest = hashlib.sha256()
    for name, tensor in sorted(part.state_dict().items()):
        digest.update(f"{name} ".encode())
        digest_tensor(digest, tensor.detach().cpu())
    config = getattr(part, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return [type(part).__name__, digest.hexdigest(), {key: value for key, value in config.items() if not key.startswith("_")}]


def _save(path: Path, key: str, drawn: Draw) -> None:
    tensors = {"pictures": drawn.pictures, "last_samples": drawn.last_samples}
    tensors |= {f"{_NOISY}{steps}": pictures for steps, pictures in drawn.noisy.items()}
    if drawn.trajectory is not None:
        tensors |= {
            "timesteps": torch.tensor(drawn.trajectory.timesteps, dtype=torch.float64),
            "latents": drawn.trajectory.latents,
            "noise": drawn.trajectory.noise,
        }
    save_tensors(path, tensors, {"key": key})


def _load(path: Path, key: str) -> Draw:
    tensors, header = load_tensors(path)
    if header.get("key") != key:
        raise EvaluationError(f"{path}: holds another draw than its name says; delete it")
    trajectory = None
    if "timesteps" in tensors:
        trajectory = Trajectory(tuple(tensors["timesteps"].tolist()), tensors["latents"], tensors["noise"])
    noisy = {int(name.removeprefix(_NOISY)): tensor for name, tensor in tensors.items() if name.startswith(_NOISY)}
    return Draw(tensors["pictures"], tensors["last_samples"], None, trajectory, dict(sorted(noisy.items())))
