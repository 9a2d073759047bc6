"""The README's Python runs, on a small pipeline and at a small budget; links and recipes it names exist."""

import functools
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from diffusers import UNet2DModel
from safetensors.torch import save_file

from diffquant.cli import app
from diffquant.files import shipped
from diffquant.methods.base import registered
from diffquant.recipe import load_recipe
from diffquant.sampling.protocol_files import load_protocol
from tests import pipelines

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    pipe = pipelines.ddim()
    pipe.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    for original, small in (
        ("path/or/hub-id", "model"),
        ("dq.quantize(pipe)", 'dq.quantize(pipe, "mse-w4a8", dq.record(pipe, dq.Calibration(samples=2, steps=2, batch_size=2)))'),
        ("samples=1000", "protocol=dq.SamplingProtocol(samples=2, steps=3)"),
    ):
        assert original in code
        code = code.replace(original, small)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["result"].measurements[1].name == "quantized"


def test_files_that_the_documents_link_to_exist():
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_recipe_and_pass_is_documented():
    readme, recipes = (ROOT / "README.md").read_text(), (ROOT / "docs" / "recipes.md").read_text()
    assert all(f"`{name}`" in readme for name in shipped("recipes"))
    assert all(f"`{name}`" in recipes for name, kind in registered().items() if kind.__module__.startswith("diffquant."))


def commands() -> list[tuple[str, list[str]]]:
    """Every ``diffquant ...`` of the documents that gives arguments, with its page: lines of shell blocks, and inline code."""
    found = []
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`(diffquant [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        split = [shlex.split(line, comments=True) for line in lines if line.startswith("diffquant ")]
        found += [(page.name, words[1:]) for words in split if len(words) > 2]
    return found


def test_the_commands_of_the_documents_are_real(tmp_path, monkeypatch):
    """The actual parser takes them, every ``--set`` path is in its recipe, and every ``--protocol`` is one; nothing is run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captions.txt").write_text("a cat\n")
    seen = commands()
    assert len(seen) > 40 and {"reproduce.md", "README.md"} <= {page for page, _ in seen}
    for page, words in seen:
        place = f"{page}: diffquant {' '.join(words)}"
        group = typer.main.get_command(app)
        try:
            while hasattr(group, "commands"):
                name, *words = words
                group = group.commands[name]
            options = group.make_context(name, list(words)).params
        except Exception as error:  # of click, which typer may bring itself
            pytest.fail(f"{place}: {error!r}")
        if (recipe := options.get("recipe")) not in (None, "NAME"):
            assert load_recipe(recipe, options["set_"] or ()).built_passes(), place
        if options.get("protocol"):
            load_protocol(options["protocol"])


def test_no_command_has_more_than_nine_options():
    """But for how a model is loaded, which all that take one share."""
    for name, command in typer.main.get_command(app).commands.items():
        options = [one.name for one in getattr(command, "params", []) if one.param_type_name == "option"]
        assert len(set(options) - {"load"}) <= 9, name


def test_every_protocol_and_its_values_are_documented():
    text = (ROOT / "docs" / "reproduce.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z0-9-]+)` \|(.*)\|$", text, flags=re.MULTILINE))
    assert set(rows) == set(shipped("protocols"))
    for name, row in rows.items():
        cells, found = [cell.strip() for cell in row.split("|")], load_protocol([name])
        sampling, recorded = found.sampling, found.calibration
        shown = (str(sampling.steps), "" if sampling.guidance_scale is None else str(sampling.guidance_scale))
        assert sampling.sampler in cells[0].lower() and (cells[1], cells[3]) == shown
        assert cells[2] in ("", f"{sampling.eta:g}") and cells[4] == f"{sampling.samples:,}"
        assert cells[5] == f"{recorded.samples} trajectories of {recorded.steps} steps"


def test_old_names_of_attention_layers_load_from_a_folder_only(tmp_path):
    """What docs/reproduce.md says of diffusers' conversion scripts, which write such names."""
    model = pipelines.unet()
    old_names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for name, tensor in model.state_dict().items():
        old[functools.reduce(lambda text, new: text.replace(new, old_names[new]), old_names, name)] = tensor.clone()
    assert any(".query." in name for name in old)
    with pytest.raises(RuntimeError, match="Error.s. in loading state_dict"):
        model.load_state_dict(old)
    model.save_config(tmp_path)
    save_file(old, tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = UNet2DModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
