"""Recipes: which layers get how many bits, and the passes that choose the numbers, in order; YAML, with overrides by path.

One file per method; the bits come with the name: ``brecq-w4a8`` is ``recipes/brecq.yaml`` at 4-bit weights and 8-bit activations,
``a32`` leaves activations in floating point. A path to a YAML file works in place of a name. In a recipe the words ``weights`` and
``activations`` stand for those bits. Everything is checked before anything is computed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffquant.core.spec import LayerRule
from diffquant.errors import RecipeError
from diffquant.files import named_yaml
from diffquant.methods.base import EFFORT, Pass, registered
from diffquant.methods.ranges import CalibrateRanges

FLOAT_BITS = 32
_NAME = re.compile(r"(?P<method>.+)-w(?P<weights>\d+)a(?P<activations>\d+)")


class Bits(BaseModel):
    """Bits of weights and activations: 2 to 8, or 32 for floating point."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    weights: int = 4
    activations: int = 8

    def __str__(self) -> str:
        return f"w{self.weights}a{self.activations}"


class Recipe(BaseModel):
    """A checked recipe: rules for layers, and passes in order.

    ``tuned`` maps bits such as ``w4a6`` to options by path, ``{"passes.1.iterations": 2000}``, that hold for those bits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    summary: str
    source: str = ""
    bits: Bits = Bits()
    layers: tuple[LayerRule, ...] = Field(min_length=1)
    passes: tuple[dict[str, Any], ...] = Field(min_length=1)
    tuned: dict[str, dict[str, Any]] = {}

    @property
    def full_name(self) -> str:
        """Name and bits."""
        return f"{self.name}-{self.bits}"

    def built_passes(self) -> list[Pass]:
        """The passes as values. Raises `RecipeError` naming the pass and option that is wrong."""
        return [_build_pass(index, options, self.name) for index, options in enumerate(self.passes)]

    @classmethod
    def of(cls, passes: Sequence[Pass], bits: str, rules: str = "brecq") -> Recipe:
        """A recipe of pass objects in order, at bits such as ``w4a8``, with the layer rules of the recipe called `rules`.

        Raises `RecipeError` for bits that are none, and passes in an order that does not work.
        """
        base = load_recipe(f"{rules}-{bits}")
        options = tuple({"pass": type(each).__name__, **each.model_dump()} for each in passes)
        kinds = ", ".join(type(each).__name__ for each in passes)
        recipe = cls(name="passes", summary=f"{kinds}; layers of {rules}", bits=base.bits, layers=base.layers, passes=options)
        _check_passes(recipe)
        return recipe

    def thinned(self, share: float) -> Recipe:
        """The same recipe with a `share` of the iterations and samples of its passes."""
        thinned = (each.thinned(share).model_dump(include=set(EFFORT)) for each in self.built_passes())
        passes = tuple(options | fewer for options, fewer in zip(self.passes, thinned, strict=True))
        return self.model_copy(update={"passes": passes})


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe called `name` (``brecq-w4a8``, or a path to a YAML file), with overrides such as ``AccuQuant.iterations=100``.

    A pass is named by its class where it occurs once, or by its position, as in ``passes.1.iterations=100``.

    ``layers.+={match: "*.conv2", input_bits: 8}`` adds a rule after the others.

    Raises `RecipeError` for unknown names, keys, values, bits and paths.
    """
    match = _NAME.fullmatch(name)
    where = match["method"] if match else name
    raw = named_yaml("recipe", where, "recipes", RecipeError, " with bits, as in brecq-w4a8")
    if match:
        raw["bits"] = {"weights": int(match["weights"]), "activations": int(match["activations"])}
    assignments = [_assignment(text) for text in overrides]
    for path, value in assignments:
        if path.startswith("bits."):
            _assign(raw, path, value)
    bits: Bits = _validated(Bits, raw.get("bits", {}), f"{where}: bits")
    for what, value in bits:
        if value != FLOAT_BITS and not 2 <= value <= 8:
            raise RecipeError(f"recipe {name!r}: {value} bits for {what}; allowed are 2 to 8, or 32 for floating point")
    for path, value in [*(raw.get("tuned", {}) or {}).get(str(bits), {}).items(), *assignments]:
        _assign(raw, path, value)
    raw["bits"] = bits.model_dump()
    if isinstance(raw.get("layers"), list):
        raw["layers"] = [_with_bits(rule, bits) for rule in raw["layers"]]
    recipe: Recipe = _validated(Recipe, raw, where)
    _check_passes(recipe)
    return recipe


