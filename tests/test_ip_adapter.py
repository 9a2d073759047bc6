"""An IP-Adapter: refused before anything is recorded, and loaded into a quantized pipeline, on every engine."""

from typing import Any

import pytest
import torch
from torch import Tensor

import diffquant as dq
import pipelines
from diffquant.engines.int8 import engine as int8
from diffquant.errors import SpecError

ENGINES = ["simulate", *([] if int8.Int8.unsupported() else ["int8", "openvino"])]


def load_adapter(unet: Any) -> None:
    """Random weights of an adapter that makes 4 tokens of a picture's embedding of 8 numbers."""
    width, generator = unet.config.cross_attention_dim, torch.Generator().manual_seed(1)
    projection = {"proj.weight": (4 * width, 8), "proj.bias": (4 * width,), "norm.weight": (width,), "norm.bias": (width,)}
    state: dict[str, Any] = {"image_proj": {name: torch.randn(shape, generator=generator) for name, shape in projection.items()}}
    state["ip_adapter"] = {}
    crossed = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    for number, name in enumerate(crossed):
        out = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for kind in "kv":
            weight = torch.randn(out, width, generator=generator) / 4
            state["ip_adapter"][f"{2 * number + 1}.to_{kind}_ip.weight"] = weight
    unet._load_ip_adapter_weights([state])


def called(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, text, picture = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 7, 16), (1, 1, 1, 8)))
    added = {"image_embeds": [picture[0]]} if unet.encoder_hid_proj is not None else {}
    with torch.no_grad():
        output: Tensor = unet(x, 500, encoder_hidden_states=text, added_cond_kwargs=added).sample
    return output


def test_it_is_refused_before_anything_is_recorded(tmp_path, monkeypatch):
    pipe = pipelines.stable_diffusion(tmp_path)
    load_adapter(pipe.unet)
    monkeypatch.setattr(type(pipe), "__call__", lambda *args, **kwargs: pytest.fail("it was recorded"))
    with pytest.raises(SpecError, match=r"attn2.processor: an IP-Adapter is loaded, .* unload it \(unload_ip_adapter\), quantize"):
        dq.quantize(pipe, "minmax-w8a8")


@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_loaded_into_a_quantized_model(engine, tmp_path):
    unet = pipelines.freeze_by_hand(pipelines.stable_diffusion(tmp_path).unet)
    expected: list[Tensor] = []
    for each in ("simulate", engine):
        dq.use_engine(unet, each)
        plain = called(unet)
        load_adapter(unet)
        expected.append(called(unet))
        assert not torch.equal(plain, expected[-1])
        unet.encoder_hid_proj, unet.config.encoder_hid_dim_type = None, None
        unet.set_default_attn_processor()
    assert (expected[1] - expected[0]).norm() < 0.1 * expected[0].norm()  # codes on rounding edges
