"""Recipes: names, bits, overrides, errors before anything is computed; and `quantize` as a whole."""

import copy
import functools

import pytest
import torch

import diffquant as dq
from diffquant import quantization
from diffquant.calibration import fit
from diffquant.core.model import is_frozen, quantized_layers
from diffquant.errors import CalibrationError, RecipeError
from diffquant.files import shipped
from diffquant.host.denoiser import prepare
from diffquant.host.structure import plan
from diffquant.methods.base import quantizer_state
from diffquant.methods.ranges import CalibrateRanges
from diffquant.methods.reconstruction import ReconstructRounding
from diffquant.quantization import pass_names, quantize, restore_passes
from diffquant.recipe import load_recipe
from tests import pipelines


@pytest.fixture(scope="module")
def pipe():
    return pipelines.micro()


@pytest.fixture(scope="module")
def data(pipe):
    return dq.record(pipe, dq.Calibration(samples=4, steps=4, batch_size=4), progress=False)


@pytest.mark.parametrize("name", shipped("recipes"))
@pytest.mark.parametrize("bits", ["w8a8", "w4a8", "w6a6", "w3a8", "w2a32"])
def test_every_recipe_takes_all_bits(name, bits):
    recipe = load_recipe(f"{name}-{bits}")
    assert recipe.full_name == f"{name}-{bits}"
    everything = recipe.layers[0]
    weights, activations = bits[1:].split("a")
    assert everything.weight_bits == int(weights)
    assert everything.input_bits == ("float" if activations == "32" else int(activations))


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("brec-w4a8", (), "recipe 'brec': unknown; allowed are accuquant, adp-dm, brecq, .* did you mean \"brecq\""),
        ("brecq-w9a8", (), "9 bits for weights; allowed are 2 to 8, or 32"),
        ("brecq-w4a1", (), "1 bits for activations; allowed are 2 to 8, or 32"),
        ("nowhere.yaml", (), "recipe 'nowhere.yaml': no such file"),
        ("brecq-w4a8", ("passes.9.rate=1",), "passes.9.rate: '9' does not lead anywhere; the recipe has positions 0 to 2"),
        (
            "brecq-w4a8",
            ("passes.1.iters=1",),
            r"brecq: passes\[1\] ReconstructRounding: iters: unknown key; allowed are .*iterations",
        ),
        ("brecq-w4a8", ("passes.1.iterations=-1",), "iterations: Input should be greater than or equal to 1"),
        ("brecq-w4a8", ("speed=1",), "brecq: speed: unknown key; allowed are name, summary"),
        ("brecq-w4a8", ("speed",), "--set 'speed': must read path=value"),
        ("brecq-w4a8", ("passes.0.pass=Magic",), r"passes\[0\].pass 'Magic': unknown; allowed are AccuQuant"),
    ],
)
def test_errors_name_what_is_wrong(name, overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(name, overrides)


def test_a_file_of_ones_own_with_tuned_values(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nsummary: x\nbits: {weights: 4, activations: 6}\n"
        "layers: [{match: '@all', weight_bits: weights, input_bits: activations}]\n"
        "passes: [{pass: CalibrateRanges, samples: 10}]\n"
        "tuned: {w4a6: {passes.0.samples: 20}, w8a8: {passes.0.samples: 30}}\n"
    )
    assert load_recipe(str(path)).built_passes()[0].samples == 20
    assert load_recipe(str(path), ["bits.weights=8", "bits.activations=8"]).built_passes()[0].samples == 30
    assert load_recipe(str(path), ["passes.0.samples=40"]).built_passes()[0].samples == 40


@pytest.mark.parametrize(
    ("recipe", "override", "passed", "field"),
    [
        ("accuquant-w4a6", "passes.2.smooth=true", "AccuQuant", "smooth"),
        ("dmq-w4a6", "layers.0.smooth=false", "LearnEquivalentScaling", "smooth"),
        ("dmq-w4a6", "layers.2.shift=false", "PowerOfTwoScaling", "shift"),
        ("qncd-w4a6", "layers.2.smooth=false", "EmbeddingSmoothing", "smooth"),
    ],
)
def test_a_pass_without_the_vector_that_it_works_on_is_refused(recipe, override, passed, field):
    with pytest.raises(RecipeError, match=rf"passes\[\d\] {passed}: no rule has {field}: true; add it to one"):
        load_recipe(recipe, [override])


def test_a_rule_can_be_added():
    added = ['layers.+={match: "*.conv2", input_bits: 8}', 'layers.+={match: "@last", input_bits: activations}']
    recipe = load_recipe("brecq-w4a6", added)
    assert [rule.match for rule in recipe.layers] == ["@all", "@attention", "@first", "@last", "*.conv2", "@last"]
    assert [rule.input_bits for rule in recipe.layers[-2:]] == [8, 6]
    with pytest.raises(RecipeError, match=r"layers\.4"):
        load_recipe("brecq-w4a6", ["layers.+=8"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name: mine\xff", "not a text in UTF-8 .invalid start byte at byte 10"),
        (b"name: mine\nsummary: x\nlayers:\npasses: []", "layers: Input should be a valid tuple"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(content, message, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_a_finished_pass_that_was_altered_is_refused(tmp_path):
    fit.save_tensors(tmp_path / "pass.safetensors", {"scale": torch.ones(4)}, {"row": "{}"})
    data = bytearray((tmp_path / "pass.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "pass.safetensors").write_bytes(bytes(data))
    with pytest.raises(CalibrationError, match="damaged .its contents are not those that were written.; delete it"):
        fit.load_tensors(tmp_path / "pass.safetensors")


def test_options_of_a_pass_by_its_name():
    by_name = load_recipe("accuquant-w4a8", ["AccuQuant.iterations=7", "CalibrateRanges.samples=9"])
    assert by_name == load_recipe("accuquant-w4a8", ["passes.2.iterations=7", "passes.0.samples=9"])
    with pytest.raises(RecipeError, match=r"CalibrateRanges.samples: CalibrateRanges is passes.0 and passes.2; say which"):
        load_recipe("mixed-w4a8", ["CalibrateRanges.samples=9"])
    with pytest.raises(RecipeError, match=r"no pass AccuQuant; the recipe has CalibrateRanges, ReconstructRounding, LearnScales"):
        load_recipe("brecq-w4a8", ["AccuQuant.iterations=7"])


def test_a_recipe_that_does_not_start_with_ranges_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nsummary: x\nlayers: [{match: '@all', weight_bits: 4}]\npasses: [{pass: LearnScales}]\n")
    with pytest.raises(RecipeError, match=r"mine: passes\[0\] is LearnScales; before it must come CalibrateRanges"):
        load_recipe(str(path))
    path.write_text(path.read_text().replace("LearnScales", "CalibrateRanges}, {pass: EmbeddingSmoothing"))
    with pytest.raises(RecipeError, match=r"mine: ends with EmbeddingSmoothing; after it must come CalibrateRanges"):
        load_recipe(str(path))


@pytest.mark.filterwarnings("ignore:UNet2DModel. has a sampling-time correction:UserWarning")
@pytest.mark.parametrize("name", shipped("recipes"))
def test_quantize_ends_frozen_and_says_what_it_did(name, pipe, data):
    model = copy.deepcopy(pipe.unet)
    report = quantize(model, load_recipe(f"{name}-w4a8", pipelines.small_budget(f"{name}-w4a8")), data, progress=False)
    assert is_frozen(model)
    assert [row["pass"] for row in report.passes] == [type(step).__name__ for step in load_recipe(f"{name}-w4a8").built_passes()]
    assert {row["name"] for row in report.layers} >= {layer for layer, _ in quantized_layers(model)}
    assert torch.isfinite(model(**data.batch(torch.arange(4))[0]).sample).all()


def test_first_and_last_layers_keep_eight_bits(pipe, data):
    model = copy.deepcopy(pipe.unet)
    quantize(model, load_recipe("mse-w3a6", pipelines.small_budget("mse-w3a6")), data, progress=False)
    bits = {name: layer.weight_quantizer.spec.bits for name, layer in quantized_layers(model)}
    assert {name for name, value in bits.items() if value == 8} == {"conv_in", "conv_out"}
    assert set(bits.values()) == {3, 8}


def test_weight_only_leaves_activations_alone(pipe, data):
    model = copy.deepcopy(pipe.unet)
    quantize(model, load_recipe("mse-w4a32", pipelines.small_budget("mse-w4a32")), data, progress=False)
    assert all(layer.input_quantizer is None for _, layer in quantized_layers(model))


def test_a_killed_run_goes_on_and_ends_equal(pipe, data, tmp_path, monkeypatch):
    recipe = load_recipe("brecq-w4a8", pipelines.small_budget("brecq-w4a8"))
    whole, killed, resumed = (copy.deepcopy(pipe.unet) for _ in range(3))
    quantize(whole, recipe, data, progress=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stop(*arguments, **keywords):
            raise KeyboardInterrupt

        patch.setattr("diffquant.methods.reconstruction.LearnScales.apply", stop)
        quantize(killed, recipe, data, folder=tmp_path / "work", progress=False)
    report = quantize(resumed, recipe, data, folder=tmp_path / "work", progress=False)
    assert len(report.passes) == 3
    expected, found = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    assert not [path for path in (tmp_path / "work").iterdir() if path.is_dir()]  # nothing unfinished is left


@pytest.fixture
def computed(pipe, data, tmp_path, monkeypatch):
    """Quantizes by a recipe in one folder; the passes that were computed for it, and the model."""

    def run(name, *overrides, seed=0):
        made = []
        with monkeypatch.context() as patch:
            for kind in (CalibrateRanges, ReconstructRounding):
                patch.setattr(kind, "apply", lambda self, *rest, own=kind.apply: made.append(type(self)) or own(self, *rest))
            model = copy.deepcopy(pipe.unet)
            recipe = load_recipe(name, [*pipelines.small_budget(name), *overrides])
            quantize(model, recipe, data, folder=tmp_path, seed=seed, progress=False)
        return made, model.state_dict()

    return run


def quantized(pipe, data, name, *overrides):
    model = copy.deepcopy(pipe.unet)
    quantize(model, load_recipe(name, [*pipelines.small_budget(name), *overrides]), data, progress=False)
    return model.state_dict()


def test_variants_share_the_passes_they_have_in_common(pipe, data, computed):
    assert computed("brecq-w4a8")[0] == [CalibrateRanges, ReconstructRounding]
    made, shared = computed("accuquant-w4a8")
    assert not made
    alone = quantized(pipe, data, "accuquant-w4a8")
    assert all(torch.equal(value, shared[key]) for key, value in alone.items())


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("brecq-w4a6", "passes.2.iterations=2"),
        ("brecq-w4a32", "passes.2.iterations=2"),
        ("brecq-w4a8", "layers.0.sets=3"),
        ("brecq-w4a8", "passes.0.samples=6"),
        ("brecq-w4a8", "passes.0.activations=minmax"),
    ],
)
def test_learned_rounding_is_shared_by_recipes_that_differ_in_activations(name, override, pipe, data, computed):
    computed("brecq-w4a8")
    made, shared = computed(name, override)
    assert made == [CalibrateRanges]
    alone = quantized(pipe, data, name, override)
    assert alone.keys() == shared.keys() and all(torch.equal(value, shared[key]) for key, value in alone.items())


@pytest.mark.parametrize(
    ("name", "override", "seed"),
    [
        ("brecq-w3a8", "layers.0.sets=1", 0),
        ("brecq-w4a8", "layers.0.weight_symmetric=false", 0),
        ("brecq-w4a8", "passes.0.candidates=5", 0),
        ("brecq-w4a8", "passes.1.rate=0.1", 0),
        ("brecq-w4a8", "layers.+={match: '@first', weight_bits: float}", 0),
        ("brecq-w4a8", "layers.0.sets=1", 1),
    ],
)
def test_learned_rounding_is_not_shared_where_it_would_differ(name, override, seed, computed):
    computed("brecq-w4a8")
    assert ReconstructRounding in computed(name, override, seed=seed)[0]


def test_rounding_after_scaling_that_looked_at_activations_is_not_shared(computed):
    computed("dmq-w4a8")
    assert ReconstructRounding in computed("dmq-w4a6")[0]


def test_rounding_killed_in_a_recipe_goes_on_in_another_of_other_activations(pipe, data, computed, monkeypatch):
    units, own = [], ReconstructRounding._fit_unit

    def killed(self, unit, *rest):
        units.append(unit.name)
        if len(units) == 3:
            raise KeyboardInterrupt
        return own(self, unit, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ReconstructRounding, "_fit_unit", killed)
        computed("brecq-w4a8")
    fitted = []
    monkeypatch.setattr(
        ReconstructRounding, "_fit_unit", lambda self, unit, *rest: fitted.append(unit.name) or own(self, unit, *rest)
    )
    _, resumed = computed("brecq-w4a6", "layers.0.sets=3")
    assert not set(units[:2]) & set(fitted)
    alone = quantized(pipe, data, "brecq-w4a6", "layers.0.sets=3")
    assert all(torch.equal(value, resumed[key]) for key, value in alone.items())


def test_finished_passes_are_put_back_one_after_the_other(pipe, data, tmp_path):
    recipe = load_recipe("brecq-w4a8", pipelines.small_budget("brecq-w4a8"))
    short = recipe.model_copy(update={"passes": recipe.passes[:2]})
    quantize(copy.deepcopy(pipe.unet), short, data, folder=tmp_path, progress=False)
    states = []
    for folder in (tmp_path, None):
        model = copy.deepcopy(pipe.unet)
        rows = plan(model, recipe.layers)
        prepare(model, rows, data.timesteps)
        if folder is not None:
            restore_passes(model, folder, pass_names(short, rows, 0, data))
        else:
            with fit.run(show=False) as run:
                for index, step in enumerate(short.built_passes()):
                    step.apply(model, data, torch.Generator().manual_seed(index), run)
        states.append(quantizer_state(model))
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_without_data_the_pipeline_is_recorded_first(tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "Calibration", functools.partial(dq.Calibration, samples=4, steps=2, batch_size=4))
    recipe = load_recipe("minmax-w4a8", ["passes.0.samples=8"])
    pipe, twin = pipelines.micro(), pipelines.micro()
    data = dq.record(twin, dq.Calibration(samples=4, steps=2, batch_size=4, seed=3), progress=False)
    quantize(twin, recipe, data, seed=3, progress=False)
    report = quantize(pipe, recipe, seed=3, folder=tmp_path, progress=False)
    assert is_frozen(pipe.unet) and report.calibration["calibration"]["samples"] == 4
    theirs = twin.unet.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in pipe.unet.state_dict().items())
    assert (tmp_path / "recording").is_dir()
    with pytest.raises(CalibrationError, match="UNet2DModel: is no pipeline, so it cannot be recorded; give data, or the pipeline"):
        quantize(pipelines.micro().unet, recipe)
    assert quantization.DEFAULT_RECIPE == "brecq-w4a8"
