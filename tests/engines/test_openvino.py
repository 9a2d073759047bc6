"""OpenVINO's graph against the simulation: codes equal but for those on a rounding edge, integer kernels where they should be."""

import copy
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffquant as dq
import pipelines
from diffquant.checkpoint.targets.openvino import OpenVinoIr
from diffquant.core.attention import AttentionProducts, attach_products
from diffquant.core.clock import StepClock
from diffquant.core.model import quantized_layers, quantizers
from diffquant.core.spec import AttentionSpec, LayerRule, QuantSpec
from diffquant.engines import graph as graphs
from diffquant.engines import openvino as engine
from diffquant.engines import openvino_graph
from diffquant.engines.base import engine_of, install
from diffquant.engines.exactness import answer_of
from diffquant.engines.graph_call import Call
from diffquant.engines.graph_operands import operands_of
from diffquant.errors import CheckpointError, SpecError
from diffquant.host.denoiser import prepare
from diffquant.host.structure import plan
from layer_cases import (
    CASES,
    CHANNELS,
    HALF_FLOAT,
    OF_SETS,
    TIMESTEPS,
    Layers,
    assert_equal_but_for_edges,
    calibrate,
    make_layers,
    sample,
)

pytest.importorskip("openvino")


# where two 8-bit activations would saturate, attentions are computed in floating point
ATTENTION_IS_INTEGER = answer_of("openvino attention").largest() == 128


def sqnr(signal: Tensor, other: Tensor) -> float:
    return float(10 * torch.log10(signal.square().sum() / (signal - other).square().sum()))


# ---- layer by layer


@pytest.fixture(scope="module")
def layers() -> Layers:
    return make_layers(list(CASES.values()))


TARGET = OpenVinoIr()


@pytest.fixture(scope="module")
def graph(layers: Layers) -> Any:
    return TARGET.build(layers, {"sample": sample(), "timestep": 0})


@pytest.fixture(scope="module")
def compiled(graph: Any) -> Any:
    return openvino_graph.compile_graph(graph)


@pytest.fixture(scope="module", params=[2, 3])
def results(request: pytest.FixtureRequest, layers: Layers, compiled: Any) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor]]:
    """Input, simulated outputs and those of OpenVINO, for the batch of the example and another."""
    x = sample(request.param, seed=1)
    with torch.no_grad():
        expected = layers(x, 0)
    found = compiled([x.numpy(), torch.zeros(len(x), dtype=torch.long).numpy()])
    return x, expected, [torch.from_numpy(found[index]) for index in range(len(expected))]


@pytest.mark.parametrize("case", CASES)
def test_a_layer_equals_the_simulation(case: str, layers: Layers, results: tuple[Tensor, tuple[Tensor, ...], list[Tensor]]) -> None:
    index = list(CASES).index(case)
    x, expected, found = results
    x = x if case.split()[0] != "linear" else x.flatten(2).transpose(1, 2)
    assert_equal_but_for_edges(layers.layers[index], x, expected[index], found[index])


def test_every_layer_computes_with_integers(compiled: Any) -> None:
    found = graphs.integer_layers(TARGET.products(compiled))
    in_float = {case for index, case in enumerate(CASES) if not found[f"layers.{index}"]}
    assert in_float == {*HALF_FLOAT}


def pairs_of(graph: Any) -> list[int]:
    """For every product of a quantizer and an int8 constant, the largest sum of two products of their codes."""
    found = []
    for node in graph.get_ordered_ops():
        if node.get_type_name() not in ("MatMul", "Convolution", "GroupConvolution"):
            continue
        weight: Any = node.input_value(1).get_node()
        while weight.get_type_name() in ("Multiply", "Convert", "Reshape"):
            weight = weight.input_value(0).get_node()
        if weight.get_type_name() == "Constant" and weight.get_element_type().to_string() == "i8":
            found.append(2 * 255 * int(abs(weight.get_data().astype(int)).max()))
    return found


