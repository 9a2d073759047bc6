"""What `diffquant info` says of this machine, and of machines that this one is not."""

import json

import pytest
import torch

import diffquant as dq
from diffquant import engines
from diffquant.cli import measuring
from diffquant.engines import base, exactness, openvino
from diffquant.engines import info as infos
from diffquant.engines.exactness import CODES, KERNELS, Answer
from diffquant.engines.int8 import engine as int8
from diffquant.errors import CheckpointError

NONE, PAIRS, ALL = (0,) * 7, (64, *(128,) * 6), (128,) * 7


def answers(monkeypatch: pytest.MonkeyPatch, exact: tuple[int, ...], speed: float, reason: str = "") -> None:
    """Every kernel gives this answer."""
    for module in (exactness, int8, infos, openvino):
        monkeypatch.setattr(module, "answer_of", lambda kernel: Answer(kernel, exact, speed, reason))


@pytest.mark.parametrize(
    ("exact", "speed", "reason", "name", "why"),
    [
        (ALL, 3.6, "", "int8", "exact, and up to 3.6 times as fast as float32 on one large product"),
        (PAIRS, 1.9, "", "int8", "exact, and up to 1.9 times as fast as float32 on one large product"),
        (ALL, 0.02, "", "simulate", "integer products of engine 'int8' take longer here than those of float32"),
        (NONE, 0.0, "", "simulate", "PyTorch's integer products are not exact on this machine"),
        (NONE, 0.0, "no qlinear_prepack", "simulate", "no qlinear_prepack"),
    ],
)
def test_the_default_is_what_the_machine_answers(
    exact: tuple[int, ...], speed: float, reason: str, name: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(base.VARIABLE, raising=False)
    answers(monkeypatch, exact, speed, reason)
    assert base.default() == (name, why) and base.requested().name == name
    found = dq.info()
    assert (found.default, found.why) == (name, why)
    runs = {engine.name: engine.runs for engine in found.engines}
    assert runs["int8"] is runs["openvino"] is (exact is not NONE) and runs["simulate"]


def test_an_engine_that_is_not_exact_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, NONE, 0.0)
    for name in ("int8", "openvino"):
        with pytest.raises(CheckpointError, match=f"engine: '{name}', but .* not exact.*; use engine='simulate'"):
            engines.check_engine(name)


def test_everything_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(base.VARIABLE, raising=False)
    measuring.info(as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert said["versions"]["torch"] == torch.__version__ and said["threads"] == torch.get_num_threads()
    assert [kernel["name"] for kernel in said["kernels"]] == list(KERNELS)
    assert all(set(kernel["largest_weight"]) == {str(last.bit_length()) for last in CODES} for kernel in said["kernels"])
    assert [engine["name"] for engine in said["engines"]] == engines.engine_names()
    measuring.info(as_json=False)
    text = capsys.readouterr().out
    assert f"default engine: {said['default']}" in text
    assert all(name in text for name in (*KERNELS, *engines.engine_names()))


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(base.VARIABLE, "simulate")
    found = dq.info()
    assert found.default == "simulate" and found.why == "the environment says DIFFQUANT_ENGINE=simulate"


def test_a_machine_of_another_kind(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is known of its processor, and no kernel runs."""
    answers(monkeypatch, NONE, 0.0, "no such operator")
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(infos.platform, "machine", lambda: "arm64")
    monkeypatch.setattr(infos.platform, "processor", lambda: "")
    measuring.info(as_json=False)
    text = capsys.readouterr().out
    assert "arm64" in text and "default engine: simulate (no such operator)" in text
