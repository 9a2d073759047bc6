"""A denoiser's structure: the plan of every layer from rules, its blocks and units, its skips.

It is read from the modules' classes and places, never from a list of known models. Layers are matched by their exact type, so
special subclasses are left alone and named in the plan.
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffquant.core.dynamic import has_rows
from diffquant.core.layers import QUANTIZABLE, QuantizedLayer, quantizable_names
from diffquant.core.model import quantized_layers
from diffquant.core.spec import AttentionSpec, LayerRule, LayerSpec, QuantSpec
from diffquant.errors import SpecError

FIRST_LAYERS = ("conv_in", "pos_embed.proj", "x_embedder", "patch_embed.proj", "patch_embedding", "proj_in")
LAST_LAYERS = ("conv_out", "proj_out_2", "proj_out")
EMBEDDING_PARENTS = ("TimestepEmbedding", "PixArtAlphaTextProjection", "TextImageProjection")
EMBEDDING_LAYERS = ("time_emb_proj", "context_embedder")
BLOCKS = ("ResnetBlock2D", "TransformerBlock", "Attention")  # ends of class names
ATTENTION_CALLS = ("scaled_dot_product_attention", "dispatch_attention_fn")  # what diffusers' processors call
NO_RULE = "no rule"
NO_LOOKUP = "no rule with @lookup, which names tables of embeddings"
SELECTORS = (
    *("@all", "@conv", "@linear", "@lookup", "@first", "@last", "@embedding", "@modulated", "@skip", "@shortcut", "@resample"),
    "@attention",
)  # fmt: skip


@dataclass(frozen=True)
class PlannedLayer:
    """One row of the plan: a layer or attention, its spec, and the rule (or reason) that decided."""

    name: str
    kind: str
    shape: tuple[int, ...]
    spec: LayerSpec | AttentionSpec | None
    reason: str


def plan(model: nn.Module, rules: Sequence[LayerRule]) -> list[PlannedLayer]:
    """What `rules` make of every layer of `model` that holds weights, without changing it.

    Raises `SpecError` for a pattern that matches nothing, naming the nearest layer, and where LoRA or IP-Adapters are loaded.
    """
    if (adapted := first_adapter(model)) is not None:
        raise SpecError(
            f"layer {adapted!r}: a LoRA adapter is loaded; fuse it into the weights and then unload it (fuse_lora, "
            f"unload_lora_weights), or load it when the model is quantized"
        )
    if (adapted := first_ip_adapter(model)) is not None:
        raise SpecError(
            f"{adapted}: an IP-Adapter is loaded, whose layers a checkpoint would not hold; unload it (unload_ip_adapter), "
            "quantize, and load it into the quantized pipeline"
        )
    modules = [(name, module) for name, module in model.named_modules() if name]
    attentions = [(name, module) for name, module in modules if _is_attention(module)]
    layers = [(name, module) for name, module in modules if type(module) in QUANTIZABLE]
    structure = _Structure(model, [name for name, module in layers if QUANTIZABLE[type(module)].multiplies])
    _check_patterns(model, rules, [name for name, _ in layers + attentions])
    rows = []
    for name, module in modules:
        if type(module) in QUANTIZABLE:
            rows.append(_plan_layer(name, module, structure, rules))
            continue
        if _is_attention(module):
            rows.append(_plan_attention(name, module, structure, rules))
        rows += _float_parameters(name, module)
    return rows + _float_parameters("", model)


def first_adapter(model: nn.Module) -> str | None:
    """The first layer of `model` that peft has put an adapter in the place of."""
    return next((name for name, module in model.named_modules() if type(module).__module__.partition(".")[0] == "peft"), None)


def first_ip_adapter(model: nn.Module) -> str | None:
    """The first attention processor of `model` that an IP-Adapter has put in its place."""
    return next((name for name, module in model.named_modules() if type(module).__name__.startswith("IPAdapter")), None)


def first_with_guidance_sets(rows: Sequence[PlannedLayer]) -> str | None:
    """The first layer of a plan with parameter sets for each half of a guided call."""
    return next((row.name for row in rows if row.spec is not None and row.spec.guidance_sets), None)


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "processor") and (hasattr(module, "to_q") or hasattr(module, "to_qkv"))


def _calls_attention(processor: object) -> bool:
    """Whether the code of an attention's processor names a function that can be intercepted."""
    kind: Any = type(processor)
    call = inspect.unwrap(kind.forward if isinstance(processor, nn.Module) and "__call__" not in vars(kind) else kind.__call__)
    return not set(ATTENTION_CALLS).isdisjoint(getattr(getattr(call, "__code__", None), "co_names", ()))