def test_no_pair_of_products_saturates_in_an_exact_graph(layers: Layers, graph: Any) -> None:
    """Read off the graph's constants, for the cases with codes of 8 bits; beside narrower ones more fits."""
    wide = make_layers([each for case, each in CASES.items() if "a8" in case or case.endswith(("smooth", "shift", "splits"))])
    exact, single = (TARGET.build(wide, {"sample": sample(), "timestep": 0}, form) for form in ("exact", "single"))
    assert len(pairs_of(exact)) > len(pairs_of(single)) > 20
    assert max(pairs_of(exact)) == TARGET.pair(exact) <= 32767 < max(pairs_of(single)) == TARGET.pair(single)
    assert TARGET.pair(graph) <= 32767


# ---- parameter sets


@pytest.fixture(scope="module")
def layers_with_sets() -> Layers:
    return make_layers(list(OF_SETS.values()), TIMESTEPS)


@torch.no_grad()
def test_parameter_sets_are_an_input_and_keep_the_integers(layers_with_sets: Layers) -> None:
    model = layers_with_sets
    graph = TARGET.build(model, {"sample": sample(), "timestep": 0})
    assert [each.any_name for each in graph.inputs] == ["sample", "timestep", "interval"]
    assert graph.get_rt_info(["diffquant", "timesteps"]).astype(str) == "900.0,500.0,100.0"
    compiled = openvino_graph.compile_graph(graph)
    # the linear layer's 8 bits are two digits, and those of each of two parts
    assert [integer for _, integer in TARGET.products(compiled)] == [True] * 7
    x, intervals = sample(3, seed=1), torch.tensor([2, 0, 1])
    for interval in (torch.tensor([1]), torch.tensor([2]), intervals):
        model.diffquant.clock.set_interval(interval)
        expected = model.forward(x, torch.zeros(1))  # without the hook that would set the interval
        found = compiled([x.numpy(), torch.zeros(3, dtype=torch.long).numpy(), interval.numpy()])
        for index, layer in enumerate(model.layers):
            given = x if isinstance(layer, nn.Conv2d) else x.flatten(2).transpose(1, 2)
            assert_equal_but_for_edges(layer, given, expected[index], torch.from_numpy(found[index]))


@pytest.mark.parametrize(("buffer", "what"), [("zero_point", "zero points"), ("shift", "shifts")])
def test_sets_that_differ_in_more_than_their_scales_are_refused(layers_with_sets: Layers, buffer: str, what: str) -> None:
    model = copy.deepcopy(layers_with_sets)
    getattr(model.layers[2].input_quantizer, buffer)[1] += 1
    with pytest.raises(SpecError) as error:
        install(model, engine.OpenVino())
    assert str(error.value) == (
        f"layers.2.input_quantizer: its 3 parameter sets have different {what}; OpenVINO's integer kernels hold one for all; fit "
        "the sets with a shared zero point (or symmetric) and without shifts, or use engine 'int8' or 'simulate'"
    )


# ---- whole models

EVERYWHERE = (
    LayerRule(match="@all", weight_bits=4, input_bits=8, sets=2, split_skips=True),
    LayerRule(match="@attention", input_bits=8, input_symmetric=True, softmax_bits=8, sets=2),
    LayerRule(match="@first", weight_bits="float", input_bits="float"),
    LayerRule(match="@embedding", weight_bits="float", input_bits="float"),
)


def frozen(
    model: Any, arguments: dict[str, Any], timesteps: Sequence[float] = TIMESTEPS, rules: Sequence[LayerRule] = EVERYWHERE
) -> Any:
    prepare(model, plan(model, rules), timesteps)
    calibrate(model, lambda: model(**arguments), widest=1.2)
    return model


@pytest.fixture(scope="module")
def unet() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(1)
    arguments = {"sample": torch.randn(2, 3, 8, 8), "timestep": 500}
    return frozen(pipelines.unet(), arguments), arguments


