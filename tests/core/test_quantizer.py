"""The clock against its definition; quantizers with sets, splits and shifts against the quantizers they stand for."""

import copy
import pickle
import threading
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from diffquant.core.affine import scale_from_range
from diffquant.core.clock import StepClock, spread
from diffquant.core.model import ModelState
from diffquant.core.quantizer import Quantizer, logits_of, rectified_sigmoid
from diffquant.core.spec import QuantSpec
from diffquant.errors import SpecError
from diffquant.host.denoiser import tick, tock

UINT8 = QuantSpec(bits=8)
INT4 = QuantSpec(bits=4, symmetric=True)


def calibrated(quantizer: Quantizer, scale: object, zero_point: object = 0.0) -> Quantizer:
    """The quantizer, on, with these parameters (anything that broadcasts to [rows, parts])."""
    quantizer.scale.copy_(torch.as_tensor(scale))
    quantizer.zero_point.copy_(torch.as_tensor(zero_point))
    quantizer.enabled = True
    return quantizer


def by_hand(x: Tensor, scale: float, zero_point: float, spec: QuantSpec) -> Tensor:
    """Fake quantization in numpy, float32."""
    code = np.rint(x.numpy() / np.float32(scale)) + np.float32(zero_point)
    return torch.from_numpy((np.clip(code, spec.code_min, spec.code_max) - np.float32(zero_point)) * np.float32(scale))


# ---- StepClock


@given(st.lists(st.floats(0, 1000, width=32), min_size=1, max_size=6, unique=True), st.floats(-100, 1100, width=32))
def test_a_timestep_is_in_the_interval_of_the_nearest_recorded_one(recorded: list[float], timestep: float) -> None:
    clock = StepClock(recorded)
    clock.set_timestep(timestep)
    distances = [abs(timestep - center) for center in sorted(recorded, reverse=True)]
    assert isinstance(clock.interval, int)
    assert distances[clock.interval] == min(distances)


def test_edges_are_the_midpoints_and_the_outermost_intervals_have_no_end() -> None:
    clock = StepClock([900, 500, 100])
    places = {10_000: 0, 900: 0, 701: 0, 700.001: 0, 699: 1, 500: 1, 301: 1, 299.5: 2, 100: 2, 0: 2, -5: 2}
    for timestep, interval in places.items():
        clock.set_timestep(timestep)
        assert clock.interval == interval, timestep


def test_a_midpoint_belongs_to_the_less_noisy_side() -> None:
    clock = StepClock([900, 500])
    clock.set_timestep(700)
    assert clock.interval == 1


def test_the_order_of_recorded_timesteps_does_not_matter_and_large_ones_come_first() -> None:
    assert StepClock([1, 3, 2]).timesteps == StepClock([3, 2, 1]).timesteps == (3.0, 2.0, 1.0)


def test_float_timesteps_of_flow_matching() -> None:
    clock = StepClock([1.0, 0.75, 0.3])
    for timestep, interval in ((torch.tensor(0.9), 0), (torch.tensor(0.8), 1), (0.55, 1), (0.5, 2), (torch.tensor([0.0]), 2)):
        clock.set_timestep(timestep)
        assert clock.interval == interval


def test_repeated_timesteps_of_a_sampler_are_one_interval() -> None:
    """PNDM calls the model several times at one timestep; the clock does not count calls."""
    calls = [801, 701, 701, 801, 601, 501, 501, 601, 401, 201, 1]
    clock = StepClock(calls)
    assert clock.timesteps == (801, 701, 601, 501, 401, 201, 1)
    for timestep in calls:
        clock.set_timestep(torch.tensor(timestep))
        assert clock.interval == clock.timesteps.index(timestep)


def test_a_clock_without_timesteps_has_one_interval() -> None:
    clock = StepClock()
    clock.set_timestep(123)
    assert (clock.intervals, clock.interval) == (1, 0)