def _float_parameters(name: str, module: nn.Module) -> list[PlannedLayer]:
    """Rows of a module's own matrices that nothing here quantizes."""
    kind, rows = type(module).__name__, []
    for own, parameter in module.named_parameters(recurse=False):
        if parameter.dim() >= 2:
            row, what = (name, kind) if own == "weight" else (f"{name}.{own}".lstrip("."), f"a parameter of {kind}")
            reason = f"{what} stays in floating point: only {quantizable_names()} are quantized"
            rows.append(PlannedLayer(row, kind, tuple(parameter.shape), None, reason))
    return rows


class _Structure:
    """Where each layer stands in the model, for the structural selectors."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.modules = dict(model.named_modules())
        self.first = next((name for name in FIRST_LAYERS if name in names), names[0] if names else "")
        self.last = next((name for name in LAST_LAYERS if name in names), names[-1] if names else "")
        self.skips = _skip_sizes(model)

    def selects(self, selector: str, name: str) -> bool:
        """Whether structural `selector` names the layer or attention `name`."""
        module = self.modules[name]
        parent = self.modules.get(name.rpartition(".")[0], module)
        kind, own = type(parent).__name__, name.rpartition(".")[2]
        attention = _is_attention(module)
        if selector == "@attention" or attention:
            return selector == "@attention" and attention
        if selector == "@lookup" or not QUANTIZABLE[type(module)].multiplies:
            return selector == "@lookup" and not QUANTIZABLE[type(module)].multiplies
        return {
            "@all": True,
            "@conv": QUANTIZABLE[type(module)].channel_axis == 1,
            "@linear": QUANTIZABLE[type(module)].channel_axis == -1,
            "@first": name == self.first,
            "@last": name == self.last,
            "@embedding": kind in EMBEDDING_PARENTS or "AdaLayerNorm" in kind or own in EMBEDDING_LAYERS,
            "@modulated": own == "conv2" and isinstance(getattr(parent, "time_emb_proj", None), nn.Linear),
            "@skip": name in self.skips,
            "@shortcut": own == "conv_shortcut",
            "@resample": kind.startswith(("Upsample", "Downsample")),
        }[selector]


def _skip_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The 1x1 shortcuts (and first convolutions) of residual blocks whose input is a concatenated skip: (hidden, skip) channels.

    In a UNet's up blocks the hidden channels are those the previous residual block put out, the rest is the skip.
    """
    sizes: dict[str, tuple[int, int]] = {}
    up_blocks, down_blocks = getattr(model, "up_blocks", None), getattr(model, "down_blocks", None)
    if up_blocks is None or down_blocks is None:
        return sizes
    middle = getattr(model, "mid_block", None)
    before = middle if middle is not None and hasattr(middle, "resnets") else down_blocks[-1]
    hidden = getattr(before.resnets[-1], "out_channels", None) if hasattr(before, "resnets") else None
    if hidden is None:  # blocks that do not say how wide they are, as those of UNet1DModel
        return sizes
    for block_index, block in enumerate(up_blocks):
        for index, resnet in enumerate(getattr(block, "resnets", [])):
            skip = resnet.in_channels - hidden
            if skip > 0:
                for layer in ("conv_shortcut", "conv1"):
                    if type(getattr(resnet, layer, None)) in QUANTIZABLE:
                        sizes[f"up_blocks.{block_index}.resnets.{index}.{layer}"] = (hidden, skip)
            hidden = resnet.out_channels
    return sizes


def _check_patterns(model: nn.Module, rules: Sequence[LayerRule], names: list[str]) -> None:
    for index, rule in enumerate(rules):
        if rule.match.startswith("@"):
            if rule.match not in SELECTORS:
                raise SpecError(f"layers[{index}].match {rule.match!r}: unknown selector; allowed are {', '.join(SELECTORS)}")
        elif not any(fnmatch.fnmatchcase(name, rule.match) for name in names):
            near = difflib.get_close_matches(rule.match.replace("*", ""), names, n=1, cutoff=0.0)
            hint = f'; nearest name "{near[0]}"' if near else ""
            raise SpecError(f'layers[{index}].match "{rule.match}": matches no layer of {type(model).__name__}{hint}')


def _merged(name: str, structure: _Structure, rules: Sequence[LayerRule]) -> tuple[dict[str, Any], str]:
    """The fields that the matching rules set, later ones winning, and the text of the last rule that set any."""
    fields: dict[str, Any] = {}
    reason = NO_RULE
    for rule in rules:
        if structure.selects(rule.match, name) if rule.match.startswith("@") else fnmatch.fnmatchcase(name, rule.match):
            fields |= rule.model_dump(exclude_none=True, exclude={"match", "reason"})
            reason = f"{rule.match}: {rule.reason}" if rule.reason else rule.match
    return fields, reason


