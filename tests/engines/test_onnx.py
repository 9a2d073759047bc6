"""ONNX files against the simulation and the packed codes: QDQ operands, integer kernels for matrix products, zero points of 0."""

import copy
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pipelines
from diffquant.checkpoint.targets import onnx as targets
from diffquant.core.model import quantized_layers
from diffquant.core.spec import LayerRule
from diffquant.engines import graph as graphs
from diffquant.engines import onnx_graph
from diffquant.errors import CheckpointError, SpecError
from layer_cases import CASES, HALF_FLOAT, OF_SETS, TIMESTEPS, Layers, assert_equal_but_for_edges, make_layers, sample

onnx = pytest.importorskip("onnx")  # not onnxruntime, which is to be imported without its telemetry

TARGET = targets.Onnx()
EXAMPLE = {"sample": sample(), "timestep": 0}


def saved(graph: Any, folder: Path) -> targets.Compiled:
    TARGET.save(graph, folder)
    return TARGET.load(folder)


def session_outputs(compiled: targets.Compiled, *given: Tensor) -> list[Tensor]:
    feed = {each.name: tensor.numpy() for each, tensor in zip(compiled.session.get_inputs(), given, strict=True)}
    return [torch.from_numpy(each) for each in compiled.session.run(None, feed)]


def operands(graph: Any) -> dict[str, dict[str, list[Any]]]:
    """By the name of a product in the graph, what its DequantizeLinears read: codes where they are constants, zero points."""
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in graph.graph.initializer}
    made = {output: node for node in graph.graph.node for output in node.output}
    found: dict[str, dict[str, list[Any]]] = {}
    for node in (each for each in graph.graph.node if each.op_type in ("Conv", "MatMul", "Gemm")):
        seen = found.setdefault(node.name, {"codes": [], "zero_points": []})
        for name in node.input[:2]:
            source = made.get(name)
            while source is not None and source.op_type in ("Transpose", "Identity"):
                source = made.get(source.input[0])
            if source is not None and source.op_type == "DequantizeLinear":
                seen["zero_points"].append(constants[source.input[2]])
                if source.input[0] in constants:
                    seen["codes"].append(constants[source.input[0]])
    return found


# ---- layer by layer


@pytest.fixture(scope="module")
def layers() -> Layers:
    return make_layers(list(CASES.values()))


@pytest.fixture(scope="module")
def graph(layers: Layers) -> Any:
    return TARGET.build(layers, EXAMPLE)


@pytest.fixture(scope="module")
def compiled(graph: Any, tmp_path_factory: pytest.TempPathFactory) -> targets.Compiled:
    return saved(graph, tmp_path_factory.mktemp("onnx") / "layers")


@pytest.fixture(scope="module", params=[2, 3])
def results(request: pytest.FixtureRequest, layers: Layers, compiled: Any) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor]]:
    """Input, simulated outputs and those of ONNX Runtime, for the batch of the example and another."""
    x = sample(request.param, seed=1)
    with torch.no_grad():
        expected = layers(x, 0)
    return x, expected, session_outputs(compiled, x)


@pytest.mark.parametrize("case", CASES)
def test_a_layer_equals_the_simulation(case: str, layers: Layers, results: tuple[Tensor, tuple[Tensor, ...], list[Tensor]]) -> None:
    index = list(CASES).index(case)
    x, expected, found = results
    x = x if case.split()[0] != "linear" else x.flatten(2).transpose(1, 2)
    assert_equal_but_for_edges(layers.layers[index], x, expected[index], found[index])


def test_linear_layers_compute_with_integers_and_convolutions_do_not(compiled: targets.Compiled) -> None:
    found = graphs.integer_layers(TARGET.products(compiled))
    for index, case in enumerate(CASES):
        assert found[f"layers.{index}"] == (case.startswith("linear") and case not in HALF_FLOAT), case


def test_integer_weights_are_those_of_the_simulation(layers: Layers, graph: Any) -> None:
    """The digits of a layer add up to code minus zero point; a symmetric weight is its codes themselves."""
    found = operands(graph)
    for index, case in enumerate(CASES):
        layer: Any = layers.layers[index]
        if case in HALF_FLOAT or layer.input_quantizer.shift is not None or layer.weight_quantizer.splits:
            continue
        quantizer = layer.weight_quantizer
        weights = [one for name, each in found.items() if name.startswith(f"/layers.{index}/") for one in each["codes"]]
        integers = [each.astype(np.int32) - (128 if each.dtype == np.uint8 else 0) for each in weights]
        assert all(each.dtype == np.uint8 or np.abs(each).max() <= 64 for each in weights)  # unsigned where pairs may saturate
        zero_point = quantizer.zero_point.view(-1, *[1] * (quantizer.codes.dim() - 1)).int().numpy()
        total = sum(each * 256**digit for digit, each in enumerate(integers))
        assert (total == quantizer.codes.int().numpy() - zero_point).all(), case
        if quantizer.spec.symmetric:
            assert len(weights) == 1 and (integers[0] == quantizer.codes.numpy()).all(), case


# ---- parameter sets


@pytest.fixture(scope="module")
def layers_with_sets() -> Layers:
    return make_layers(list(OF_SETS.values()), TIMESTEPS)


