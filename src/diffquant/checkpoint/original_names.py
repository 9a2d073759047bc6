"""The names that tensors of a denoiser have in the files of its authors, from those that diffusers gives them.

A family of models is one table. A line reads *name in diffusers, original name*; ``*`` is a number, and ``.weight`` and ``.bias``
follow both. Tensors with one original name are concatenated along their rows in the order of the lines (a fused projection), and
``halves`` exchanges the two halves of the rows (shift and scale of a last norm). Names that no line has stay as they are.

Nothing here is believed: `original_names` lets diffusers' own converter, which goes the other way, read marked tensors, and refuses
a model whose names and rows do not come back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor, nn

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


FLUXES = """
context_embedder                                txt_in
x_embedder                                      img_in
transformer_blocks.*.attn.to_q                  double_blocks.*.img_attn.qkv
transformer_blocks.*.attn.to_k                  double_blocks.*.img_attn.qkv
transformer_blocks.*.attn.to_v                  double_blocks.*.img_attn.qkv
transformer_blocks.*.attn.add_q_proj            double_blocks.*.txt_attn.qkv
transformer_blocks.*.attn.add_k_proj            double_blocks.*.txt_attn.qkv
transformer_blocks.*.attn.add_v_proj            double_blocks.*.txt_attn.qkv
transformer_blocks.*.attn.norm_q.weight         double_blocks.*.img_attn.norm.query_norm.scale
transformer_blocks.*.attn.norm_k.weight         double_blocks.*.img_attn.norm.key_norm.scale
transformer_blocks.*.attn.norm_added_q.weight   double_blocks.*.txt_attn.norm.query_norm.scale
transformer_blocks.*.attn.norm_added_k.weight   double_blocks.*.txt_attn.norm.key_norm.scale
transformer_blocks.*.attn.to_out.0              double_blocks.*.img_attn.proj
transformer_blocks.*.attn.to_add_out            double_blocks.*.txt_attn.proj
single_transformer_blocks.*.attn.norm_q.weight  single_blocks.*.norm.query_norm.scale
single_transformer_blocks.*.attn.norm_k.weight  single_blocks.*.norm.key_norm.scale
proj_out                                        final_layer.linear
norm_out.linear                                 final_layer.adaLN_modulation.1  halves
"""
FLUX = """
time_text_embed.timestep_embedder.linear_1      time_in.in_layer
time_text_embed.timestep_embedder.linear_2      time_in.out_layer
time_text_embed.text_embedder.linear_1          vector_in.in_layer
time_text_embed.text_embedder.linear_2          vector_in.out_layer
time_text_embed.guidance_embedder.linear_1      guidance_in.in_layer
time_text_embed.guidance_embedder.linear_2      guidance_in.out_layer
transformer_blocks.*.norm1.linear               double_blocks.*.img_mod.lin
transformer_blocks.*.norm1_context.linear       double_blocks.*.txt_mod.lin
transformer_blocks.*.ff.net.0.proj              double_blocks.*.img_mlp.0
transformer_blocks.*.ff.net.2                   double_blocks.*.img_mlp.2
transformer_blocks.*.ff_context.net.0.proj      double_blocks.*.txt_mlp.0
transformer_blocks.*.ff_context.net.2           double_blocks.*.txt_mlp.2
single_transformer_blocks.*.norm.linear         single_blocks.*.modulation.lin
single_transformer_blocks.*.attn.to_q           single_blocks.*.linear1
single_transformer_blocks.*.attn.to_k           single_blocks.*.linear1
single_transformer_blocks.*.attn.to_v           single_blocks.*.linear1
single_transformer_blocks.*.proj_mlp            single_blocks.*.linear1
single_transformer_blocks.*.proj_out            single_blocks.*.linear2
"""
FLUX_2 = """
time_guidance_embed.timestep_embedder.linear_1  time_in.in_layer
time_guidance_embed.timestep_embedder.linear_2  time_in.out_layer
time_guidance_embed.guidance_embedder.linear_1  guidance_in.in_layer
time_guidance_embed.guidance_embedder.linear_2  guidance_in.out_layer
double_stream_modulation_img.linear             double_stream_modulation_img.lin
double_stream_modulation_txt.linear             double_stream_modulation_txt.lin
single_stream_modulation.linear                 single_stream_modulation.lin
transformer_blocks.*.ff.linear_in               double_blocks.*.img_mlp.0
transformer_blocks.*.ff.linear_out              double_blocks.*.img_mlp.2
transformer_blocks.*.ff_context.linear_in       double_blocks.*.txt_mlp.0
transformer_blocks.*.ff_context.linear_out      double_blocks.*.txt_mlp.2
single_transformer_blocks.*.attn.to_qkv_mlp_proj  single_blocks.*.linear1
single_transformer_blocks.*.attn.to_out         single_blocks.*.linear2
"""
WAN = """
condition_embedder.time_embedder.linear_1       time_embedding.0
condition_embedder.time_embedder.linear_2       time_embedding.2
condition_embedder.text_embedder.linear_1       text_embedding.0
condition_embedder.text_embedder.linear_2       text_embedding.2
condition_embedder.time_proj                    time_projection.1
condition_embedder.image_embedder.norm1         img_emb.proj.0
condition_embedder.image_embedder.ff.net.0.proj  img_emb.proj.1
condition_embedder.image_embedder.ff.net.2      img_emb.proj.3
condition_embedder.image_embedder.norm2         img_emb.proj.4
blocks.*.attn1.to_q                             blocks.*.self_attn.q
blocks.*.attn1.to_k                             blocks.*.self_attn.k
blocks.*.attn1.to_v                             blocks.*.self_attn.v
blocks.*.attn1.to_out.0                         blocks.*.self_attn.o
blocks.*.attn1.norm_q                           blocks.*.self_attn.norm_q
blocks.*.attn1.norm_k                           blocks.*.self_attn.norm_k
blocks.*.attn2.to_q                             blocks.*.cross_attn.q
blocks.*.attn2.to_k                             blocks.*.cross_attn.k
blocks.*.attn2.to_v                             blocks.*.cross_attn.v
blocks.*.attn2.to_out.0                         blocks.*.cross_attn.o
blocks.*.attn2.norm_q                           blocks.*.cross_attn.norm_q
blocks.*.attn2.norm_k                           blocks.*.cross_attn.norm_k
blocks.*.attn2.add_k_proj                       blocks.*.cross_attn.k_img
blocks.*.attn2.add_v_proj                       blocks.*.cross_attn.v_img
blocks.*.attn2.norm_added_k                     blocks.*.cross_attn.norm_k_img
blocks.*.norm2                                  blocks.*.norm3
blocks.*.ffn.net.0.proj                         blocks.*.ffn.0
blocks.*.ffn.net.2                              blocks.*.ffn.2
blocks.*.scale_shift_table                      blocks.*.modulation
scale_shift_table                               head.modulation
proj_out                                        head.head
"""
Z_IMAGE = """
layers.*.attention.to_q                         layers.*.attention.qkv
layers.*.attention.to_k                         layers.*.attention.qkv
layers.*.attention.to_v                         layers.*.attention.qkv
layers.*.attention.to_out.0                     layers.*.attention.out
layers.*.attention.norm_q                       layers.*.attention.q_norm
layers.*.attention.norm_k                       layers.*.attention.k_norm
noise_refiner.*.attention.to_q                  noise_refiner.*.attention.qkv
noise_refiner.*.attention.to_k                  noise_refiner.*.attention.qkv
noise_refiner.*.attention.to_v                  noise_refiner.*.attention.qkv
noise_refiner.*.attention.to_out.0              noise_refiner.*.attention.out
noise_refiner.*.attention.norm_q                noise_refiner.*.attention.q_norm
noise_refiner.*.attention.norm_k                noise_refiner.*.attention.k_norm
context_refiner.*.attention.to_q                context_refiner.*.attention.qkv
context_refiner.*.attention.to_k                context_refiner.*.attention.qkv
context_refiner.*.attention.to_v                context_refiner.*.attention.qkv
context_refiner.*.attention.to_out.0            context_refiner.*.attention.out
context_refiner.*.attention.norm_q              context_refiner.*.attention.q_norm
context_refiner.*.attention.norm_k              context_refiner.*.attention.k_norm
all_x_embedder.2-1                              x_embedder
all_final_layer.2-1.linear                      final_layer.linear
all_final_layer.2-1.adaLN_modulation.1          final_layer.adaLN_modulation.1
"""
UNET = """
time_embedding.linear_1                         time_embed.0
time_embedding.linear_2                         time_embed.2
add_embedding.linear_1                          label_emb.0.0
add_embedding.linear_2                          label_emb.0.2
class_embedding.linear_1                        label_emb.0.0
class_embedding.linear_2                        label_emb.0.2
class_embedding                                 label_emb
conv_in                                         input_blocks.0.0
mid_block.resnets.0                             middle_block.0
mid_block.attentions.0                          middle_block.1
mid_block.resnets.1                             middle_block.2
conv_norm_out                                   out.0
conv_out                                        out.2
"""  # `_unet` adds the numbered blocks
UNET_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _from_table(table: str, names: Sequence[str]) -> Origins:
    """The origins of `names` by a table as of the module's docstring."""
    rules = [(re.compile(re.escape(ours).replace(r"\*", r"(\d+)")), *others) for ours, *others in map(str.split, _lines(table))]
    found: dict[str, list[tuple[int, Part]]] = {}
    for name in names:
        module, dot, leaf = name.rpartition(".")
        for line, (pattern, original, *halves) in enumerate(rules):
            whole, inner = pattern.fullmatch(name), pattern.fullmatch(module)
            if match := whole or inner:
                number = match.group(1) if pattern.groups else ""
                target = original.replace("*", number) + ("" if whole else dot + leaf)
                parts = [Part(name, 1), Part(name, 0)] if halves else [Part(name)]
                found.setdefault(target, []).extend((line, part) for part in parts)
                break
        else:
            found.setdefault(name, []).append((-1, Part(name)))
    return {original: tuple(part for _, part in sorted(parts, key=lambda each: each[0])) for original, parts in found.items()}