@torch.no_grad()
def compare(model: Any, arguments: dict[str, Any], full_precision: Any, name: str = "openvino") -> dict[str, bool]:
    """Codes on an edge flip and grow: the graph has to be closer to the simulation, by 10 dB, than that is to full precision."""
    expected, reference = model(**arguments).sample, full_precision(**arguments).sample
    dq.use_engine(model, name)
    assert engine_of(model) == name
    output = model(**arguments)
    ((compiled, *_),) = model.diffquant.engine.graphs.compiled.values()
    dq.use_engine(model, "simulate")
    assert type(output) is type(full_precision(**arguments))
    assert sqnr(expected, output.sample) > sqnr(reference, expected) + 10  # measured 18 dB and more
    assert torch.equal(model(**arguments).sample, expected)
    return graphs.integer_layers(TARGET.products(compiled))


def test_unet_and_its_pipeline(unet: tuple[Any, dict[str, Any]]) -> None:
    model, arguments = unet
    names = set(model.state_dict())
    found = compare(model, arguments, pipelines.unet())
    attentions = {name for name, module in model.named_modules() if hasattr(module, "attention_products")}
    assert len(attentions) == 4
    layers = {name for name, _ in quantized_layers(model)}
    assert {name for name, integer in found.items() if integer} == layers | (attentions if ATTENTION_IS_INTEGER else set())
    rows = install(model, engine.OpenVino())
    assert {row.name for row in rows} == attentions | layers
    assert not any(row.reason for row in rows)
    pipe = pipelines.ddim()
    pipe.register_modules(unet=model)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert images.shape == (2, 8, 8, 3) and len(model.diffquant.engine.graphs.compiled) == 1
    assert set(model.state_dict()) == names and not any("forward" in vars(module) for module in model.modules())
    twin = copy.deepcopy(model)
    assert twin.diffquant.engine.graphs is not model.diffquant.engine.graphs and not twin.diffquant.engine.graphs.compiled
    with torch.no_grad():
        outputs = model(**arguments, return_dict=False)
        for _, quantizer in quantizers(twin):
            quantizer.enabled = False
        with pytest.raises(SpecError, match="frozen layer: its float weight is gone"):
            twin(**arguments)
    assert isinstance(outputs, tuple) and outputs[0].shape == (2, 3, 8, 8)
    dq.use_engine(model, "simulate")
    dq.use_engine(model, "simulate")  # a second time changes nothing


# with the switch OpenVINO finds bfloat16 on the CPU, and no kernel for it
HAS_BFLOAT16 = not engine.OpenVinoBf16.unsupported() and "ONEDNN_MAX_CPU_ISA" not in os.environ


def test_bfloat16_is_refused_where_there_is_none(unet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipelines.ddim()
    pipe.register_modules(unet=copy.deepcopy(unet[0]))
    dq.save(pipe, tmp_path / "saved")
    monkeypatch.setattr(engine.OpenVinoBf16, "unsupported", lambda: "the CPU is old")
    with pytest.raises(CheckpointError, match="engine: 'openvino-bf16', but the CPU is old; use engine='openvino'"):
        dq.load(tmp_path / "saved", engine="openvino-bf16")
    dq.load(tmp_path / "saved", engine="openvino")


@pytest.mark.skipif(not HAS_BFLOAT16, reason="the CPU has no bfloat16")
def test_bfloat16_between_the_products(unet: tuple[Any, dict[str, Any]], tmp_path: Path) -> None:
    """The products are integers as before, and what lies between them is in bfloat16."""
    model, arguments = unet
    assert compare(model, arguments, pipelines.unet(), "openvino-bf16") == compare(model, arguments, pipelines.unet())
    pipe = pipelines.ddim()
    pipe.register_modules(unet=model)
    loaded = dq.load(dq.save(pipe, tmp_path / "saved"), engine="openvino-bf16").unet
    assert engine_of(loaded) == "openvino-bf16" == engine_of(copy.deepcopy(loaded))
    loaded(**arguments)
    ((compiled, *_),) = loaded.diffquant.engine.graphs.compiled.values()
    types = {str(output.get_element_type()) for each in compiled.get_runtime_model().get_ordered_ops() for output in each.outputs()}
    assert any("bfloat16" in each for each in types), types


def test_a_model_that_computes_with_int8(layers_with_sets: Layers) -> None:
    """Another engine may be installed; a conversion, which is meant to leave it as it is, refuses."""
    model = copy.deepcopy(layers_with_sets)
    dq.use_engine(model, "int8")
    x = sample()
    with pytest.raises(CheckpointError, match="computes with engine 'int8'; load it with engine='simulate' to convert it"):
        TARGET.build(model, {"sample": x, "timestep": 0})
    outputs = []
    for each in (model, layers_with_sets):
        install(each, engine.OpenVino())
        outputs.append(each(x, 0))
        dq.use_engine(each, "simulate")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*outputs, strict=True))