def _spec(fields: dict[str, Any], operand: str, symmetric: bool = False, granularity: str = "tensor") -> QuantSpec | None:
    bits = fields.get(f"{operand}_bits")
    if bits is None or bits == "float":
        return None
    symmetric = fields.get(f"{operand}_symmetric", symmetric)
    return QuantSpec(bits=bits, symmetric=symmetric, granularity=fields.get(f"{operand}_granularity", granularity))


def _plan_layer(name: str, module: nn.Module, structure: _Structure, rules: Sequence[LayerRule]) -> PlannedLayer:
    fields, reason = _merged(name, structure, rules)
    multiplies = QUANTIZABLE[type(module)].multiplies
    reason = NO_LOOKUP if not multiplies and reason == NO_RULE else reason
    assert isinstance(module.weight, torch.Tensor)
    input_scale = fields.get("input_scale", "static")
    spec = LayerSpec(
        input_scale="dynamic-sample" if input_scale == "dynamic-row" and not has_rows(module) else input_scale,
        weight=_spec(fields, "weight", symmetric=True, granularity="channel"),
        input=(input_spec := _spec(fields, "input") if multiplies else None),
        splits=structure.skips.get(name, ()) if fields.get("split_skips") else (),
        sets=fields.get("sets", 1),
        shared_zero_point=fields.get("shared_zero_point", False),
        guidance_sets=fields.get("guidance_sets", False) and input_spec is not None,
        smooth=fields.get("smooth", False) and multiplies and getattr(module, "groups", 1) == 1,
        shift=fields.get("shift", False) and multiplies,
    )
    quantized = spec.weight is not None or spec.input is not None
    return PlannedLayer(
        name,
        type(module).__name__,
        tuple(module.weight.shape),
        spec if quantized else None,
        reason if quantized else f"{reason} (floating point)",
    )


def _plan_attention(name: str, module: nn.Module, structure: _Structure, rules: Sequence[LayerRule]) -> PlannedLayer:
    fields, reason = _merged(name, structure, rules)
    operand = _spec(fields, "input")
    softmax = _spec({"softmax_bits": fields.get("input_bits"), **fields}, "softmax")
    spec = None
    if operand is None and softmax is None:
        reason = f"{reason} (floating point)"
    elif not _calls_attention(module.processor):
        processor = type(module.processor).__name__
        reason = f"{processor} computes without scaled_dot_product_attention, which would be quantized (floating point)"
    else:
        sets = {field: fields[field] for field in ("sets", "shared_zero_point", "guidance_sets") if field in fields}
        spec = AttentionSpec(query=operand, key=operand, value=operand, softmax=softmax, **sets)
    return PlannedLayer(name, "attention products", (), spec, reason)


# ---- blocks and units


@dataclass(frozen=True)
class Unit:
    """A layer or block that is fitted as one: its name, module, and quantizable layers."""

    name: str
    module: nn.Module
    layers: tuple[tuple[str, QuantizedLayer], ...]


def units(model: nn.Module) -> list[Unit]:
    """Blocks (residual, transformer, attention) and the single layers outside them, in order of registration."""
    every = [
        Unit(name, module, tuple((f"{name}.{inner}".rstrip("."), layer) for inner, layer in quantized_layers(module)))
        for name, module in _blocks("", model)
    ]
    return [unit for unit in every if unit.layers]


def unit_count(model: nn.Module) -> int:
    """How many units `model` has, or would have once all its layers are quantizable."""
    return sum(any(isinstance(layer, tuple(QUANTIZABLE)) for layer in module.modules()) for _, module in _blocks("", model))


def _blocks(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Blocks below `module`, and the layers outside them, by name."""
    if type(module).__name__.endswith(BLOCKS) or isinstance(module, tuple(QUANTIZABLE)):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _blocks(f"{name}.{child_name}".lstrip("."), child)


def residual_blocks(model: nn.Module) -> dict[str, Any]:
    """Residual blocks of `model` that a projected time embedding enters before a norm or after it, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if getattr(module, "time_embedding_norm", None) in ("default", "scale_shift")
        and isinstance(getattr(module, "time_emb_proj", None), nn.Linear)
        and isinstance(getattr(module, "norm2", None), nn.GroupNorm)
        and isinstance(getattr(module, "conv2", None), nn.Conv2d)
    }
