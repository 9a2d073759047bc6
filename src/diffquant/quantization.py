"""`quantize`: apply a recipe to the denoiser of a pipeline in place, pass by pass, and report what was done."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffquant.budget import Budget, remembered, within
from diffquant.calibration import fit
from diffquant.calibration.manifest import has_batches
from diffquant.calibration.memory import BUDGET, GIB
from diffquant.calibration.progress import Shown, bars
from diffquant.calibration.record import record
from diffquant.calibration.recording import Trajectory
from diffquant.calibration.replay import conditional_half, never_called
from diffquant.calibration.timing import timed
from diffquant.checkpoint.quantizer import mark_quantized
from diffquant.core.correction import Stored
from diffquant.core.model import correction_of, enable, ensured_state, freeze, leave_inference_mode, quantized_layers
from diffquant.core.spec import LayerSpec
from diffquant.errors import CalibrationError, SpecError
from diffquant.files import write_text
from diffquant.host.conditions import Calibration
from diffquant.host.denoiser import give_correction, prepare, warn_unless_attached
from diffquant.host.pipeline import Host
from diffquant.host.structure import PlannedLayer, first_with_guidance_sets, plan, unit_count
from diffquant.methods.base import Pass, evaluating, quantizer_state, restore_quantizers
from diffquant.recipe import Recipe, load_recipe

_log = logging.getLogger(__name__)
NEVER_CALLED = "never called while the pipeline samples, so in floating point"
EVERY_TIMESTEP = 1000  # parameter sets in a recipe that mean one for every timestep
DEFAULT_BITS = "w4a8"
DEFAULT_RECIPE = f"brecq-{DEFAULT_BITS}"  # learned rounding and ranges, which suit every model


@dataclass(frozen=True)
class QuantizationReport:
    """What `quantize` did: a row per pass with its figures, and a row per layer."""

    recipe: str
    seed: int
    calibration: dict[str, Any]
    given_up: tuple[str, ...] = ()  # to fit into `minutes`
    passes: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        write_text(path, json.dumps(asdict(self), indent=1))


def quantize(
    pipe: Any,
    recipe: str | Recipe | Sequence[Pass] | None = None,
    data: Trajectory | Calibration | None = None,
    *,
    bits: str = DEFAULT_BITS,
    seed: int = 0,
    folder: Path | None = None,
    memory_gib: float = BUDGET / GIB,
    minutes: float | None = None,
    progress: Shown = True,
) -> QuantizationReport:
    """Quantize the denoiser of `pipe` (or a denoiser itself) in place by `recipe`, calibrated on `data`; end with `freeze`.

    A recipe is a name, a path to a YAML file, a `Recipe`, or pass objects in order, which are applied at `bits` to the layers that
    ``brecq`` quantizes. The default is ``brecq-w4a8``. `minutes` limits the time, recording included: the recipe gets fewer
    iterations, samples and trajectories as needed, and the default recipe gives way to ranges alone if there is no time to learn.
    The estimate is that of `inspect`; what was given up is logged and is in the report.

    `data` is a recording, or says how to make one (default: ``Calibration(seed=seed)``). One trajectory is recorded first, and the
    plan and every pass are checked on it. Layers that the recording never calls stay in floating point.

    `folder` caches the recording and finished passes. An interrupted run resumes. Another recipe reuses a pass if everything before
    it is identical: layers, passes, data and seed. Rounding that is learned without activation quantizers is also reused by recipes
    that differ in those alone, in their bits or parameter sets.
    `memory_gib` limits the memory for recorded inputs and outputs of the block that is being fitted; the rest goes to files in
    `folder` or the directory of temporary files. It changes no result.

    diffusers then knows that the model is quantized: `save_pretrained` writes the packed form, and a cast is refused.

    Raises `RecipeError`, `SpecError`, and `CalibrationError` if `data` was recorded with another model, or is missing and there is
    no pipeline to record.
    """
    model = pipe if isinstance(pipe, nn.Module) else Host(pipe).denoiser
    chosen = _chosen(recipe, bits)
    with torch.inference_mode(False):  # what is learned needs gradients
        leave_inference_mode(model)
        if not isinstance(data, Trajectory):
            plan(model, chosen.layers)  # raises for a model or rules that do not fit, before anything is recorded
            if model is pipe:
                raise CalibrationError(
                    f"{type(model).__name__}: is no pipeline, so it cannot be recorded; give data, or the pipeline"
                )
            data = Calibration(seed=seed) if data is None else data
        given_up: tuple[str, ...] = ()
        if minutes is not None:
            if model is pipe:
                raise CalibrationError(f"minutes: {type(model).__name__} is no pipeline, whose calls could be timed; give that")
            budget = _within(minutes, chosen, data, pipe, model, folder, recipe is None)
            chosen, given_up = budget.recipe, budget.given_up
            data = data if budget.calibration is None else budget.calibration
            about = f"{chosen.full_name}, about {budget.seconds / 60:.1f} of {minutes:g} minutes here"
            _log.warning("%s", "; ".join([about, *([f"given up: {'; '.join(given_up)}"] if given_up else [])]))
        if not isinstance(data, Trajectory):
            place = None if folder is None else folder / "recording"
            data = _recorded(pipe, model, chosen, data, place, progress)
        with bars(progress) as parts, parts.part(chosen.full_name, 0.0, 1.0):
            return replace(_quantize(model, chosen, data, seed, folder, memory_gib, parts), given_up=given_up)


def _chosen(recipe: str | Recipe | Sequence[Pass] | None, bits: str) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    return load_recipe(recipe or DEFAULT_RECIPE) if recipe is None or isinstance(recipe, str) else Recipe.of(recipe, bits)


def _within(
    minutes: float,
    recipe: Recipe,
    data: Trajectory | Calibration,
    pipe: Any,
    model: nn.Module,
    folder: Path | None,
    exchange: bool,
) -> Budget:
    """What fits into the minutes, as in an earlier run in `folder`."""
    calibration = None if isinstance(data, Trajectory) else data
    key = {
        "minutes": minutes,
        "recipe": recipe.model_dump(mode="json"),
        "exchange": exchange,
        "calibration": None if calibration is None else asdict(calibration),
    }
    place = None if folder is None else folder / "minutes.json"
    return remembered(place, key, lambda: within(minutes, recipe, calibration, model, timed(pipe), exchange))


def _recorded(
    pipe: Any, model: nn.Module, recipe: Recipe, calibration: Calibration, folder: Path | None, progress: Shown
) -> Trajectory:
    """The recording that `calibration` describes. Before it is begun the recipe is checked on one trajectory."""
    if folder is None or not has_batches(folder):
        trial = record(pipe, replace(calibration, samples=1, batch_size=1), progress=progress)
        _check(model, recipe, plan_on(model, recipe, trial), trial)
    return record(pipe, calibration, folder=folder, progress=progress)


def plan_on(model: nn.Module, recipe: Recipe, data: Trajectory) -> list[PlannedLayer]:
    """The plan of `recipe` for a model that is not quantizable yet. Layers that `data` never calls stay in floating point."""
    rows = plan(model, recipe.layers)
    with evaluating(model):
        unused = set(never_called(model, [row.name for row in rows if row.spec is not None], data))
    if unused:
        _log.warning("never called while the pipeline samples, left in floating point: %s", ", ".join(sorted(unused)))
    return [replace(row, spec=None, reason=f"{row.reason} ({NEVER_CALLED})") if row.name in unused else row for row in rows]


def _check(model: nn.Module, recipe: Recipe, rows: Sequence[PlannedLayer], data: Trajectory) -> None:
    """Raise now what the passes would raise later."""
    if first_with_guidance_sets(rows) is not None:
        conditional_half(data)
    with evaluating(model):
        for each in recipe.built_passes():
            each.check(model, rows, data)


def _quantize(
    model: nn.Module, recipe: Recipe, data: Trajectory, seed: int, folder: Path | None, memory_gib: float, progress: Shown
) -> QuantizationReport:
    """`quantize` of a denoiser by a recipe that was read."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise SpecError(f"{name}: the weight holds inf or nan; quantize a model whose weights are finite")
    data.verify(model)
    rows = plan_on(model, recipe, data)
    _check(model, recipe, rows, data)
    sets = max((row.spec.sets for row in rows if row.spec is not None), default=1)
    if sets > (count := len(data.timesteps)) and (sets < EVERY_TIMESTEP or count == 1):
        _log.warning("%s: up to %d parameter sets asked; the recording has timesteps for %d", recipe.full_name, sets, count)
    report = QuantizationReport(recipe.full_name, seed, data.manifest)
    names = pass_names(recipe, rows, seed, data)
    prepare(model, rows, data.timesteps, None if first_with_guidance_sets(rows) is None else conditional_half(data))
    passes = recipe.built_passes()
    with fit.run(folder, progress, memory_gib * GIB) as run:
        shares = (each.work(unit_count(model)) for each in passes)
        work = list(itertools.accumulate((each.forwards + 2 * each.backwards for each in shares), initial=0.0))
        total = max(work[-1], 1.0)
        for index, (each, name) in enumerate(zip(passes, names, strict=True)):
            generator = torch.Generator().manual_seed(seed * 1_000 + index)
            file = None if folder is None else folder / f"{name}.safetensors"
            if file is not None and file.exists():
                report.passes.append(_restore_pass(model, file))
                continue
            begun = time.monotonic()
            about = f"pass {index + 1} of {len(passes)}, {type(each).__name__}"
            with run.progress.part(about, work[index] / total, work[index + 1] / total):
                figures = each.apply(model, data, generator, run.below(name))
            row = {
                "pass": type(each).__name__,
                "options": each.model_dump(),
                "seconds": round(time.monotonic() - begun, 2),
                "figures": figures,
            }
            report.passes.append(row)
            if file is not None:
                fit.save_tensors(file, quantizer_state(model, each.weights_only), {"row": json.dumps(row)})
                shutil.rmtree(file.with_suffix(""), ignore_errors=True)  # the state of the pass while it was not finished
    enable(model)
    freeze(model)
    specs = {name: layer.present_spec for name, layer in quantized_layers(model)}
    report.layers[:] = [_row(replace(row, spec=specs.get(row.name, row.spec))) for row in rows]
    if correction_of(model) is not None:
        model.register_forward_pre_hook(warn_unless_attached)
    ensured_state(model).recipe = recipe.full_name
    mark_quantized(model)
    return report