def test_dit() -> None:
    arguments = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([500, 500]), "class_labels": torch.arange(2)}
    found = compare(frozen(pipelines.dit().transformer, arguments, ()), arguments, pipelines.dit().transformer)
    # six linears and an attention in each of two blocks, and two linears at the end
    assert sum(found.values()) == (16 if ATTENTION_IS_INTEGER else 14)
    in_float = {name for name, integer in found.items() if not integer}
    assert {name for name in in_float if "emb" not in name and not name.endswith("norm1.linear")} == (
        set() if ATTENTION_IS_INTEGER else {f"transformer_blocks.{index}.attn1" for index in range(2)}
    )


def test_asymmetric_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products are those of integers too, but for that with the values where there are many keys."""
    rules = [*EVERYWHERE, LayerRule(match="@attention", input_symmetric=False)]
    arguments = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([500, 500]), "class_labels": torch.arange(2)}
    model = frozen(pipelines.dit().transformer, arguments, (), rules)
    steps = [step for module in model.modules() if isinstance(module, AttentionProducts) for step in operands_of(module).values()]
    assert sum(not step.signed for step in steps if step) == 8  # softmax is never signed
    assert sum(compare(model, arguments, pipelines.dit().transformer).values()) == (16 if ATTENTION_IS_INTEGER else 14)
    monkeypatch.setattr(graphs, "SUMMED_KEYS", 15)
    assert sum(compare(model, arguments, pipelines.dit().transformer).values()) == 14


def test_conditional_unet(tmp_path: Path) -> None:
    make = pipelines.stable_diffusion
    arguments = {"sample": torch.randn(2, 4, 8, 8), "timestep": 500, "encoder_hidden_states": torch.randn(2, 7, 16)}
    arguments["encoder_attention_mask"] = torch.arange(7) < torch.tensor([[7], [4]])
    model = frozen(make(tmp_path).unet, arguments)
    found = compare(model, arguments, make(tmp_path).unet)
    assert {name for name, _ in quantized_layers(model)} <= {name for name, integer in found.items() if integer}
    assert {name for name, integer in found.items() if not integer} == {
        name
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Conv2d) or (hasattr(module, "attention_products") and not ATTENTION_IS_INTEGER)
    }


# ---- files and errors


def test_ir_is_written_once_and_computes_the_same(graph: Any, compiled: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    TARGET.save(graph, folder)
    read = openvino_graph.package().Core().read_model(folder / TARGET.file)
    kinds = {each.get_element_type().to_string() for each in read.get_ops() if each.get_type_name() == "Constant"}
    assert "i8" in kinds and "f16" not in kinds
    inputs = [sample(3, seed=2).numpy(), torch.zeros(3, dtype=torch.long).numpy()]
    again = TARGET.load(folder)
    assert sorted(integer for _, integer in TARGET.products(again)) == sorted(integer for _, integer in TARGET.products(compiled))
    ours, theirs = compiled(inputs), again(inputs)
    assert all((ours[index] == theirs[index]).all() for index in range(len(CASES)))
    (folder / "openvino_model.xml").write_text("<net")
    with pytest.raises(CheckpointError, match="openvino_model.xml: cannot be read .*; export it again"):
        TARGET.load(folder)


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, layers_with_sets: Layers) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(CheckpointError) as error:
        install(layers_with_sets, engine.OpenVino())
    assert str(error.value) == "engine 'openvino': the package openvino is missing; pip install 'diffquant[openvino]'"


def test_models_that_are_refused(layers_with_sets: Layers) -> None:
    half = copy.deepcopy(layers_with_sets).to(torch.bfloat16)
    with pytest.raises(CheckpointError, match="Layers: has parameters of torch.bfloat16; OpenVINO graphs are made from float32"):
        install(half, engine.OpenVino())
    with pytest.raises(CheckpointError, match="UNet2DModel: its weights are not integer codes; quantize first"):
        engine.OpenVino().install(pipelines.unet())


def test_nothing_is_left_behind_by_a_conversion_that_fails(layers_with_sets: Layers) -> None:
    model = copy.deepcopy(layers_with_sets)
    with pytest.raises(RuntimeError):
        TARGET.build(model, {"sample": torch.randn(2, CHANNELS + 1, 6, 6), "timestep": 0})
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize(("bits", "zero_point", "summed"), [(6, 30, True), (8, 101, True), (8, 101, False), (8, 255, True)])
def test_attention_with_a_mask(monkeypatch: pytest.MonkeyPatch, bits: int, zero_point: int, summed: bool) -> None:
    monkeypatch.setattr(graphs, "SUMMED_KEYS", 5 if summed else 4)
    products = pipelines.dit().transformer.transformer_blocks[0].attn1
    attach_products(
        products, AttentionSpec(**dict.fromkeys(("query", "key", "value", "softmax"), QuantSpec(bits=bits))), StepClock()
    )
    module = products.attention_products
    for quantizer in module.children():
        quantizer.scale.fill_(6.4 / 2**bits if quantizer is not module.softmax else 1 / (2**bits - 1))
        quantizer.zero_point.fill_(zero_point if quantizer is not module.softmax else 0)
        quantizer.enabled = True
    trace = graphs.Trace(nn.Identity(), Call(make_layers([]), (sample(), 0), {}), openvino_graph.EXACT)
    operands = [torch.randn(2, 2, 5, 8) for _ in range(3)]
    for mask in (torch.rand(2, 1, 5, 5) > 0.3, torch.randn(2, 1, 5, 5)):
        mask[..., 0] = 1
        expected = module(*operands, attn_mask=mask)
        found = graphs._attention(trace, operands_of(module), *operands, attn_mask=mask)
        assert torch.allclose(found, expected, atol=1e-5)  # no code of this seed is on a rounding edge


def test_inputs_of_weights_that_alone_are_quantized_stay_as_they_are() -> None:
    """OpenVINO rounds them to 8 bits otherwise, on processors with VNNI."""
    torch.manual_seed(0)
    model = Layers([nn.Linear(64, 64), nn.Linear(64, 256)])
    prepare(model, plan(model, [LayerRule(match="@linear", weight_bits=8)]))
    x = torch.randn(1, 64, 4, 4)
    calibrate(model, lambda: model(x, 0))
    arguments = {"sample": x, "timestep": 0}
    graph = TARGET.build(model, arguments)
    assert graph.get_rt_info(["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]).astype(str) == "0"
    found = TARGET.run(openvino_graph.compile_graph(graph), model, arguments)
    for expected, output in zip(model(x, 0), found, strict=True):
        assert (output - expected).norm() <= 1e-5 * expected.norm()  # of float32; 8-bit inputs would make it 5e-3