def _with_bits(rule: Any, bits: Bits) -> Any:
    """A rule with the words ``weights`` and ``activations`` replaced by bits; floating point wins over fixed bits."""
    if not isinstance(rule, dict):
        return rule
    words = {"weights": bits.weights, "activations": bits.activations}
    resolved = {
        key: words.get(value, value) if isinstance(value, str) and key.endswith("_bits") else value for key, value in rule.items()
    }
    for key, total in (("weight_bits", bits.weights), ("input_bits", bits.activations), ("softmax_bits", bits.activations)):
        if key in resolved and (total == FLOAT_BITS or resolved[key] == FLOAT_BITS):
            resolved[key] = "float"
    return resolved


def _assignment(text: str) -> tuple[str, Any]:
    path, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"--set {text!r}: must read path=value, as in passes.1.iterations=100")
    return path.strip(), yaml.safe_load(value)


def _assign(raw: dict[str, Any], path: str, value: Any) -> None:
    """Set `path` (keys and list positions joined by dots, ``+`` for a new last one) in a raw recipe.

    The name of a pass stands for its place: ``AccuQuant.iterations`` is ``passes.2.iterations`` where it is the third.
    """
    place: Any = raw
    *parents, last = _by_place(raw, path).split(".")
    try:
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        part = last
        if isinstance(place, list) and last == "+":
            place.append(value)
        else:
            place[int(last) if isinstance(place, list) else last] = value
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise RecipeError(f"{path}: {part!r} does not lead anywhere; the recipe has {_choices(place)}") from error


def _by_place(raw: dict[str, Any], path: str) -> str:
    """A path that begins with the name of a pass, by its position. Raises `RecipeError` where it is not there, or twice."""
    name, _, rest = path.partition(".")
    passes = raw.get("passes")
    if name not in registered() or not rest or not isinstance(passes, list):
        return path
    places = [index for index, each in enumerate(passes) if isinstance(each, dict) and each.get("pass") == name]
    if len(places) != 1:
        there = ", ".join(str(each.get("pass")) for each in passes if isinstance(each, dict))
        where = " and ".join(f"passes.{index}" for index in places)
        raise RecipeError(f"{path}: {name} is {where}; say which" if places else f"{path}: no pass {name}; the recipe has {there}")
    return f"passes.{places[0]}.{rest}"


def _choices(place: Any) -> str:
    if isinstance(place, list):
        return f"positions 0 to {len(place) - 1}"
    return f"keys {list(place)}" if isinstance(place, dict) else f"{place!r} there"


def _build_pass(index: int, options: Mapping[str, Any], name: str) -> Pass:
    kind, kinds = options.get("pass"), registered()
    if kind not in kinds:
        raise RecipeError(f"{name}: passes[{index}].pass {kind!r}: unknown; allowed are {', '.join(kinds)}")
    rest = {key: value for key, value in options.items() if key != "pass"}
    built: Pass = _validated(kinds[kind], rest, f"{name}: passes[{index}] {kind}")
    return built


def _validated(kind: type[Any], raw: Any, where: str) -> Any:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = f"unknown key; allowed are {', '.join(kind.model_fields)}" if len(first["loc"]) == 1 else "unknown key"
        raise RecipeError(": ".join(part for part in (where, place, message) if part)) from error


def _check_passes(recipe: Recipe) -> None:
    """Check what passes need before the hours that they take: calibrated ranges, and rules that give them their layers."""
    passes = [(type(each).__name__, each) for each in recipe.built_passes()]
    calibrated = False
    for index, (kind, each) in enumerate(passes):
        if not (calibrated or each.before_ranges or isinstance(each, CalibrateRanges)):
            raise RecipeError(
                f"{recipe.name}: passes[{index}] is {kind}; before it must come CalibrateRanges, which sets the scales"
            )
        calibrated = not each.before_ranges
    if not calibrated:
        raise RecipeError(f"{recipe.name}: ends with {kind}; after it must come CalibrateRanges, which sets the scales")
    for index, (kind, each) in enumerate(passes):
        if each.needs and not any(getattr(rule, each.needs) for rule in recipe.layers):
            raise RecipeError(
                f"{recipe.name}: passes[{index}] {kind}: no rule has {each.needs}: true; add it to one, as in layers[0]"
            )
