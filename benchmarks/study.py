"""A study as a YAML file: which arms, how they are calibrated, and how they are measured.

An arm is a recipe and what is changed in it, in one line: an option of a pass (`PASS.option=value`), a path as of --set
(`layers.0.sets=1000`), `drop=PASS`, or `insert=BEFORE:PASS,option=value`. Every arm is measured at all bits and calibration seeds
of the study, unless it has its own: `{arm: ..., bits: [...], seeds: [...]}`.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import diffquant as dq
from diffquant import zoo

WORK = Path(__file__).parent / "work"
STEPS = 50


class StudyError(dq.DiffquantError):
    """A study that cannot be run as it is written."""


class Part(BaseModel):
    """A part of a study; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Arm(Part):
    """A recipe and what is changed in it, with bits and seeds of its own if it has any."""

    arm: str
    bits: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None


class Recording(Part):
    """The trajectories that every arm is calibrated on; `scheduler` are changed options of the pipeline's scheduler."""

    samples: int = 96
    steps: int = STEPS
    guidance: float | None = None
    eta: float = 0.0
    scheduler: dict[str, Any] = {}

    def folder_name(self, model: str) -> str:
        """Recordings that differ are kept in folders of different names."""
        options = {"guidance": self.guidance, "eta": self.eta or None, **self.scheduler}
        changes = (f"{name}={value}" for name, value in options.items() if value is not None)
        return "-".join((model, f"{self.samples}x{self.steps}", *changes))


class Evaluation(Part):
    """How arms are sampled. Without values of its own, guidance and scheduler are those of the recording."""

    samples: int = 256
    steps: int = STEPS
    guidance: float | None = None
    seed: int = 1000
    scheduler: dict[str, Any] | None = None
    engine: str | None = None  # the fastest that is exact on this machine
    single_steps: int = 32  # trajectories for the errors of single steps; 0: none
    keep_errors: bool = True  # per-sample errors, for paired ratios


class Vary(Part):
    """Samplers and numbers of steps, every combination; a sampler may have an eta: `ddim eta 1`."""

    samplers: tuple[str, ...] = ("pipeline",)
    steps: tuple[int, ...] = (STEPS,)


class Corrections(Part):
    """Corrections while sampling, fitted one after the other to the same quantized model; their names and passes.

    At each eta they are fitted to trajectories of that eta, the model to trajectories without noise. `control`: the run-time
    estimates are measured on full precision as well. `more_steps`: also without a correction, with as many steps as a correction
    has calls.
    """

    passes: dict[str, dict[str, Any]]
    eta: tuple[float, ...] = (0.0,)
    seeds: dict[str, tuple[int, ...]] = {}  # of single corrections
    control: bool = True
    more_steps: bool = True


class Cell(NamedTuple):
    """One model to measure."""

    arm: str
    bits: str
    seed: int


class Setting(NamedTuple):
    """One sampler and number of steps."""

    sampler: str
    eta: float
    steps: int


class Study(Part):
    """Everything that decides what a study measures."""

    name: str
    question: str
    model: str
    bits: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    arms: tuple[Arm, ...] = Field(min_length=1)
    recording: Recording = Recording()
    evaluation: Evaluation = Evaluation()
    vary: Vary | None = None
    corrections: Corrections | None = None

    def cells(self) -> Iterator[Cell]:
        """Every model, arms of the same bits and seed one after the other."""
        bits = dict.fromkeys([*self.bits, *(each for arm in self.arms for each in arm.bits or ())])
        seeds = dict.fromkeys([*self.seeds, *(each for arm in self.arms for each in arm.seeds or ())])
        for each, seed, arm in product(bits, seeds, self.arms):
            if each in (arm.bits or self.bits) and seed in (self.seeds if arm.seeds is None else arm.seeds):
                yield Cell(arm.arm, each, seed)

    def settings(self) -> list[Setting]:
        """Every sampler and number of steps."""
        if self.vary is None:
            return [Setting("pipeline", 0.0, self.evaluation.steps)]
        return [
            Setting(kind, float(eta or 0), steps)
            for kind, eta, steps in (
                (*sampler.partition(" eta ")[::2], steps) for sampler, steps in product(self.vary.samplers, self.vary.steps)
            )
        ]

    def guidance(self) -> float | None:
        """The guidance scale of sampling."""
        return self.recording.guidance if self.evaluation.guidance is None else self.evaluation.guidance

    def protocol(self, setting: Setting) -> dq.SamplingProtocol:
        """How a setting is sampled."""
        return dq.SamplingProtocol(
            samples=self.evaluation.samples,
            steps=setting.steps,
            seed=self.evaluation.seed,
            sampler=setting.sampler,
            eta=setting.eta,
            guidance_scale=self.guidance(),
            accumulation_samples=0,
        )


