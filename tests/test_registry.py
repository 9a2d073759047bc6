"""Names are taken once, and what other packages name as entry points is known to commands."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

import diffquant as dq
from diffquant import registry
from diffquant.checkpoint.targets.base import Target
from diffquant.engines.base import Engine
from diffquant.errors import DiffquantError

MODULE = """
from typing import Any, final
import diffquant as dq
from diffquant.calibration.timing import Work

@final
class Nothing(dq.Pass):
    def apply(self, model: Any, data: Any, generator: Any, run: Any) -> dict[str, Any]:
        return {}

    def work(self, blocks: int) -> Work:
        return Work()
"""
RECIPE = """
name: nothing
summary: A pass of another package.
layers: [{match: "@all", weight_bits: weights, input_bits: activations}]
passes: [{pass: CalibrateRanges}, {pass: Nothing}]
"""


@pytest.mark.parametrize(("base", "name"), [(dq.Pass, "CalibrateRanges"), (Engine, "simulate"), (Target, "onnx")])
def test_a_name_is_taken_once(base, name):
    from diffquant.checkpoint.targets.base import target_names
    from diffquant.engines import engine_names
    from diffquant.methods.base import registered

    assert name in {*registered(), *engine_names(), *target_names()}
    own = name if base is dq.Pass else "Mine"
    promised = {each: lambda self: None for each in base.__abstractmethods__}
    with pytest.raises(DiffquantError, match=rf"'{name}': is the name of diffquant\..* and .*\.{own}; one class is allowed"):
        type(base)(own, (base,), {"name": name, "__module__": __name__, **promised} if base is not dq.Pass else promised)


def test_a_pass_of_an_installed_package_is_known_to_the_command(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[diffquant]\nmine = mine\n")
    (tmp_path / "nothing.yaml").write_text(RECIPE)
    code = f"import diffquant as dq; print(dq.load_recipe({str(tmp_path / 'nothing.yaml')!r}).passes[-1])"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "{'pass': 'Nothing'}", done.stderr


def test_what_cannot_be_imported_is_said_in_one_line(monkeypatch):
    entry = EntryPoint("mine", "no_such_module", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    registry.load_others.cache_clear()
    try:
        with pytest.raises(
            DiffquantError, match="a package: 'no_such_module' is not imported .*; repair it or uninstall a package"
        ):
            registry.load("diffquant.methods")
    finally:
        registry.load_others.cache_clear()