@torch.no_grad()
def test_parameter_sets_are_an_input(layers_with_sets: Layers, tmp_path: Path) -> None:
    model = layers_with_sets
    graph = TARGET.build(model, EXAMPLE)
    said = {each.key: each.value for each in graph.metadata_props}
    assert said == {"diffquant/timesteps": "900.0,500.0,100.0", "diffquant/pair": str(TARGET.pair(graph))}
    compiled = saved(graph, tmp_path / "sets")
    assert [each.name for each in compiled.session.get_inputs()] == ["sample", "interval"]  # no layer reads the timestep
    assert [integer for name, integer in TARGET.products(compiled) if name == "layers.1"] == [True]
    x, intervals = sample(3, seed=1), torch.tensor([2, 0, 1])
    for interval in (torch.tensor([1]), torch.tensor([2]), intervals):
        model.diffquant.clock.set_interval(interval)
        expected = model.forward(x, torch.zeros(1))  # without the hook that would set the interval
        found = session_outputs(compiled, x, interval)
        for index, layer in enumerate(model.layers):
            given = x if isinstance(layer, nn.Conv2d) else x.flatten(2).transpose(1, 2)
            assert_equal_but_for_edges(layer, given, expected[index], found[index])


def test_sets_that_differ_in_their_zero_points_are_refused(layers_with_sets: Layers) -> None:
    model = copy.deepcopy(layers_with_sets)
    model.layers[2].input_quantizer.zero_point[1] += 1
    with pytest.raises(SpecError) as error:
        TARGET.build(model, EXAMPLE)
    assert str(error.value) == (
        "layers.2.input_quantizer: its 3 parameter sets have different zero points; ONNX Runtime's integer kernels hold one for "
        "all; fit the sets with a shared zero point (or symmetric) and without shifts, or use engine 'int8' or 'simulate'"
    )


# ---- whole models

SYMMETRIC = (LayerRule(match="@all", input_symmetric=True), LayerRule(match="@attention", input_symmetric=True, softmax_bits=7))


def unet_call() -> dict[str, Any]:
    return {"sample": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), "timestep": 500}


@pytest.mark.parametrize(("rules", "symmetric"), [(SYMMETRIC, True), (SYMMETRIC[:1], False)])
def test_symmetric_quantizers_have_zero_points_of_zero(rules: Any, symmetric: bool) -> None:
    model = pipelines.freeze_by_hand(pipelines.micro().unet, rules=rules)
    found = operands(TARGET.build(model, unet_call()))
    products = len(list(quantized_layers(model))) + 2
    assert len(found) == products and all(len(each["zero_points"]) == 2 for each in found.values())
    zero_points = [value for each in found.values() for value in each["zero_points"]]
    assert all(value.dtype == np.int8 and not value.any() for value in zero_points) is graphs.signed(model) is symmetric


@torch.no_grad()
def test_a_unet_and_its_codes(tmp_path: Path) -> None:
    model, call = pipelines.freeze_by_hand(pipelines.micro().unet, sets=3, rules=SYMMETRIC), unet_call()
    expected = model(**call).sample
    graph = TARGET.build(model, call)
    compiled = saved(graph, tmp_path / "unet")
    (output,) = TARGET.run(compiled, model, call)
    assert (output - expected).norm() < 1e-5 * expected.norm()  # no code of this seed is on a rounding edge
    assert not any("forward" in vars(module) for module in model.modules())
    layers = dict(quantized_layers(model))
    codes_of = {node.rpartition("/")[0][1:].replace("/", "."): each["codes"] for node, each in operands(graph).items()}
    counted = graphs.integer_layers(TARGET.products(compiled))
    assert set(counted) == {*layers, "down_blocks.0.attentions.0"}
    assert {name for name, integer in counted.items() if not integer} == {
        name for name, layer in layers.items() if isinstance(layer, nn.Conv2d)
    }
    for name, layer in layers.items():
        (codes,) = codes_of[name]
        assert (codes == layer.weight_quantizer.codes.numpy()).all()


# ---- files and errors


def test_large_weights_are_stored_beside_the_graph(
    graph: Any, compiled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "EXTERNAL", 1 << 10)
    again = saved(copy.deepcopy(graph), tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.onnx", "model.onnx.data"}
    x = sample(3)
    pairs = zip(session_outputs(compiled, x), session_outputs(again, x), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("no graph")
    with pytest.raises(CheckpointError, match="model.onnx: cannot be read .*; export it again"):
        TARGET.load(tmp_path)


@pytest.mark.parametrize("name", ["onnx", "onnxruntime"])
def test_the_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch, layers_with_sets: Layers) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CheckpointError) as error:
        TARGET.build(layers_with_sets, EXAMPLE)
    assert str(error.value) == f"ONNX: the package {name} is missing; pip install 'diffquant[onnx]'"


def test_the_runtime_sends_no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable counts when ONNX Runtime is first imported; the call where that was too early."""
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    told: list[str] = []
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(disable_telemetry_events=lambda: told.append("off")))  # type: ignore[arg-type]
    onnx_graph.runtime()
    assert told == ["off"]
