"""Recipes: names, bits, overrides, errors before anything is computed; and `quantize` as a whole."""

import copy

import pytest
import torch

import diffquant as dq
from diffquant.core.spec import CalibrationError, RecipeError, SpecError
from diffquant.core.surgery import is_frozen, quantized_layers
from diffquant.methods.ranges import CalibrateRanges
from diffquant.methods.rounding import ReconstructRounding
from diffquant.quantization import quantize
from diffquant.recipe import load_recipe, shipped
from tests import pipelines


@pytest.fixture(scope="module")
def pipe():
    return pipelines.micro()


@pytest.fixture(scope="module")
def data(pipe):
    return dq.record(pipe, dq.Calibration(samples=4, steps=4, batch_size=4), progress=False)


@pytest.mark.parametrize("name", shipped())
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
        ("brec-w4a8", (), "recipe 'brec-w4a8': unknown; allowed are accuquant, adp-dm, brecq, .* did you mean \"brecq\""),
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
        ("brecq-w4a8", ("passes.0.pass=Magic",), r"passes\[0\].pass 'Magic': unknown; allowed are CalibrateRanges"),
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
    assert load_recipe(str(path)).steps()[0].samples == 20
    assert load_recipe(str(path), ["bits.weights=8", "bits.activations=8"]).steps()[0].samples == 30
    assert load_recipe(str(path), ["passes.0.samples=40"]).steps()[0].samples == 40


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


def test_a_recipe_that_does_not_start_with_ranges_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nsummary: x\nlayers: [{match: '@all', weight_bits: 4}]\npasses: [{pass: LearnScales}]\n")
    with pytest.raises(RecipeError, match=r"mine: passes\[0\] is LearnScales; before it must come CalibrateRanges"):
        load_recipe(str(path))
    path.write_text(path.read_text().replace("LearnScales", "CalibrateRanges}, {pass: SmoothQuant"))
    with pytest.raises(RecipeError, match=r"mine: ends with SmoothQuant; after it must come CalibrateRanges"):
        load_recipe(str(path))


@pytest.mark.filterwarnings("ignore:UNet2DModel. has a sampling-time correction:UserWarning")
@pytest.mark.parametrize("name", shipped())
def test_quantize_ends_frozen_and_says_what_it_did(name, pipe, data):
    model = copy.deepcopy(pipe.unet)
    report = quantize(model, load_recipe(f"{name}-w4a8", pipelines.small_budget(f"{name}-w4a8")), data, progress=False)
    assert is_frozen(model)
    assert [row["pass"] for row in report.passes] == [type(step).__name__ for step in load_recipe(f"{name}-w4a8").steps()]
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

        patch.setattr("diffquant.methods.rounding.LearnScales.apply", stop)
        quantize(killed, recipe, data, folder=tmp_path / "work", progress=False)
    report = quantize(resumed, recipe, data, folder=tmp_path / "work", progress=False)
    assert len(report.passes) == 3
    expected, found = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    assert not [path for path in (tmp_path / "work").iterdir() if path.is_dir()]  # nothing unfinished is left


def test_variants_share_the_passes_they_have_in_common(pipe, data, tmp_path, monkeypatch):
    def run(name, *overrides, seed=0):
        made = []
        real = {kind: kind.apply for kind in (CalibrateRanges, ReconstructRounding)}
        with monkeypatch.context() as patch:
            for kind, apply in real.items():
                patch.setattr(kind, "apply", lambda *arguments, apply=apply: made.append(1) or apply(*arguments))
            model = copy.deepcopy(pipe.unet)
            quantize(
                model,
                load_recipe(name, [*pipelines.small_budget(name), *overrides]),
                data,
                folder=tmp_path,
                seed=seed,
                progress=False,
            )
        return len(made), model

    assert run("brecq-w4a8")[0] == 2
    count, shared = run("accuquant-w4a8")
    assert count == 0
    alone = copy.deepcopy(pipe.unet)
    quantize(alone, load_recipe("accuquant-w4a8", pipelines.small_budget("accuquant-w4a8")), data, progress=False)
    assert all(torch.equal(value, shared.state_dict()[key]) for key, value in alone.state_dict().items())
    assert run("brecq-w4a8", "passes.1.rate=0.5")[0] == 1  # ranges are the same, rounding is not
    assert run("mse-w4a8")[0] == 0
    assert run("mse-w4a6")[0] == run("mse-w4a8", seed=1)[0] == 1


def test_refuses_other_data_bad_weights_and_a_second_time(pipe, data):
    recipe = load_recipe("minmax-w8a8", pipelines.small_budget("minmax-w8a8"))
    with pytest.raises(CalibrationError, match="model"):
        quantize(pipelines.micro(seed=1).unet, recipe, data, progress=False)
    broken = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        broken.conv_in.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(SpecError, match="conv_in.weight: the weight holds inf or nan"):
        quantize(broken, recipe, data, progress=False)
    model = copy.deepcopy(pipe.unet)
    quantize(model, recipe, data, progress=False)
    with pytest.raises((SpecError, CalibrationError)):
        quantize(model, recipe, data, progress=False)


def test_unmatched_pattern_is_refused_before_anything_runs(pipe, data, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nsummary: x\nlayers: [{match: '*.shortcut', weight_bits: 4}]\npasses: [{pass: CalibrateRanges, samples: 10}]\n"
    )
    model = copy.deepcopy(pipe.unet)
    with pytest.raises(
        SpecError, match=r'layers\[0\].match "\*.shortcut": matches no layer of UNet2DModel; nearest name ".*conv_shortcut"'
    ):
        quantize(model, str(path), data, progress=False)
    assert not hasattr(model, "step_clock")
