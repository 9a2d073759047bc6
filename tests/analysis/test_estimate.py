"""The plan before anything is computed: shares, file size, and a model left as it was."""

import copy

import pytest
import torch

import diffquant as dq
from diffquant.checkpoint.folder import file_size
from tests import pipelines


@pytest.mark.parametrize("kind", ["ddim", "dit", "stable_diffusion"])
def test_every_layer_has_a_row_and_a_share(kind, tmp_path):
    pipe = pipelines.stable_diffusion(tmp_path) if kind == "stable_diffusion" else getattr(pipelines, kind)()
    pipe.set_progress_bar_config(disable=True)
    inspection = dq.inspect(pipe, dq.load_recipe("brecq-w4a8"))
    assert sum(inspection.shares.values()) == pytest.approx(1.0)  # rounding of a float sum
    assert {row.name for row in inspection.layers} >= inspection.shares.keys()
    assert inspection.seconds > 0 and inspection.memory_bytes > inspection.float32_bytes


def test_shares_are_those_counted_by_hand():
    pipe = pipelines.micro()
    inspection = dq.inspect(pipe, dq.load_recipe("mse-w4a8"))
    shares = inspection.shares
    # 3 -> 8 channels and 8 -> 3 channels, 3x3, on the same 8x8 pixels; to_q works on as many tokens with 8 -> 8 channels, 1x1
    assert shares["conv_in"] == shares["conv_out"]
    assert shares["conv_in"] / shares["down_blocks.0.attentions.0.to_q"] == pytest.approx(3 * 8 * 9 / (8 * 8))


@pytest.mark.parametrize(
    ("name", "index", "steps"), [("q-diffusion-w3a8", 0, 2), ("dmq-w4a6", 1, 20)]
)  # the latter with as many parameter sets as are recorded by default
def test_the_predicted_file_is_the_written_one_but_for_its_header(name, index, steps, tmp_path):
    pipe = pipelines.ddim()
    recipe = dq.load_recipe(name, (f"passes.{index}.samples={2 * steps}", f"passes.{index}.candidates=4"))
    ranges = recipe.model_copy(update={"passes": (recipe.passes[index],)})
    predicted = dq.inspect(pipe, ranges)
    before = copy.deepcopy(pipe.unet.state_dict())
    assert not hasattr(pipe.unet, "diffquant")
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    data = dq.record(pipe, dq.Calibration(samples=2, steps=steps, batch_size=2), progress=False)
    dq.quantize(pipe, ranges, data, progress=False)
    dq.save(pipe, tmp_path / "out")
    tensors = len(pipe.unet.state_dict())
    header = file_size(tmp_path / "out") - predicted.file_bytes
    assert 0 < header < 250 * tensors  # a name, a dtype, a shape and two offsets each
