"""The README's Python runs, on a small pipeline and at a small budget; links and recipes it names exist."""

import re
from pathlib import Path

from diffquant.recipe import PASSES, shipped
from tests import pipelines

ROOT = Path(__file__).parents[1]


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    pipe = pipelines.ddim()
    pipe.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    for original, small in (
        ("path/or/hub-id", "model"),
        ("samples=64, steps=20", "samples=2, steps=2, batch_size=2"),
        ("brecq-w4a8", "mse-w4a8"),
        ("samples=1000", "protocol=dq.SamplingProtocol(samples=2, steps=3)"),
    ):
        assert original in code
        code = code.replace(original, small)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["result"].rows[1].name == "quantized"


def test_files_that_the_documents_link_to_exist():
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_recipe_and_pass_is_documented():
    readme, recipes = (ROOT / "README.md").read_text(), (ROOT / "docs" / "recipes.md").read_text()
    assert all(f"`{name}`" in readme for name in shipped())
    assert all(f"`{name}`" in recipes for name in PASSES)
