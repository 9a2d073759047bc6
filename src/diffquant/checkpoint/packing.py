"""What a file holds of a frozen model, as pure functions: codes to bytes and back, the stored tensors, what their values may be.

Tensors have the names and shapes of the module's `state_dict`, with three exceptions: the codes of a weight are packed, flat uint8,
at their bits; shifts are packed at 3 bits; zero points are uint8, or left out where symmetric quantization makes them zero.

Packing: a tensor's codes follow each other in one stream of bits, little-endian: the first code takes the lowest bits of the first
byte. Signed codes are in two's complement. Nothing is padded but the last byte, with zeros: `count` codes take
``ceil(count * bits / 8)`` bytes. Eight codes make one 64-bit word, of which the first `bits` bytes are kept; that is how it is
computed, a slice of the tensor at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

from diffquant.core.spec import MAX_BITS, MIN_BITS, QuantSpec
from diffquant.errors import CheckpointError

SHIFT_BITS = 3  # shifts are 0 to 7
SLICE = 1 << 20  # codes handled at once, a multiple of 8: some 30 MB of intermediate values


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes take."""
    return (count * bits + 7) // 8


def pack(codes: Shaped[Tensor, "*shape"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Bytes of `codes`: int8 for signed codes in [-2^(bits-1), 2^(bits-1) - 1], uint8 for unsigned ones in [0, 2^bits - 1].

    Raises `CheckpointError` for another dtype, or codes outside the range.
    """
    _check_bits(bits)
    if codes.dtype not in (torch.int8, torch.uint8):
        raise CheckpointError(f"codes: {codes.dtype}; only int8 (signed) and uint8 (unsigned) are packed")
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if codes.dtype == torch.int8 else (0, (1 << bits) - 1)
    flat = codes.reshape(-1)
    packed = torch.empty(packed_size(flat.numel(), bits), dtype=torch.uint8, device=codes.device)
    code_shifts, byte_shifts = _shifts(bits, codes.device)
    for start in range(0, flat.numel(), SLICE):
        part = flat[start : start + SLICE]
        smallest, largest = (int(value) for value in part.aminmax())
        if smallest < low or largest > high:
            raise CheckpointError(f"codes: from {smallest} to {largest}; {bits} bits hold {low} to {high}")
        words = torch.zeros(math.ceil(part.numel() / 8) * 8, dtype=torch.int64, device=codes.device)
        words[: part.numel()] = part
        words = ((words & ((1 << bits) - 1)).view(-1, 8) << code_shifts).sum(dim=1)  # [n / 8]; the terms share no bit
        stream = ((words[:, None] >> byte_shifts) & 0xFF).to(torch.uint8).view(-1)  # [n / 8 * bits]
        first = start * bits // 8
        size = packed_size(part.numel(), bits)
        packed[first : first + size] = stream[:size]
    return packed


def unpack(packed: UInt8[Tensor, " bytes"], shape: Sequence[int], bits: int, signed: bool) -> Shaped[Tensor, ...]:
    """Codes of `packed`, in `shape`: int8 where `signed`, else uint8.

    Raises `CheckpointError` when the number of bytes is not that of the shape, or the last byte's unused bits are not zero.
    """
    _check_bits(bits)
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != (packed_size(count, bits),):
        raise CheckpointError(
            f"packed codes: {packed.dtype} {list(packed.shape)}; {count} codes of {bits} bits take {packed_size(count, bits)} bytes"
        )
    if count * bits % 8 and int(packed[-1]) >> (count * bits % 8):
        raise CheckpointError("packed codes: the unused bits of the last byte are not zero; the file was damaged or edited")
    codes = torch.empty(count, dtype=torch.int8 if signed else torch.uint8, device=packed.device)
    code_shifts, byte_shifts = _shifts(bits, packed.device)
    sign = 1 << (bits - 1) if signed else 0
    for start in range(0, count, SLICE):
        size = min(SLICE, count - start)
        part = packed[start * bits // 8 : packed_size(start + size, bits)]
        words = torch.zeros(math.ceil(size / 8) * bits, dtype=torch.int64, device=packed.device)
        words[: part.numel()] = part
        words = (words.view(-1, bits) << byte_shifts).sum(dim=1)  # [n / 8]
        values = (words[:, None] >> code_shifts) & ((1 << bits) - 1)  # [n / 8, 8]
        codes[start : start + size] = ((values ^ sign) - sign).view(-1)[:size]  # the sign bit spread upwards
    return codes.view(*shape)


def packed_state(state: Mapping[str, Tensor], specs: Mapping[str, QuantSpec]) -> dict[str, Tensor]:
    """What a file holds of a frozen model's `state_dict`.

    `specs` are those of its quantizers by module name; those of weights end in ``.weight_quantizer``.
    Raises `CheckpointError` for values that no file may hold, and a weight without codes.
    """
    stored = {name: tensor.detach() for name, tensor in state.items()}
    for name, spec in specs.items():
        if f"{name}.zero_point" not in stored:
            raise CheckpointError(f"{name}: not where it was quantized; where an adapter is loaded, unload it and save again")
        zero_point = stored.pop(f"{name}.zero_point")
        allowed = (zero_point == 0) if spec.symmetric else (zero_point == zero_point.clamp(0, spec.code_max).round())
        if not allowed.all():
            raise CheckpointError(f"{name}.zero_point: outside the codes of {spec}; set it with scale_from_range")
        if not spec.symmetric:
            stored[f"{name}.zero_point"] = zero_point.to(torch.uint8)
        if name.endswith(".weight_quantizer") and f"{name}.codes" not in stored:
            raise CheckpointError(f"{name}: no integer codes; quantize first")
        for own, bits in (("codes", spec.bits), ("shift", SHIFT_BITS)):
            integers = stored.get(f"{name}.{own}")
            if integers is None:
                continue
            try:
                stored[f"{name}.{own}"] = pack(_unsigned(integers) if own == "shift" else integers, bits)
            except CheckpointError as error:
                raise CheckpointError(f"{name if own == 'codes' else f'{name}.shift'}: {error}") from error
    for name, tensor in stored.items():
        check_values(name, tensor, specs, stored)
    return stored


def belongs_to_quantizer(name: str, specs: Mapping[str, QuantSpec]) -> bool:
    """Whether tensor `name` is a parameter of a quantizer, or a layer's `smooth`."""
    owner, _, own = name.rpartition(".")
    smooth = own == "smooth" and (f"{owner}.weight_quantizer" in specs or f"{owner}.input_quantizer" in specs)
    return owner in specs or smooth


def check_values(name: str, tensor: Tensor, specs: Mapping[str, QuantSpec], others: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` for values that the stored tensor `name` cannot have; `others` give the shapes beside it."""
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise CheckpointError(f"tensor {name!r}: holds inf or nan; all values must be finite")
    if not belongs_to_quantizer(name, specs) or tensor.numel() == 0:
        return
    owner, _, own = name.rpartition(".")
    if own in ("scale", "smooth") and tensor.min() <= 0:
        raise CheckpointError(f"tensor {name!r}: holds {float(tensor.min()):g}; must be positive")
    if own == "zero_point" and tensor.max() > specs[owner].code_max:
        raise CheckpointError(f"tensor {name!r}: holds {int(tensor.max())}; the largest code is {specs[owner].code_max}")
    if own == "table" and not 0 <= int(tensor.min()) <= int(tensor.max()) < (sets := others[f"{owner}.scale"].shape[0]):
        raise CheckpointError(f"tensor {name!r}: holds {int(tensor.max())}; parameter sets are 0 to {sets - 1}")


def digest_of_tensor(name: str, tensor: Tensor) -> str:
    """SHA-256 of name, dtype, shape and bytes of a tensor."""
    contents = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    header = f"{name} {kind_of(tensor)}\n".encode()
    return hashlib.sha256(header + hashlib.sha256(contents).digest()).hexdigest()


def combined_digest(digests: Mapping[str, str]) -> str:
    """One digest of all tensors, however they are spread over files."""
    return hashlib.sha256("".join(sorted(digests.values())).encode()).hexdigest()


def kind_of(tensor: Tensor) -> str:
    """Dtype and shape, for messages and digests: ``uint8 [216]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _unsigned(shift: Tensor) -> Tensor:
    if shift.numel() and shift.min() < 0:
        raise CheckpointError(f"holds {int(shift.min())}; must not be negative")
    return shift.to(torch.uint8)


def _shifts(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bit positions of the eight codes, and of the `bits` bytes, of a word."""
    return torch.arange(8, device=device) * bits, torch.arange(bits, device=device) * 8


def _check_bits(bits: int) -> None:
    if not MIN_BITS <= bits <= MAX_BITS:
        raise CheckpointError(f"bits: {bits}; codes have {MIN_BITS} to {MAX_BITS} bits")