def _restore_pass(model: nn.Module, file: Path) -> dict[str, Any]:
    """Put `model` into the state that a finished pass left. Returns its row of the report."""
    tensors, metadata = fit.load_tensors(file)
    restore_quantizers(model, tensors)
    row: dict[str, Any] = json.loads(metadata["row"])
    if "correction" in row["figures"]:
        give_correction(model, Stored.model_validate({"correction": row["figures"]["correction"]}).correction)
    return row


def _row(row: PlannedLayer) -> dict[str, Any]:
    spec = None if row.spec is None else row.spec.model_dump(exclude_defaults=True)
    return {"name": row.name, "kind": row.kind, "shape": row.shape, "spec": spec, "reason": row.reason}


def pass_names(recipe: Recipe, rows: Sequence[PlannedLayer], seed: int, data: Trajectory) -> list[str]:
    """A name for each pass, with a hash of everything its result depends on, the passes before it included.

    If a pass changes weights alone, its result depends on what was done to weights before; `rows` say how those are quantized.
    """
    recorded = {key: data.manifest[key] for key in ("model_hash", "scheduler", "calibration", "run")}
    added = {"guidance_sets", "input_scale"}  # in a later version: left out if not set, so that earlier passes keep their names
    rules = [
        {key: value for key, value in rule.model_dump(mode="json").items() if value is not None or key not in added}
        for rule in recipe.layers
    ]
    digest = hashlib.sha256(json.dumps([seed, recorded, rules], sort_keys=True).encode())
    of_weights = hashlib.sha256(json.dumps([seed, recorded, _weights_of(rows)], sort_keys=True).encode())
    names = []
    for index, each in enumerate(recipe.built_passes()):
        kind = type(each).__name__
        digest.update(f"{kind} {each.model_dump_json()}".encode())
        if each.weight_options is None:
            of_weights.update(digest.digest())
        elif each.weight_options:
            of_weights.update(f"{index} {kind} {json.dumps(each.weight_options, sort_keys=True)}".encode())
        name = of_weights if each.weights_only else digest
        names.append(f"pass-{index:02d}-{kind}-{name.hexdigest()[:12]}")
    return names


def _weights_of(rows: Sequence[PlannedLayer]) -> list[Any]:
    """What a plan says about weights, also of layers of which only the input is quantized: units hold them too."""
    options = {"weight", "splits", "smooth"}
    return [[row.name, row.spec.model_dump(mode="json", include=options)] for row in rows if isinstance(row.spec, LayerSpec)]


def restore_passes(model: nn.Module, folder: Path, names: Sequence[str]) -> None:
    """Put a prepared `model` into the state that the finished passes called `names` left, one after the other."""
    for name in names:
        restore_quantizers(model, fit.load_tensors(folder / f"{name}.safetensors")[0])
