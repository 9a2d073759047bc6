"""The names that tensors of a denoiser have in the files of its authors, from those that diffusers gives them.

A family of models is a table of `original_tables`. No table is relied on: diffusers' own converter, which goes the other way, reads
tensors whose rows are numbered, and a model whose names and rows do not come back is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor, nn

from diffquant.checkpoint.original_tables import FLUX, FLUX_2, FLUXES, UNET, UNET_RESIDUAL, WAN, Z_IMAGE
from diffquant.errors import CheckpointError


class Part(NamedTuple):
    """Rows of an original tensor: those of the tensor ``name`` in diffusers, or one half of them (0 or 1)."""

    name: str
    half: int | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Those rows of the tensor ``name``."""
        return tensor if self.half is None else tensor.chunk(2)[self.half]


Origins = dict[str, tuple[Part, ...]]  # by original name


class Family(NamedTuple):
    """Models of one class of diffusers: ``origins`` of their tensors' names, and what stands before every original name.

    ``width``: of the channels of the image tokens in diffusers' converter, where it reads no other; rows are counted for it.
    """

    title: str
    origins: Callable[[Sequence[str]], Origins]
    prefix: str = ""
    width: int | None = None


class _Line(NamedTuple):
    """A line of a table: the pattern of names in diffusers, the original name, and whether halves are exchanged."""

    pattern: re.Pattern[str]
    original: str
    halves: bool

    def applied(self, name: str) -> str | None:
        """The original name of `name`; None where the line is not about it."""
        module, dot, leaf = name.rpartition(".")
        for inner, rest in ((name, ""), (module, dot + leaf)):
            if match := self.pattern.fullmatch(inner):
                return self.original.replace("*", match.group(1) if self.pattern.groups else "") + rest
        return None


def _lines(table: str) -> list[_Line]:
    rows = [row.split() for row in table.splitlines() if row]
    return [_Line(re.compile(re.escape(ours).replace(r"\*", r"(\d+)")), original, bool(more)) for ours, original, *more in rows]


def _from_table(table: str, names: Sequence[str]) -> Origins:
    """The origins of `names` by a table of `original_tables`."""
    lines, found = _lines(table), dict[str, list[tuple[int, Part]]]()
    for name in names:
        hits = ((number, line, original) for number, line in enumerate(lines) if (original := line.applied(name)) is not None)
        number, line, original = next(hits, (0, None, name))
        parts = [Part(name, 1), Part(name, 0)] if line is not None and line.halves else [Part(name)]
        found.setdefault(original, []).extend((number, part) for part in parts)
    return {original: tuple(part for _, part in sorted(parts, key=lambda each: each[0])) for original, parts in found.items()}


def _unet(names: Sequence[str]) -> Origins:
    """The origins of the names of a UNet, whose blocks its authors number through."""
    per_block = len({name.split(".")[3] for name in names if name.startswith("down_blocks.0.resnets.")})
    attending = {name.split(".")[1] for name in names if re.match(r"up_blocks\.\d+\.attentions\.", name)}
    table = {ours: original for ours, _, original in (row.partition(" ") for row in UNET.splitlines()) if ours}
    table |= dict(_unet_blocks(names, per_block, attending))
    origins: Origins = {}
    for name in names:
        ours = next((each for each in table if name.startswith(f"{each}.")), "")
        layer, _, leaf = name[len(ours) + 1 :].rpartition(".")
        if re.search(r"\.resnets\.\d+$", ours):
            layer = UNET_RESIDUAL.get(layer, layer)
        original = ".".join(filter(None, (table.get(ours, "").strip(), layer, leaf))) if ours else name
        origins[original] = (*origins.get(original, ()), Part(name))
    return origins


def _unet_blocks(names: Sequence[str], per_block: int, attending: set[str]) -> Iterator[tuple[str, str]]:
    for block in range(1 + max((int(name.split(".")[1]) for name in names if name.startswith("down_blocks.")), default=-1)):
        first, up = 1 + block * (per_block + 1), block * (per_block + 1)
        for layer in range(per_block + 1):
            yield f"down_blocks.{block}.resnets.{layer}", f"input_blocks.{first + layer}.0"
            yield f"down_blocks.{block}.attentions.{layer}", f"input_blocks.{first + layer}.1"
            yield f"up_blocks.{block}.resnets.{layer}", f"output_blocks.{up + layer}.0"
            yield f"up_blocks.{block}.attentions.{layer}", f"output_blocks.{up + layer}.1"
        yield f"down_blocks.{block}.downsamplers.0.conv", f"input_blocks.{first + per_block}.0.op"
        place = 2 if str(block) in attending else 1
        yield f"up_blocks.{block}.upsamplers.0.conv", f"output_blocks.{up + per_block}.{place}.conv"


FAMILIES = {
    "UNet2DConditionModel": Family("Stable Diffusion 1, 2 and XL", _unet, prefix="model.diffusion_model."),
    "FluxTransformer2DModel": Family("Flux", partial(_from_table, FLUXES + FLUX), width=3072),
    "Flux2Transformer2DModel": Family("Flux 2", partial(_from_table, FLUXES + FLUX_2)),
    "WanTransformer3DModel": Family("Wan", partial(_from_table, WAN)),
    "QwenImageTransformer2DModel": Family("Qwen-Image", partial(_from_table, "")),
    "ZImageTransformer2DModel": Family("Z-Image", partial(_from_table, Z_IMAGE)),
}


def original_names(model: nn.Module, rows: Mapping[str, int]) -> Origins:
    """What the tensors of a denoiser are called in a file of its authors, and which of its tensors each is made of.

    `rows` counts the rows of each tensor of the denoiser, by its name in diffusers.

    Raises `CheckpointError` for a model of another family, and for one that diffusers' converter would read back otherwise.
    """
    kind = type(model).__name__
    if kind not in FAMILIES:
        known = ", ".join(f"{family.title} ({name})" for name, family in FAMILIES.items())
        raise CheckpointError(f"{kind}: the original names of its tensors are not known; known are {known}")
    family = FAMILIES[kind]
    origins = {family.prefix + name: parts for name, parts in family.origins(list(rows)).items()}
    marks = _marked(family, rows)
    original = {name: torch.cat([part.of(marks[part.name]) for part in parts]) for name, parts in origins.items()}
    try:
        converter = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]
        config: Any = model.config
        back = converter(dict(original), config=dict(config))
    except (KeyError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{kind}: diffusers does not read its original names ({error}); it cannot be written so") from error
    wrong = sorted(set(marks) ^ set(back)) or sorted(name for name, mark in marks.items() if not torch.equal(mark, back[name]))
    if wrong:
        raise CheckpointError(
            f"{kind}: {len(wrong)} tensors would not come back from their original names, first {wrong[0]!r}; it is no model of "
            f"{family.title} as its authors released it"
        )
    return origins


def _marked(family: Family, rows: Mapping[str, int]) -> dict[str, Tensor]:
    """A number for each row of each tensor, ``[rows, 1]``; as many rows as at the width that the converter knows."""
    known, width = (1, 1) if family.width is None else (family.width, rows["x_embedder.weight"])
    first, marks = 0, {}
    for name, count in rows.items():
        count = max(1, count * known // width)
        marks[name] = torch.arange(first, first + count)[:, None]
        first += count
    return marks