def test_one_interval_per_sample_or_one_for_all() -> None:
    clock = StepClock([900, 500, 100])
    clock.set_timestep(torch.tensor([100, 900, 480]))
    assert isinstance(clock.interval, Tensor) and clock.interval.tolist() == [2, 0, 1]
    clock.set_timestep(torch.tensor([450, 500, 510]))
    assert clock.interval == 1
    clock.set_interval(torch.tensor([0, 2]))
    assert isinstance(clock.interval, Tensor) and clock.interval.tolist() == [0, 2]
    clock.divide([3, 4])
    assert (clock.interval, clock.intervals) == (0, 2)


def test_large_integer_timesteps_keep_their_order() -> None:
    clock = StepClock([2**24 + 3, 2**24 + 2])  # one float32 number
    clock.set_timestep(2**24 + 3)
    assert clock.interval == 0
    clock.set_timestep(torch.tensor(2**24 + 2))
    assert clock.interval == 1


class Denoiser(nn.Module):
    """What `tick` needs to know of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.diffquant = ModelState(StepClock([900, 100]), ("timestep", 1))
        self.register_forward_pre_hook(tick, with_kwargs=True)

    def forward(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        return sample


def test_the_hook_reads_the_timestep_by_place_and_by_name() -> None:
    model, sample = Denoiser(), torch.zeros(1)
    model(sample, 100)
    assert model.diffquant.clock.interval == 1
    model(sample, timestep=torch.tensor(900))
    assert model.diffquant.clock.interval == 0
    model(timestep=100, sample=sample)
    assert model.diffquant.clock.interval == 1
    with pytest.raises(SpecError, match=r"^Denoiser: called without timestep; the quantizers need it"):
        model(sample)


def test_a_deep_copy_ticks_its_own_clock() -> None:
    model = Denoiser()
    twin = copy.deepcopy(model)
    twin(torch.zeros(1), 100)
    assert (twin.diffquant.clock.interval, model.diffquant.clock.interval) == (1, 0)


# ---- parameter sets


@pytest.mark.parametrize(
    ("rows", "intervals", "table"),
    [(1, 3, [0, 0, 0]), (2, 4, [0, 0, 1, 1]), (3, 3, [0, 1, 2]), (2, 5, [0, 0, 0, 1, 1]), (4, 2, [0, 2]), (1, 1, [0])],
)
def test_the_first_table_gives_equal_shares(rows: int, intervals: int, table: list[int]) -> None:
    assert spread(rows, intervals).tolist() == table


def test_a_quantizer_follows_the_clock_through_its_table() -> None:
    clock = StepClock([900, 500, 100])
    quantizer = calibrated(Quantizer(UINT8, rows=2, clock=clock), [[0.5], [0.25]], [[0.0], [3.0]])
    assert quantizer.table is not None
    quantizer.table.copy_(torch.tensor([1, 0, 1]))
    x = torch.randn(2, 3, 4)
    for timestep, (scale, zero_point) in {900: (0.25, 3), 500: (0.5, 0), 100: (0.25, 3)}.items():
        clock.set_timestep(timestep)
        assert torch.equal(quantizer(x), by_hand(x, scale, zero_point, UINT8))
    quantizer.table.copy_(torch.tensor([1, 0, 0]))  # as when a state is loaded after a call
    assert torch.equal(quantizer(x), by_hand(x, 0.5, 0, UINT8))


def test_a_batch_of_mixed_timesteps_gathers_per_sample() -> None:
    clock = StepClock([900, 500, 100])
    scale, zero_point = [[0.5], [0.25], [0.125]], [[0.0], [3.0], [7.0]]
    quantizer = calibrated(Quantizer(UINT8, rows=3, axis=-1, clock=clock), scale, zero_point)
    assert quantizer.table is not None
    quantizer.table.copy_(torch.tensor([1, 2, 0]))
    x = torch.randn(4, 5, 6)
    clock.set_timestep(torch.tensor([100, 900, 500, 100]))
    expected = [by_hand(x[i], scale[row][0], zero_point[row][0], UINT8) for i, row in enumerate([0, 1, 2, 0])]
    assert torch.equal(quantizer(x), torch.stack(expected))
    with pytest.raises(SpecError, match=r"^quantizer: 4 timesteps for a batch of 3; give one timestep per sample$"):
        quantizer(x[:3])


def test_equal_parameter_sets_are_static_quantization() -> None:
    clock = StepClock([900, 500, 100])
    static = calibrated(Quantizer(UINT8, clock=clock), 0.1, 100.0)
    dynamic = calibrated(Quantizer(UINT8, rows=3, clock=clock), 0.1, 100.0)
    assert static.table is None
    x = torch.randn(3, 4, 2, 2)
    for timestep in (900, 333, torch.tensor([100, 500, 900])):
        clock.set_timestep(timestep)
        assert torch.equal(dynamic(x), static(x))


def test_more_than_256_sets_have_a_wider_table() -> None:
    clock = StepClock(range(300))
    quantizer = calibrated(Quantizer(UINT8, rows=300, clock=clock), torch.arange(1.0, 301.0)[:, None])
    clock.set_timestep(0)
    x = torch.tensor([[450.0]])
    assert quantizer(x).item() == 600.0  # the last row: scale 300, code 2 (1.5, halves to even)


# ---- rows of a weight, splits, shifts


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2, 2)])
def test_a_weight_has_a_scale_per_output_channel(shape: tuple[int, ...]) -> None:
    scale = [[0.1], [0.2], [0.3]]
    quantizer = calibrated(Quantizer(INT4, rows=3), scale)
    weight = torch.randn(shape)
    assert torch.equal(quantizer(weight), torch.stack([by_hand(weight[i], scale[i][0], 0, INT4) for i in range(3)]))


@pytest.mark.parametrize(("shape", "axis"), [((2, 5, 3, 3), 1), ((2, 7, 5), -1), ((2, 5), -1)])
@pytest.mark.parametrize("sets", [1, 2])
def test_splits_are_separate_quantizers_of_the_parts(shape: tuple[int, ...], axis: int, sets: int) -> None:
    clock = StepClock([900, 100])
    scale, zero_point = torch.rand(sets, 2) + 0.01, torch.randint(0, 200, (sets, 2)).float()
    joint = calibrated(Quantizer(UINT8, sets, (2, 3), axis, clock), scale, zero_point)
    apart = [calibrated(Quantizer(UINT8, sets, (), axis, clock), scale[:, [i]], zero_point[:, [i]]) for i in (0, 1)]
    x = torch.randn(shape) * 10
    for timestep in (900, 100, torch.tensor([100, 900])):
        clock.set_timestep(timestep)
        parts = x.split((2, 3), dim=axis)
        expected = torch.cat([quantizer(part) for quantizer, part in zip(apart, parts, strict=True)], dim=axis)
        assert torch.equal(joint(x), expected)


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 2, 2)])
def test_splits_of_a_weight_have_their_own_scale_per_output_channel(shape: tuple[int, ...]) -> None:
    scale = torch.rand(3, 2) + 0.1
    joint = calibrated(Quantizer(INT4, 3, (4, 1)), scale)
    weight = torch.randn(shape)
    parts = [calibrated(Quantizer(INT4, 3), scale[:, [i]])(part) for i, part in enumerate(weight.split((4, 1), dim=1))]
    assert torch.equal(joint(weight), torch.cat(parts, dim=1))


def test_a_shift_of_zero_is_identity() -> None:
    x = torch.randn(2, 4, 3, 3)
    plain = calibrated(Quantizer(UINT8, clock=StepClock()), 0.02, 128.0)
    shifted = calibrated(Quantizer(UINT8, clock=StepClock(), shift_channels=4), 0.02, 128.0)
    assert torch.equal(shifted(x), plain(x))


@pytest.mark.parametrize(("shape", "axis"), [((2, 3, 4, 4), 1), ((2, 5, 3), -1)])
def test_a_shift_doubles_the_step_of_its_channel(shape: tuple[int, ...], axis: int) -> None:
    clock = StepClock([900, 100])
    scale, zero_point, shift = [[0.03], [0.05]], [[100.0], [120.0]], [[0, 1, 3], [2, 0, 1]]
    quantizer = calibrated(Quantizer(UINT8, 2, (), axis, clock, shift_channels=3), scale, zero_point)
    assert quantizer.shift is not None
    quantizer.shift.copy_(torch.tensor(shift))
    x = torch.randn(shape) * 5

    def expected(sample: Tensor, row: int) -> Tensor:
        channels = sample.unbind(axis if axis < 0 else axis - 1)
        steps = [np.float32(scale[row][0]) * 2 ** shift[row][c] for c in range(3)]
        done = [by_hand(channel, float(steps[c]), zero_point[row][0], UINT8) for c, channel in enumerate(channels)]
        return torch.stack(done, dim=axis if axis < 0 else axis - 1)

    for timestep, rows in ((900, [0, 0]), (100, [1, 1]), (torch.tensor([100, 900]), [1, 0])):
        clock.set_timestep(timestep)
        assert torch.equal(quantizer(x), torch.stack([expected(x[i], row) for i, row in enumerate(rows)]))


# ---- on and off, codes, learned rounding


def test_off_returns_the_very_tensor() -> None:
    x = torch.randn(2, 3)
    assert Quantizer(UINT8)(x) is x


def test_calibrated_is_all_scales_finite() -> None:
    quantizer = Quantizer(INT4, rows=2)
    assert not quantizer.calibrated
    quantizer.scale[0] = 1.0
    assert not quantizer.calibrated
    quantizer.scale[1] = 1.0
    assert quantizer.calibrated


def test_an_observer_sees_the_input_on_and_off() -> None:
    seen: list[Tensor] = []
    quantizer = Quantizer(UINT8)
    assert not quantizer.live
    quantizer.observer = seen.append
    assert quantizer.live
    x = torch.randn(2, 3)
    quantizer(x)
    calibrated(quantizer, 0.1)(x)
    assert [tensor is x for tensor in seen] == [True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_quantized_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(4, 4).to(dtype)
    quantizer = calibrated(Quantizer(UINT8), 0.01, 128.0)
    assert quantizer(x).dtype == dtype
    assert torch.equal(quantizer(x), by_hand(x.float(), 0.01, 128, UINT8).to(dtype))
    assert torch.equal(quantizer.quantize(x), quantizer.quantize(x.float()))


@pytest.mark.parametrize(("spec", "dtype"), [(INT4, torch.int8), (UINT8, torch.uint8)])
def test_decided_codes_dequantize_to_what_was_simulated(spec: QuantSpec, dtype: torch.dtype) -> None:
    weight = torch.randn(3, 4, 2, 2)
    scale, zero_point = scale_from_range(weight.flatten(1).amin(1)[:, None], weight.flatten(1).amax(1)[:, None], spec)
    quantizer = calibrated(Quantizer(spec, rows=3), scale, zero_point)
    simulated = quantizer(weight)
    quantizer.decide(weight)
    assert quantizer.codes is not None and quantizer.codes.dtype == dtype
    assert torch.equal(quantizer.dequantized_codes(), simulated)
    assert torch.equal(quantizer(weight), simulated)
    before = quantizer.codes
    quantizer.decide(weight + 1)  # decided is decided
    assert torch.equal(quantizer.codes, before)


def test_the_rectified_sigmoid_is_stretched_and_cut() -> None:
    logits = torch.tensor([-10.0, 0.0, 10.0])
    assert rectified_sigmoid(logits).tolist() == [0.0, 0.5, 1.0]
    fractions = torch.linspace(0, 0.99, 12)
    # sigmoid and logarithm in float32
    assert torch.allclose(rectified_sigmoid(logits_of(fractions)), fractions, rtol=0, atol=1e-6)


def test_learned_rounding_starts_as_identity_and_is_cut_at_one_half() -> None:
    weight = torch.rand(1, 6) * 4 - 2  # inside the codes of INT4 at scale 0.3
    quantizer = calibrated(Quantizer(INT4), 0.3)
    fraction = weight / 0.3 - (weight / 0.3).floor()
    quantizer.rounding = logits_of(fraction)
    assert torch.allclose(quantizer(weight), weight, rtol=0, atol=1e-5)  # nothing is rounded yet; float32 logits
    quantizer.rounding = torch.tensor([[3.0, -3.0, 0.0, -0.01, 0.01, -9.0]])
    quantizer.decide(weight)
    up = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0, 0.0]])
    assert quantizer.rounding is None and quantizer.codes is not None
    assert torch.equal(quantizer.codes.float(), (weight / 0.3).floor() + up)


def test_buffers_are_named_and_shaped_before_calibration() -> None:
    quantizer = Quantizer(UINT8, 3, (2, 2), 1, StepClock([1, 2, 3, 4]), shift_channels=4)
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in quantizer.state_dict().items()}
    assert shapes == {
        "scale": ((3, 2), torch.float32),
        "zero_point": ((3, 2), torch.float32),
        "table": ((4,), torch.uint8),
        "shift": ((3, 4), torch.int8),
    }


def test_divided_sets_are_copies_that_the_table_chooses_from() -> None:
    quantizer = calibrated(Quantizer(UINT8, 1, clock=StepClock([900, 500, 100])), torch.tensor([[0.1]]), torch.tensor([[3.0]]))
    before = quantizer(torch.linspace(-1, 9, 7))
    quantizer.divide_sets(torch.tensor([0, 1, 1]))
    assert quantizer.rows == 2 and quantizer.table is not None and quantizer.table.tolist() == [0, 1, 1]
    for interval in range(3):
        quantizer.clock.set_interval(interval)
        assert torch.equal(quantizer(torch.linspace(-1, 9, 7)), before)
    with pytest.raises(SpecError, match="2 parameter sets cannot be divided"):
        quantizer.divide_sets(torch.tensor([0, 1, 1]))


# ---- the interval belongs to the call


class Nested(nn.Module):
    """A denoiser with sets that calls itself once inside a call, and says in which interval it is before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.diffquant = ModelState(StepClock([900, 500, 100]), ("timestep", 1))
        self.seen: list[int] = []
        self.register_forward_pre_hook(tick, with_kwargs=True)
        self.register_forward_hook(tock, always_call=True)

    def forward(self, sample: Tensor, timestep: float, inner: float | None = None, fails: bool = False) -> Tensor:
        self.seen.append(self.diffquant.clock.interval)
        if fails:
            raise RuntimeError("inside")
        if inner is not None:
            with suppress(RuntimeError):
                self(sample, inner, fails=inner == 100)
        self.seen.append(self.diffquant.clock.interval)
        return sample


