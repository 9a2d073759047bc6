"""Small models of every family, with random weights, through every target: written and checked, or refused in one line."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import diffquant as dq
import pipelines
from diffquant.checkpoint.targets.base import target, target_names
from diffquant.core.spec import LayerRule
from diffquant.errors import CheckpointError, DiffquantError
from diffquant.host.pipeline import Host

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # schedulers of diffusers
FAMILIES = ("micro", "stable_diffusion", "stable_diffusion_xl", "dit", "pixart", "stable_diffusion_3", "flux", "cogvideox")
SYMMETRIC = (
    LayerRule(match="@all", input_symmetric=True),
    LayerRule(match="@attention", input_symmetric=True, softmax_bits=7),
    # sines of thousands, of a time or guidance, differ by more than rounding between runtimes, and this model has random weights
    LayerRule(match="@embedding", input_bits="float"),
)
REFUSED = {  # by target and family: the line that says why
    ("comfyui", "micro"): "UNet2DModel: the original names of its tensors are not known; known are ",
    ("comfyui", "dit"): "DiTTransformer2DModel: the original names",
    ("comfyui", "pixart"): "PixArtTransformer2DModel: the original names",
    ("comfyui", "stable_diffusion_3"): "SD3Transformer2DModel: the original names",
    ("comfyui", "cogvideox"): "CogVideoXTransformer3DModel: the original names",
    ("gguf", "micro"): "export: diffusers reads no GGUF file of a UNet2DModel",
    ("gguf", "dit"): "export: diffusers reads no GGUF file of a DiTTransformer2DModel",
    ("gguf", "pixart"): "export: diffusers reads no GGUF file of a PixArtTransformer2DModel",
    ("gguf", "cogvideox"): "export: diffusers reads no GGUF file of a CogVideoXTransformer3DModel",
}


def quantized(family: str, folder: Path) -> Any:
    pipe = pipelines.build(family, folder)
    pipelines.freeze_by_hand(Host(pipe).denoiser, rules=SYMMETRIC)
    return pipe


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("to", target_names())
def test_a_family_is_written_and_checked_or_refused(family: str, to: str, tmp_path: Path) -> None:
    try:
        target(to).require()
    except CheckpointError as missing:
        pytest.skip(str(missing))
    (tmp_path / "made").mkdir()
    pipe = quantized(family, tmp_path / "made")
    kind, lossy = type(Host(pipe).denoiser), not (to == "openvino" or to == "onnx")
    try:
        report = dq.export(pipe, tmp_path / "out", to=to, lossy=lossy)
    except DiffquantError as error:
        assert "\n" not in str(error) and (to, family) in REFUSED, error
        assert str(error).startswith(REFUSED[to, family])
        assert not (tmp_path / "out").exists()
        return
    assert (to, family) not in REFUSED
    assert (tmp_path / "out" / report.file).exists() and 0 <= report.error < 1
    assert type(Host(pipe).denoiser) is kind and isinstance(Host(pipe).denoiser, nn.Module)