def load(file: Path, overrides: Sequence[str] = ()) -> Study:
    """The study in a YAML file, with overrides such as `recording.samples=2`. Raises `StudyError`."""
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise StudyError(f"{file}: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise StudyError(f"{file}: holds {type(raw).__name__}; a study is a mapping with name, model, bits and arms")
    for override in overrides:
        path, equals, value = override.partition("=")
        *parents, last = path.split(".")
        place = raw
        for parent in parents:
            place = place.setdefault(parent, {}) if isinstance(place, dict) else {}
        if not equals or not isinstance(place, dict):
            raise StudyError(f"--set {override!r}: leads to no key of a study; it must read path=value, as in recording.samples=2")
        place[last] = yaml.safe_load(value)
    if isinstance(raw.get("arms"), list):
        raw["arms"] = [{"arm": arm} if isinstance(arm, str) else arm for arm in raw["arms"]]
    try:
        return Study.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise StudyError(f"{file}: {place}: {first['msg']}; the keys of a study are those of benchmarks/study.py") from error


def recipe_of(arm: str, bits: str) -> dq.Recipe:
    """The recipe that an arm describes. Raises `StudyError` for a pass that it has not, `RecipeError` for options."""
    name, *changes = arm.split()
    overrides = [change for change in changes if change.partition("=")[0] not in ("drop", "insert")]
    recipe = dq.load_recipe(f"{name}-{bits}", overrides)
    passes = list(recipe.passes)
    for change in changes:
        kind, _, value = change.partition("=")
        if kind not in ("drop", "insert"):
            continue
        place, _, described = value.partition(":")
        names = [options["pass"] for options in passes]
        if place not in names:
            raise StudyError(f"arm {arm!r}: {name} has no pass {place}; it has {', '.join(names)}; name one of them")
        if kind == "drop":
            passes = [options for options in passes if options["pass"] != place]
        else:
            added, *options = described.split(",")
            values = {key: yaml.safe_load(text) for key, _, text in (option.partition("=") for option in options)}
            passes.insert(names.index(place), {"pass": added} | values)
    recipe = recipe.model_copy(update={"passes": tuple(passes)})
    recipe.built_passes()  # raises for wrong options before anything is computed
    return recipe


def pipeline(model: str, scheduler: dict[str, Any] | None = None) -> Any:
    """A reference model with changed options of its scheduler."""
    return with_scheduler(zoo.load(model), scheduler or {})


def with_scheduler(pipe: Any, changes: dict[str, Any]) -> Any:
    """The pipeline with changed options of its scheduler. Raises `StudyError` for those that it has not."""
    if unknown := sorted(changes.keys() - pipe.scheduler.config.keys()):
        kind = type(pipe.scheduler).__name__
        raise StudyError(f"scheduler: {kind} has no {', '.join(unknown)}; allowed: {', '.join(sorted(pipe.scheduler.config))}")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    return pipe


def options_of(texts: Sequence[str]) -> dict[str, Any]:
    """`OPTION=VALUE` of a command line."""
    return {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in texts)}


def recording(pipe: Any, model: str, settings: Recording, seed: int, work: Path = WORK, progress: Any = True) -> dq.Trajectory:
    """A recording of a reference model, made if it is not there; `pipe` has the settings' scheduler already."""
    calibration = dq.Calibration(
        samples=settings.samples,
        steps=settings.steps,
        seed=seed,
        guidance_scale=settings.guidance,
        eta=settings.eta or None,
    )
    return dq.record(pipe, calibration, folder=work / settings.folder_name(model) / f"recording-{seed}", progress=progress)