@pytest.mark.parametrize("inner", [500, 100])
def test_a_call_inside_a_call_leaves_the_outer_interval(inner: float) -> None:
    """Also one that fails, and also one that is never reached because its timestep is missing."""
    model = Nested()
    model(torch.zeros(1), 900, inner=inner)
    assert model.seen == ([0, 1, 1, 0] if inner == 500 else [0, 2, 0])
    assert model.diffquant.clock.interval == 0
    with pytest.raises(SpecError, match="called without timestep"):
        model(torch.zeros(1))
    model(torch.zeros(1), 100)
    assert model.diffquant.clock.interval == 2


def test_threads_have_intervals_of_their_own() -> None:
    clock = StepClock([900, 500, 100])
    clock.set_interval(1)
    seen: dict[str, list[Any]] = {"a": [], "b": []}
    barrier = threading.Barrier(2)

    def calls(name: str, interval: int) -> None:
        seen[name].append(clock.interval)  # that of another thread, where this one set none
        barrier.wait()
        clock.set_interval(interval)
        barrier.wait()
        seen[name].append(clock.interval)

    threads = [threading.Thread(target=calls, args=each) for each in (("a", 0), ("b", 2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"a": [1, 0], "b": [1, 2]} and clock.interval == 1
    assert pickle.loads(pickle.dumps(clock)).timesteps == copy.deepcopy(clock).timesteps == clock.timesteps
