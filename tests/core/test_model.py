"""Rules to layers: on a model small enough to read, and on three kinds of denoiser of diffusers."""

import copy
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from diffusers import DiTTransformer2DModel, UNet1DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from diffquant.core import model as models
from diffquant.core.affine import scale_from_range
from diffquant.core.clock import StepClock
from diffquant.core.layers import QuantizedConv2d, QuantizedLinear
from diffquant.core.spec import AttentionSpec, LayerRule, LayerSpec
from diffquant.errors import SpecError
from diffquant.host import structure
from diffquant.host.denoiser import prepare, timestep_argument
from tests import pipelines

W4A8 = LayerRule(match="@all", weight_bits=4, input_bits=8)
ATTENTION_A8 = LayerRule(match="@attention", input_bits=8)
EDGES_W8 = [LayerRule(match="@first", weight_bits=8), LayerRule(match="@last", weight_bits=8)]


class Projection(nn.Linear):
    """A subclass, which may compute anything."""


class Denoiser(nn.Module):
    """One of each kind of module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(1, 4, 3, padding=1)
        self.mix = nn.ModuleList([nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1)])
        self.special = Projection(4, 4)
        self.table = nn.Embedding(3, 4)
        self.up = nn.ConvTranspose2d(4, 4, 1)
        self.norm = nn.GroupNorm(2, 4)
        self.out = nn.Linear(4, 1)

    def forward(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        x = self.conv_in(sample)
        for conv in self.mix:
            x = x + conv(self.norm(x))
        return self.out(self.special(self.up(x).movedim(1, -1))).movedim(-1, 1)


class NoTimestep(nn.Module):
    def forward(self, sample: Tensor, sigma: Tensor) -> Tensor:
        return sample


class NamedT(nn.Module):
    def forward(self, sample: Tensor, context: Tensor, t: Tensor) -> Tensor:
        return sample


def unet() -> tuple[nn.Module, tuple[Any, ...]]:
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )
    return model.eval(), (torch.randn(2, 1, 8, 8), 321)


def conditional_unet() -> tuple[nn.Module, tuple[Any, ...]]:
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=12,
    )
    return model.eval(), (torch.randn(2, 4, 8, 8), torch.tensor([321, 321]), torch.randn(2, 5, 12))


def transformer() -> tuple[nn.Module, tuple[Any, ...]]:
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )
    return model.eval(), (torch.randn(2, 4, 8, 8), torch.tensor([321, 321]), torch.tensor([3, 10]))


def pixart() -> tuple[nn.Module, tuple[Any, ...]]:
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    added = {"resolution": None, "aspect_ratio": None}
    arguments = (torch.randn(2, 4, 32, 32), torch.randn(2, 6, 16), torch.tensor([321, 321]), added, None, None, mask)
    return pipelines.pixart_transformer(), arguments


def stable_diffusion_3() -> tuple[nn.Module, tuple[Any, ...]]:
    arguments = (torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32), torch.randn(2, 32), torch.tensor([321.5, 321.5]))
    return pipelines.stable_diffusion_3_transformer(), arguments


def flux() -> tuple[nn.Module, tuple[Any, ...]]:
    """Positions have no axis of samples, and the timestep is a share of 1000."""
    text = (torch.randn(2, 5, 16), torch.randn(2, 16))
    positions = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    arguments = (torch.randn(2, 16, 16), *text, torch.tensor([0.321, 0.321]), positions, torch.zeros(5, 3), torch.ones(2))
    return pipelines.flux_transformer(), arguments


DENOISERS = {
    "UNet2DModel": unet,
    "UNet2DConditionModel": conditional_unet,
    "DiTTransformer2DModel": transformer,
    "PixArtTransformer2DModel": pixart,
    "SD3Transformer2DModel": stable_diffusion_3,
    "FluxTransformer2DModel": flux,
}
Made = Callable[[], tuple[nn.Module, tuple[Any, ...]]]


@pytest.fixture(params=DENOISERS.values(), ids=DENOISERS)
def make(request: pytest.FixtureRequest) -> Made:
    function: Made = request.param
    return function


def calibrate(model: nn.Module) -> None:
    """Min-max of every weight, some range for every input, all of it off."""
    for _, quantizer in models.quantizers(model):
        quantizer.scale.fill_(0.05)
        quantizer.zero_point.fill_(0.0 if quantizer.spec.symmetric else 128.0 if quantizer.spec.bits == 8 else 3.0)
    for _, layer in models.quantized_layers(model):
        if layer.weight_quantizer is not None and not layer.weight_quantizer.splits:
            rows = layer.smoothed_weight().detach().flatten(1)
            scale, zero_point = scale_from_range(rows.amin(1), rows.amax(1), layer.weight_quantizer.spec)
            layer.weight_quantizer.scale[:, 0], layer.weight_quantizer.zero_point[:, 0] = scale, zero_point


def by_name(rows: list[structure.PlannedLayer]) -> dict[str, structure.PlannedLayer]:
    return {row.name: row for row in rows}


def layer_spec(row: structure.PlannedLayer) -> LayerSpec:
    assert isinstance(row.spec, LayerSpec)
    return row.spec


# ---- rules


def test_later_rules_win_field_by_field() -> None:
    rules = [W4A8, LayerRule(match="mix.*", weight_bits=6), LayerRule(match="mix.1", input_bits=4, weight_symmetric=False)]
    rows = by_name(structure.plan(Denoiser(), rules))
    found = {name: (layer_spec(rows[name]).weight, layer_spec(rows[name]).input) for name in ("conv_in", "mix.0", "mix.1")}
    assert {name: (str(weight), str(entry)) for name, (weight, entry) in found.items()} == {
        "conv_in": ("int4/channel", "uint8/tensor"),
        "mix.0": ("int6/channel", "uint8/tensor"),
        "mix.1": ("uint6/channel", "uint4/tensor"),
    }
    assert [rows[name].reason for name in ("conv_in", "mix.0", "mix.1")] == ["@all", "mix.*", "mix.1"]
    back = by_name(structure.plan(Denoiser(), [rules[1], W4A8]))
    assert str(layer_spec(back["mix.0"]).weight) == "int4/channel"


@pytest.mark.parametrize(
    ("make", "first", "last"),
    [
        (unet, "conv_in", "conv_out"),
        (conditional_unet, "conv_in", "conv_out"),
        (transformer, "pos_embed.proj", "proj_out_2"),
        (pixart, "pos_embed.proj", "proj_out"),
        (stable_diffusion_3, "pos_embed.proj", "proj_out"),
        (flux, "x_embedder", "proj_out"),
        (lambda: (Denoiser(), ()), "conv_in", "out"),
    ],
)
def test_first_and_last(make: Made, first: str, last: str) -> None:
    rows = structure.plan(make()[0], [W4A8, *EDGES_W8])
    eight = [row.name for row in rows if isinstance(row.spec, LayerSpec) and row.spec.weight and row.spec.weight.bits == 8]
    assert eight == [first, last]


TEXT_AND_TIME = {f"time_text_embed.{part}_embedder.linear_{index}" for part in ("timestep", "text") for index in (1, 2)} | {
    "context_embedder",
    "norm_out.linear",
}


@pytest.mark.parametrize(
    ("make", "embedding", "attention"),
    [
        (
            pixart,
            {f"adaln_single.emb.timestep_embedder.linear_{index}" for index in (1, 2)}
            | {"adaln_single.linear", "caption_projection.linear_1", "caption_projection.linear_2"},
            {"transformer_blocks.0.attn1", "transformer_blocks.0.attn2"},
        ),
        (
            stable_diffusion_3,
            TEXT_AND_TIME
            | {f"transformer_blocks.{block}.{norm}.linear" for block in (0, 1) for norm in ("norm1", "norm1_context")},
            {"transformer_blocks.0.attn", "transformer_blocks.0.attn2", "transformer_blocks.1.attn"},
        ),
        (
            flux,
            TEXT_AND_TIME
            | {f"time_text_embed.guidance_embedder.linear_{index}" for index in (1, 2)}
            | {f"transformer_blocks.0.{norm}.linear" for norm in ("norm1", "norm1_context")}
            | {"single_transformer_blocks.0.norm.linear"},
            {"transformer_blocks.0.attn", "single_transformer_blocks.0.attn"},
        ),
    ],
)
def test_structural_selectors_on_transformers_with_text(make: Made, embedding: set[str], attention: set[str]) -> None:
    model, _ = make()
    assert selected(model, "@embedding") == embedding
    assert selected(model, "@attention") == attention
    assert not any(selected(model, selector) for selector in ("@skip", "@shortcut", "@resample"))
    prepare(model, structure.plan(model, [W4A8]))
    blocks = {name for name in dict(model.named_modules()) if name.rpartition(".")[0].endswith("transformer_blocks")}
    assert blocks == {unit.name for unit in structure.units(model) if len(unit.layers) > 1}


def selected(model: nn.Module, selector: str) -> set[str]:
    """Names of the layers that a selector names."""
    return {row.name for row in structure.plan(model, [LayerRule(match=selector, weight_bits=4, input_bits=4)]) if row.spec}


def test_structural_selectors_on_a_unet() -> None:
    model, _ = unet()
    modules = dict(model.named_modules())
    convolutions = {name for name, module in modules.items() if type(module) is nn.Conv2d}
    linears = {name for name, module in modules.items() if type(module) is nn.Linear}
    up_resnets = {f"up_blocks.{block}.resnets.{index}" for block in (0, 1) for index in (0, 1)}
    assert selected(model, "@conv") == convolutions
    assert selected(model, "@linear") == linears
    assert selected(model, "@all") == convolutions | linears
    assert selected(model, "@skip") == {f"{name}.{layer}" for name in up_resnets for layer in ("conv1", "conv_shortcut")}
    assert selected(model, "@shortcut") == {name for name in convolutions if name.endswith("conv_shortcut")}
    assert selected(model, "@resample") == {"down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv"}
    assert selected(model, "@embedding") == {name for name in linears if name.startswith("time_emb") or "time_emb_proj" in name}
    assert selected(model, "@attention") == {name for name, module in modules.items() if type(module).__name__ == "Attention"}


def test_structural_selectors_on_a_transformer() -> None:
    model, _ = transformer()
    assert selected(model, "@attention") == {"transformer_blocks.0.attn1", "transformer_blocks.1.attn1"}
    assert selected(model, "@embedding") == {
        f"transformer_blocks.{index}.norm1.{name}"
        for index in (0, 1)
        for name in ("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")
    }
    assert selected(model, "@skip") == selected(model, "@resample") == selected(model, "@shortcut") == set()


def test_blocks_that_do_not_say_how_wide_they_are_have_no_skips() -> None:
    sizes = {"sample_size": 64, "block_out_channels": (32, 32), "extra_in_channels": 64}
    blocks = {"down_block_types": ("DownBlock1DNoSkip", "AttnDownBlock1D"), "up_block_types": ("AttnUpBlock1D", "UpBlock1DNoSkip")}
    model = UNet1DModel(**sizes, **blocks)
    assert selected(model, "@skip") == set() and selected(model, "@linear")


@pytest.mark.parametrize("make", [unet, conditional_unet])
@torch.no_grad()
def test_splits_are_where_the_skip_begins(make: Made) -> None:
    """Seen from outside: what enters an up block's residual block is [hidden, skip], and the hidden part comes from before it."""
    model, arguments = make()
    rules = [LayerRule(match="@skip", weight_bits=4, input_bits=8, split_skips=True)]
    splits = {row.name: row.spec.splits for row in structure.plan(model, rules) if isinstance(row.spec, LayerSpec)}
    hidden: list[int] = []

    def watch(_: nn.Module, places: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        hidden.append((places[0] if places else keywords["hidden_states"]).shape[1])

    for block in model.up_blocks:
        block.register_forward_pre_hook(watch, with_kwargs=True)
    model(*arguments)
    for index, width in enumerate(hidden):
        resnets = model.up_blocks[index].resnets
        for inner, resnet in enumerate(resnets):
            expected = width if inner == 0 else resnets[inner - 1].out_channels
            for layer in ("conv1", "conv_shortcut"):
                found = splits.pop(f"up_blocks.{index}.resnets.{inner}.{layer}")
                assert found == (expected, resnet.in_channels - expected)
    assert splits == {}


def test_special_kinds_stay_and_are_named_with_the_reason() -> None:
    model = Denoiser()
    rows = by_name(structure.plan(model, [W4A8]))
    left = {name: (row.kind, row.reason) for name, row in rows.items() if row.spec is None}
    reason = "stays in floating point: only nn.Linear, nn.Conv2d, nn.Conv3d and nn.Embedding are quantized"
    kinds = {"special": "Projection", "up": "ConvTranspose2d"}
    table = {"table": ("Embedding", "no rule with @lookup, which names tables of embeddings (floating point)")}
    assert left == {name: (kind, f"{kind} {reason}") for name, kind in kinds.items()} | table
    prepare(model, list(rows.values()))
    assert type(model.special) is Projection and not hasattr(model.special, "weight_quantizer")
    assert [type(layer) for layer in (model.conv_in, *model.mix, model.out)] == [QuantizedConv2d] * 3 + [QuantizedLinear]


def test_a_rule_for_a_special_kind_is_refused() -> None:
    """It would have no effect: the layer is left alone."""
    with pytest.raises(SpecError, match=r'^layers\[0\]\.match "special": matches no layer of Denoiser; nearest name'):
        structure.plan(Denoiser(), [LayerRule(match="special", weight_bits=4)])


def test_a_layer_kept_in_float_says_why() -> None:
    rules = [W4A8, LayerRule(match="out", weight_bits="float", input_bits="float", reason="noise is sensitive")]
    assert by_name(structure.plan(Denoiser(), rules))["out"].reason == "out: noise is sensitive (floating point)"
    assert by_name(structure.plan(Denoiser(), [rules[1]]))["conv_in"].reason == "no rule (floating point)"


def test_attention_products_take_input_and_softmax_bits() -> None:
    model, _ = unet()
    rules = [LayerRule(match="@attention", input_bits=6, input_symmetric=True, softmax_bits=8, sets=3)]
    spec = by_name(structure.plan(model, rules))["mid_block.attentions.0"].spec
    assert isinstance(spec, AttentionSpec)
    assert {str(spec.query), str(spec.key), str(spec.value)} == {"int6/tensor"}
    assert (str(spec.softmax), spec.sets) == ("uint8/tensor", 3)


def test_every_layer_with_weights_has_a_row(make: Made) -> None:
    model, _ = make()
    rows = by_name(structure.plan(model, [W4A8]))
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    assert {name for name in matrices if name.removesuffix(".weight") not in rows} == set()
    assert all(row.reason for row in rows.values())


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [W4A8, W4A8, LayerRule(match="*.shortcut", weight_bits=8)],
            'layers[2].match "*.shortcut": matches no layer of UNet2DModel; nearest name "up_blocks.1.resnets.1.conv_shortcut"',
        ),
        (
            [LayerRule(match="@frist", weight_bits=8)],
            "layers[0].match '@frist': unknown selector; allowed are @all, @conv, @linear, @lookup, @first, @last, @embedding, "
            "@modulated, @skip, @shortcut, @resample, @attention",
        ),
    ],
)
def test_patterns_that_match_nothing_are_refused(rules: list[LayerRule], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        structure.plan(unet()[0], rules)
    assert str(caught.value) == message


def test_a_plan_changes_nothing() -> None:
    model = Denoiser()
    before = {name: type(module) for name, module in model.named_modules()}
    structure.plan(model, [W4A8])
    assert {name: type(module) for name, module in model.named_modules()} == before


# ---- the model with quantizers off, and switching them


@torch.no_grad()
def test_off_is_bit_equal_to_the_original(make: Made) -> None:
    model, arguments = make()
    original = copy.deepcopy(model)
    rules = [W4A8, ATTENTION_A8, LayerRule(match="@skip", split_skips=True)]
    rules += [LayerRule(match="@linear", smooth=True, shift=True, sets=2)]
    rows = structure.plan(model, rules)
    prepare(model, rows, [900, 100])
    expected = original(*arguments).sample
    assert torch.equal(model(*arguments).sample, expected)
    calibrate(model)
    with models.switched(model, True):
        assert not torch.equal(model(*arguments).sample, expected)
        with models.full_precision(model):
            assert torch.equal(model(*arguments).sample, expected)
    named = dict(original.named_parameters())
    assert {name for name, _ in model.named_parameters()} == set(named)
    assert all(torch.equal(parameter, named[name]) for name, parameter in model.named_parameters())


@torch.no_grad()
def test_every_attention_is_intercepted(make: Made) -> None:
    model, arguments = make()
    prepare(model, structure.plan(model, [ATTENTION_A8]))
    seen: set[str] = set()
    for name, quantizer in models.quantizers(model):
        quantizer.observer = lambda x, name=name: seen.add(name)  # type: ignore[misc]
    model(*arguments)
    assert seen == {name for name, _ in models.quantizers(model)} and seen


@torch.no_grad()
def test_products_computed_apart_are_those_of_the_model(make: Made) -> None:
    """Masks, joint streams and rotary positions included: observed, the products are computed one by one and not quantized."""
    model, arguments = make()
    expected = model(*arguments).sample
    prepare(model, structure.plan(model, [ATTENTION_A8]))
    for _, quantizer in models.quantizers(model):
        quantizer.observer = lambda x: None
    found = model(*arguments).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # sums in another order


def test_attention_that_cannot_be_intercepted_stays_and_says_why() -> None:
    model, _ = conditional_unet()
    model.set_attn_processor(AttnProcessor())
    reason = "AttnProcessor computes without scaled_dot_product_attention, which would be quantized (floating point)"
    rows = [row for row in structure.plan(model, [W4A8, ATTENTION_A8]) if row.kind == "attention products"]
    assert {(row.spec, row.reason) for row in rows} == {(None, reason)}


@torch.no_grad()
def test_offloaded_layers_are_refused_and_taken_after_their_hooks_are_gone() -> None:
    model, arguments = unet()
    rows = structure.plan(model, [W4A8])
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(SpecError, match=r"^layer 'conv_in': its forward is replaced .* call the pipeline's remove_all_hooks"):
        prepare(model, rows)
    remove_hook_from_submodules(model)
    assert "forward" in vars(model.conv_in)  # accelerate leaves the original there, which would hide the quantizable one
    prepare(model, rows)
    calibrate(model)
    expected = model(*arguments).sample
    models.enable(model)
    assert not torch.equal(model(*arguments).sample, expected)


@torch.no_grad()
def test_a_deep_copy_has_its_own_clock_and_switches() -> None:
    model, (sample, _) = unet()
    prepare(model, structure.plan(model, [W4A8]), [900, 500, 100])
    calibrate(model)
    twin = copy.deepcopy(model)
    assert twin.diffquant.clock is not model.diffquant.clock
    twin(sample, 100)
    assert (twin.diffquant.clock.interval, model.diffquant.clock.interval) == (2, 0)
    clocks = {id(quantizer.clock) for _, quantizer in models.quantizers(twin) if quantizer.clock is not None}
    assert clocks == {id(twin.diffquant.clock)}
    models.enable(twin)
    assert not any(quantizer.enabled for _, quantizer in models.quantizers(model))


def test_switches_are_restored_after_an_exception() -> None:
    model = Denoiser()
    prepare(model, structure.plan(model, [W4A8]))
    calibrate(model)
    model.out.weight_quantizer.enabled = True
    before = [quantizer.enabled for _, quantizer in models.quantizers(model)]
    for on in (True, False):
        with pytest.raises(RuntimeError, match="inside"), models.switched(model, on):
            assert {quantizer.enabled for _, quantizer in models.quantizers(model)} == {on}
            raise RuntimeError("inside")
        assert [quantizer.enabled for _, quantizer in models.quantizers(model)] == before


def test_enabling_what_is_not_calibrated_is_refused_and_changes_nothing() -> None:
    model = Denoiser()
    prepare(model, structure.plan(model, [W4A8]))
    calibrate(model)
    model.mix[1].input_quantizer.scale.fill_(torch.nan)
    with pytest.raises(SpecError, match=r"^mix\.1\.input_quantizer: not calibrated; a recipe starts with a pass that sets ranges$"):
        models.enable(model)
    assert not any(quantizer.enabled for _, quantizer in models.quantizers(model))


# ---- prepare


def test_no_more_parameter_sets_than_timesteps() -> None:
    model, _ = unet()
    rows = structure.plan(
        model, [LayerRule(match="@all", weight_bits=4, input_bits=8, sets=5), LayerRule(match="@attention", sets=5)]
    )
    prepare(model, rows, [900, 500, 100])
    assert {quantizer.rows for _, quantizer in models.quantizers(model) if quantizer.clock is not None} == {3}
    assert model.conv_in.layer_spec.sets == 3


def test_preparing_twice_is_refused() -> None:
    model = Denoiser()
    rows = structure.plan(model, [W4A8])
    prepare(model, rows)
    with pytest.raises(SpecError, match=r"^Denoiser: already quantizable; load the full-precision model again to start over$"):
        prepare(model, rows)


def test_rows_of_another_model_are_refused() -> None:
    rows = structure.plan(unet()[0], [W4A8])
    with pytest.raises(SpecError, match=r"^layer 'time_embedding.linear_1': not in this Denoiser$"):
        prepare(Denoiser(), rows)


def test_the_timestep_is_found_by_name() -> None:
    assert timestep_argument(Denoiser()) == ("timestep", 1)
    assert timestep_argument(NamedT()) == ("t", 2)
    assert timestep_argument(transformer()[0]) == ("timestep", 1)
    with pytest.raises(
        SpecError, match=r"^NoTimestep\.forward: arguments \['sample', 'sigma'\]; a denoiser has one named timestep"
    ):
        timestep_argument(NoTimestep())


def test_all_quantizers_share_the_clock_of_the_model() -> None:
    model, _ = unet()
    prepare(model, structure.plan(model, [W4A8, ATTENTION_A8]), [900, 100])
    assert isinstance(model.diffquant.clock, StepClock) and model.diffquant.clock.timesteps == (900.0, 100.0)
    clocks = {id(quantizer.clock) for _, quantizer in models.quantizers(model) if quantizer.clock is not None}
    assert clocks == {id(model.diffquant.clock)}


# ---- freezing and units


@torch.no_grad()
def test_a_frozen_model_computes_what_was_simulated(make: Made) -> None:
    model, arguments = make()
    prepare(model, structure.plan(model, [W4A8, ATTENTION_A8]), [900, 100])
    calibrate(model)
    with models.switched(model, True):
        simulated = model(*arguments).sample
    assert not models.is_frozen(model)
    models.freeze(model)
    assert models.is_frozen(model)
    assert torch.equal(model(*arguments).sample, simulated)
    with pytest.raises(SpecError, match=r"^frozen layer"), models.full_precision(model):
        model(*arguments)


def test_an_uncalibrated_model_is_not_frozen() -> None:
    model = Denoiser()
    prepare(model, structure.plan(model, [W4A8]))
    with pytest.raises(SpecError, match="not calibrated"):
        models.freeze(model)
    assert isinstance(model.out.weight, nn.Parameter)


def test_units_hold_every_layer_once(make: Made) -> None:
    model, _ = make()
    counted = structure.unit_count(model)
    prepare(model, structure.plan(model, [W4A8]))
    units = structure.units(model)
    assert counted == structure.unit_count(model) == len(units)
    names = [name for unit in units for name, _ in unit.layers]
    assert sorted(names) == sorted(name for name, _ in models.quantized_layers(model))
    modules = dict(model.named_modules())
    assert all(modules[unit.name] is unit.module for unit in units)
    assert all(modules[name] is layer for unit in units for name, layer in unit.layers)
    assert any(len(unit.layers) > 1 for unit in units)