def _lines(table: str) -> list[str]:
    return [line for line in table.splitlines() if line]


def _unet(names: Sequence[str]) -> Origins:
    """The origins of the names of a UNet, whose blocks its authors number through."""
    per_block = len({name.split(".")[3] for name in names if name.startswith("down_blocks.0.resnets.")})
    attending = {name.split(".")[1] for name in names if re.match(r"up_blocks\.\d+\.attentions\.", name)}
    blocks = list(_unet_blocks(names, per_block, attending))
    table = [line.split() for line in _lines(UNET)] + blocks
    origins: Origins = {}
    for name in names:
        ours, original = next(((a, b) for a, b in table if name.startswith(f"{a}.")), ("", ""))
        rest = name.removeprefix(ours) if ours else name
        if re.search(r"\.resnets\.\d+$", ours):
            layer, _, leaf = rest[1:].rpartition(".")
            rest = f".{UNET_RESIDUAL.get(layer, layer)}.{leaf}"
        origins.setdefault(original + rest, ())
        origins[original + rest] += (Part(name),)
    return origins


def _unet_blocks(names: Sequence[str], per_block: int, attending: set[str]) -> Iterator[list[str]]:
    for block in range(1 + max((int(name.split(".")[1]) for name in names if name.startswith("down_blocks.")), default=-1)):
        first, up = 1 + block * (per_block + 1), block * (per_block + 1)
        for layer in range(per_block + 1):
            yield [f"down_blocks.{block}.resnets.{layer}", f"input_blocks.{first + layer}.0"]
            yield [f"down_blocks.{block}.attentions.{layer}", f"input_blocks.{first + layer}.1"]
            yield [f"up_blocks.{block}.resnets.{layer}", f"output_blocks.{up + layer}.0"]
            yield [f"up_blocks.{block}.attentions.{layer}", f"output_blocks.{up + layer}.1"]
        yield [f"down_blocks.{block}.downsamplers.0.conv", f"input_blocks.{first + per_block}.0.op"]
        place = 2 if str(block) in attending else 1
        yield [f"up_blocks.{block}.upsamplers.0.conv", f"output_blocks.{up + per_block}.{place}.conv"]


