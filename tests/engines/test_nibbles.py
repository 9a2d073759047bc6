"""Weights of 4 bits packed in memory: unpacked they are the kernel's bytes, whoever else uses the scratch."""

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from diffquant.core.clock import StepClock
from diffquant.core.layers import QuantizedConv2d, QuantizedLinear, make_quantizable
from diffquant.engines.int8 import engine as int8
from diffquant.engines.int8 import nibbles
from diffquant.engines.int8.nibbles import Nibbles
from layer_cases import spec

pytestmark = pytest.mark.skipif(bool(int8.Int8.unsupported()) or not nibbles.available(), reason="no integer kernels")

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(96, 80), (200, 96)),
    "linear of odd sizes": (lambda: nn.Linear(77, 33), (200, 77)),
    "conv": (lambda: nn.Conv2d(32, 48, 3, padding=1), (2, 32, 12, 12)),
    "strided conv": (lambda: nn.Conv2d(32, 48, 3, stride=2, padding=1), (2, 32, 12, 12)),
    "grouped conv": (lambda: nn.Conv2d(32, 64, 3, groups=2), (2, 32, 12, 12)),
    "pointwise conv": (lambda: nn.Conv2d(32, 48, 1), (2, 32, 12, 12)),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers are packed too, and cut into parts."""
    monkeypatch.setattr(nibbles, "LEAST", 1)
    monkeypatch.setattr(nibbles, "PART", 1 << 12)
    monkeypatch.setattr(nibbles, "OUTPUTS", 16)


def frozen(name: str, bits: int, seed: int = 0) -> QuantizedLinear | QuantizedConv2d:
    torch.manual_seed(seed)
    layer = LAYERS[name][0]().requires_grad_(False)
    make_quantizable(layer, spec(bits, 8), StepClock())
    assert isinstance(layer, (QuantizedLinear, QuantizedConv2d))
    weight, given = layer.weight_quantizer, layer.input_quantizer
    assert weight is not None and given is not None
    weight.codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), layer.weight.shape, dtype=torch.int8)
    layer.weight = None  # type: ignore[assignment]
    weight.scale.uniform_(0.01, 0.02)
    given.scale.fill_(0.02)
    given.zero_point.fill_(117)
    weight.enabled = given.enabled = True
    return layer


def held(layer: nn.Module) -> list[nullcontext[Tensor] | Nibbles]:
    return [part.weight for half in layer.product.sets[0][0].matrices[0].halves for part in half]  # type: ignore[union-attr, index]


def both(name: str, bits: int, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A layer lowered with its weight packed, and the same with it as the kernel reads it."""
    packed, plain = frozen(name, bits, seed), frozen(name, bits, seed)
    assert int8.lower_layer(packed) == ""
    with monkeypatch.context() as context:
        context.setattr(nibbles, "packable", lambda integers: False)
        assert int8.lower_layer(plain) == ""
    return packed, plain


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_a_packed_weight_multiplies_as_the_plain_one(name: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, plain = both(name, bits, monkeypatch)
    assert all(isinstance(each, Nibbles) for each in held(packed)) and isinstance(held(plain)[0], nullcontext)
    assert len(held(packed)) > 1 or name in ("linear of odd sizes", "grouped conv", "pointwise conv")
    x = torch.randn(LAYERS[name][1])
    assert torch.equal(packed(x), plain(x))
    assert torch.equal(packed.weight_quantizer.codes, frozen(name, bits).weight_quantizer.codes)  # type: ignore[union-attr]
    assert torch.equal(copy.deepcopy(packed)(x), plain(x))


def test_wider_weights_are_not_packed() -> None:
    layer = frozen("linear", 5)
    int8.lower_layer(layer)
    assert all(isinstance(each, nullcontext) for each in held(layer))


def test_layers_of_one_layout_share_a_scratch_and_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [both("conv", 4, monkeypatch, seed) for seed in range(4)]
    scratches = {id(each.scratch) for packed, _ in pairs for each in held(packed) if isinstance(each, Nibbles)}
    assert len(scratches) == 1
    x = torch.randn(LAYERS["conv"][1])
    expected = [plain(x) for _, plain in pairs]
    wrong: list[int] = []

    def calls(first: int) -> None:
        for index in range(60):
            at = (first + index) % len(pairs)
            if not torch.equal(pairs[at][0](x), expected[at]):
                wrong.append(at)

    threads = [threading.Thread(target=calls, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_call_of_few_rows_unpacks_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, plain = both("linear", 4, monkeypatch)
    x = torch.randn(3, 96)
    assert torch.equal(packed(x), plain(x))
    assert all(isinstance(each, nullcontext) for each in held(packed))
    assert torch.equal(packed.weight_quantizer.codes, plain.weight_quantizer.codes)  # type: ignore[union-attr]


def test_a_model_laid_out_in_inference_mode_computes_outside_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        packed, plain = both("linear", 4, monkeypatch)
    x = torch.randn(200, 96)
    with torch.no_grad():
        assert torch.equal(packed(x), plain(x))


def test_bytes_that_do_not_come_back_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(self: Nibbles) -> Tensor:
        self.scratch.lock.acquire()
        self.scratch.bytes[0] ^= 1
        return self.scratch.weight

    monkeypatch.setattr(Nibbles, "__enter__", spoilt)
    with pytest.raises(RuntimeError, match="cannot be unpacked as it was"):
        int8.lower_layer(frozen("linear", 4))
