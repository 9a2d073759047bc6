"""Packing against a reference that writes the stream bit by bit into one Python integer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffquant.checkpoint import packing
from diffquant.checkpoint.packing import pack, packed_size, unpack
from diffquant.errors import CheckpointError


def reference(codes: list[int], bits: int) -> bytes:
    stream = 0
    for index, code in enumerate(codes):
        stream |= (code % (1 << bits)) << (index * bits)
    return stream.to_bytes(-(-len(codes) * bits // 8), "little")


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


@settings(max_examples=100)
@given(st.data(), st.integers(2, 8), st.booleans())
def test_bytes_equal_the_reference_and_come_back(data: st.DataObject, bits: int, signed: bool) -> None:
    codes = data.draw(st.lists(st.integers(*code_range(bits, signed)), max_size=40))
    tensor = torch.tensor(codes, dtype=torch.int8 if signed else torch.uint8)
    packed = pack(tensor, bits)
    assert bytes(packed.tolist()) == reference(codes, bits)
    back = unpack(packed, tensor.shape, bits, signed)
    assert back.dtype == tensor.dtype and torch.equal(back, tensor)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_slices_do_not_show(monkeypatch: pytest.MonkeyPatch, bits: int, signed: bool) -> None:
    low, high = code_range(bits, signed)
    codes = torch.randint(low, high + 1, (5, 7, 3, 3), generator=torch.Generator().manual_seed(bits))
    codes = codes.to(torch.int8 if signed else torch.uint8)
    whole = pack(codes, bits)
    assert whole.numel() == packed_size(codes.numel(), bits) == -(-315 * bits // 8)
    monkeypatch.setattr(packing, "SLICE", 16)
    assert torch.equal(pack(codes, bits), whole)
    assert torch.equal(unpack(whole, codes.shape, bits, signed), codes)


def test_layout_is_fixed() -> None:
    """The bytes are a file format: 1, 2, 3 of 4 bits are 0x21 0x03, and -1, -8 are 0x8f."""
    assert pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]
    assert pack(torch.tensor([[-1], [-8]], dtype=torch.int8), 4).tolist() == [0x8F]
    assert pack(torch.tensor([-128, 127], dtype=torch.int8), 8).tolist() == [0x80, 0x7F]


def test_strided_codes_are_packed_in_their_order() -> None:
    codes = torch.arange(12, dtype=torch.uint8).view(3, 4).t()
    assert torch.equal(unpack(pack(codes, 4), (4, 3), 4, signed=False), codes)


@pytest.mark.parametrize(
    ("codes", "bits", "text"),
    [
        (torch.tensor([0, 8], dtype=torch.int8), 4, "codes: from 0 to 8; 4 bits hold -8 to 7"),
        (torch.tensor([0, 4], dtype=torch.uint8), 2, "codes: from 0 to 4; 2 bits hold 0 to 3"),
        (torch.tensor([0.5]), 4, "codes: torch.float32; only int8 (signed) and uint8 (unsigned) are packed"),
        (torch.tensor([0], dtype=torch.uint8), 9, "bits: 9; codes have 2 to 8 bits"),
    ],
)
def test_what_cannot_be_packed(codes: torch.Tensor, bits: int, text: str) -> None:
    with pytest.raises(CheckpointError) as error:
        pack(codes, bits)
    assert str(error.value) == text


def test_wrong_number_of_bytes() -> None:
    with pytest.raises(CheckpointError, match=r"packed codes: torch.uint8 \[4\]; 5 codes of 4 bits take 3 bytes"):
        unpack(torch.zeros(4, dtype=torch.uint8), (5, 1), 4, signed=True)


def test_bits_beyond_the_last_code() -> None:
    packed = pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4)
    packed[-1] |= 0x80
    with pytest.raises(CheckpointError, match="the unused bits of the last byte are not zero"):
        unpack(packed, (3,), 4, signed=False)