FAMILIES = {
    "UNet2DConditionModel": Family("Stable Diffusion 1, 2 and XL", _unet, prefix="model.diffusion_model."),
    "FluxTransformer2DModel": Family("Flux", partial(_from_table, FLUXES + FLUX), width=3072),
    "Flux2Transformer2DModel": Family("Flux 2", partial(_from_table, FLUXES + FLUX_2)),
    "WanTransformer3DModel": Family("Wan", partial(_from_table, WAN)),
    "QwenImageTransformer2DModel": Family("Qwen-Image", partial(_from_table, "")),
    "ZImageTransformer2DModel": Family("Z-Image", partial(_from_table, Z_IMAGE)),
}


def original_names(model: nn.Module, tensors: Mapping[str, Tensor]) -> Origins:
    """What the tensors of a denoiser are called in a file of its authors, and of which of `tensors` each is made.

    Raises `CheckpointError` for a model of another family, and for one that diffusers' converter would read back otherwise.
    """
    kind = type(model).__name__
    if kind not in FAMILIES:
        known = ", ".join(f"{family.title} ({name})" for name, family in FAMILIES.items())
        raise CheckpointError(f"{kind}: the original names of its tensors are not known; known are {known}")
    family = FAMILIES[kind]
    origins = {family.prefix + name: parts for name, parts in family.origins(list(tensors)).items()}
    marks = _marked(model, family, tensors)
    original = {name: torch.cat([part.of(marks[part.name]) for part in parts]) for name, parts in origins.items()}
    try:
        converter = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]
        config: Any = model.config
        back = converter(dict(original), config=dict(config))
    except (KeyError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{kind}: diffusers does not read its original names ({error}); it cannot be written so") from error
    wrong = sorted(set(marks) ^ set(back)) or sorted(name for name, rows in marks.items() if not torch.equal(rows, back[name]))
    if wrong:
        raise CheckpointError(
            f"{kind}: {len(wrong)} tensors would not come back from their original names, first {wrong[0]!r}; it is no model of "
            f"{family.title} as its authors released it"
        )
    return origins


def _marked(model: nn.Module, family: Family, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A number for each row of each tensor, ``[rows, 1]``; as many rows as at the width that the converter knows."""
    factor, first, marks = (1, 1), 0, {}
    if family.width is not None:
        factor = family.width, len(tensors["x_embedder.weight"])
    for name, tensor in tensors.items():
        rows = max(1, len(tensor) * factor[0] // factor[1])
        marks[name] = torch.arange(first, first + rows)[:, None]
        first += rows
    return marks
