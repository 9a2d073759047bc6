"""LoRA adapters on a quantized pipeline: a branch beside the quantized layers, in floating point."""

import copy

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import diffquant as dq
from diffquant.core.layers import QuantizedLinear
from diffquant.engines.int8.engine import Int8
from diffquant.errors import CheckpointError, SpecError
from diffquant.host.structure import plan
from diffquant.recipe import load_recipe
from tests import pipelines

peft = pytest.importorskip("peft")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A frozen pipeline, and a folder with a LoRA adapter for it."""
    folder = tmp_path_factory.mktemp("lora")
    pipe = pipelines.stable_diffusion(folder / "tokenizer")
    donor = copy.deepcopy(pipe.unet)
    donor.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False))
    layers = peft.utils.get_peft_model_state_dict(donor)
    StableDiffusionPipeline.save_lora_weights(folder / "adapter", unet_lora_layers=layers)
    pipelines.freeze_by_hand(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    return pipe, folder / "adapter", donor


def sampled(pipe) -> np.ndarray:
    with torch.no_grad():
        pictures = pipe(["a", "b"], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    return np.asarray(pictures)


@pytest.mark.parametrize("engine", ["simulate", "int8"])
def test_an_adapter_is_a_branch_beside_quantized_layers(engine, made, tmp_path):
    if engine == "int8" and Int8.unsupported():
        pytest.skip(Int8.unsupported())
    pipe, adapter, _ = made
    dq.save(pipe, tmp_path / "out")
    pipe = dq.load(tmp_path / "out", engine=engine)
    pipe.set_progress_bar_config(disable=True)
    before = sampled(pipe)
    pipe.load_lora_weights(adapter)
    layer = pipe.unet.get_submodule(QUERY)
    base = layer.base_layer
    assert isinstance(base, QuantizedLinear) and base.float_weight is None
    x = torch.randn(2, 5, base.in_features)
    name = next(iter(layer.lora_A))
    with torch.no_grad():
        branch = layer.lora_B[name](layer.lora_A[name](x))
        torch.testing.assert_close(layer(x), base(x) + branch)
    assert branch.abs().max() > 0.01 and not np.array_equal(sampled(pipe), before)
    with pytest.raises(CheckpointError, match=f"{QUERY}.*: a LoRA adapter is loaded; unload it"):
        dq.save(pipe, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    pipe.unload_lora_weights()
    assert np.array_equal(sampled(pipe), before)
    dq.save(pipe, tmp_path / "again")


def test_a_model_with_an_adapter_is_not_quantized(made):
    """Its layers would be those of the adapter too."""
    with pytest.raises(SpecError, match=f"{QUERY}.*: a LoRA adapter is loaded; fuse it into the weights and then unload it"):
        plan(made[2], load_recipe("minmax-w8a8").layers)


def test_only_frozen_layers_have_integer_weights(made):
    assert not hasattr(QuantizedLinear(2, 2), "qweight")
    codes = made[0].unet.get_submodule(QUERY).qweight
    assert codes.dtype == torch.int8 and codes.shape == (16, 16)
