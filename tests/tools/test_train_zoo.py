"""The command line of training, and that what it builds is what is shipped."""

import json
import sys

import pytest

from diffquant import zoo
from diffquant.zoo.models import PIPELINES
from tools.train_zoo import __main__ as command
from tools.train_zoo import latent, pixel


def run(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["train_zoo", *arguments])
        command.main()
    return int(ended.value.code or 0)


def test_an_unknown_name_is_one_line_before_anything_is_rendered(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "render_letters", lambda **_: pytest.fail("rendered before the name was checked"))
    assert run("glyph", "--out", str(tmp_path / "out")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: zoo: 'glyph' is unknown; allowed are glyph-ddim,") and line.endswith("glyph-vae")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "file"), [("glyph-classifier", "letters.safetensors"), ("glyph-ddim", "model_index.json")])
def test_a_step_of_training_writes_the_model_and_its_figures(name, file, small_letters, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "render_letters", lambda size: small_letters)
    assert run(name, "--out", str(tmp_path), "--steps", "1", "--seed", "3") == 0
    first, *figures = capsys.readouterr().out.splitlines()
    assert first == f"520 letters of 20 fonts, sha256 {small_letters.digest()[:16]}"
    printed = json.loads("".join(figures))
    assert (printed["model"], printed["steps"], printed["seed"]) == (name, 1, 3)
    assert (tmp_path / name / file).is_file()


def test_the_shipped_weights_are_those_of_these_architectures():
    made = {
        "glyph-ddim": {"unet": pixel.glyph_unet()},
        "glyph-sd": latent.glyph_sd(latent.glyph_vae()).components,
        "glyph-dit": latent.glyph_dit(latent.glyph_vae()).components,
    }
    assert set(made) == set(PIPELINES)
    for name, parts in made.items():
        shipped = zoo.load(name).components
        for part in {"unet", "transformer", "vae", "text_encoder"} & set(parts):
            shapes = {key: tensor.shape for key, tensor in parts[part].state_dict().items()}
            assert {key: tensor.shape for key, tensor in shipped[part].state_dict().items()} == shapes, f"{name}: {part}"
