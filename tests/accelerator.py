"""An accelerator that computes on the CPU, to find out without one whether the project runs on one.

Tensors that are moved to the device ``far`` are `FarTensor`; an operation on tensors of both devices fails, as on CUDA, where
numbers (no dimensions), indices and copies are allowed. Values are real, so whole calibrations run. Registering a device lasts as
long as the process: run this file (``python -m tests.accelerator CASE ...``), do not import it into other tests.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class _Module(_DummyBackendModule):  # type: ignore[misc]
    """What torch asks a device's module for; the device has no generator of its own."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None: ...

    def manual_seed_all(self, seed: int) -> None: ...


_setup_privateuseone_for_python_backend("far", backend_module=_Module())
FAR = torch.device("far:0")


class FarTensor(Tensor):
    """A tensor of the device, whose values are `inner`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> FarTensor:
        far = Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=FAR)
        far.inner = inner
        return far

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"FarTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, arguments: Sequence[Any] = (), keywords: Any = None) -> Any:
        return compute(operation, arguments, keywords or {})


def compute(operation: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """`operation` on the tensors' values, its result on the device that the operation would leave it on."""
    tensors = [value for value in (*_each(arguments), *_each(keywords.values())) if isinstance(value, Tensor)]
    far = [tensor for tensor in tensors if isinstance(tensor, FarTensor)]
    near = [tensor for tensor in tensors if not isinstance(tensor, FarTensor) and tensor.dim() > 0]
    allowed = operation is aten.copy_.default or (operation in INDEXING and isinstance(arguments[0], FarTensor))
    if far and near and not allowed:
        raise RuntimeError(f"{operation}: {[list(t.shape) for t in far]} on far and {[list(t.shape) for t in near]} on the CPU")
    if far and keywords.get("generator") is not None:
        raise RuntimeError(f"{operation}: a generator of the CPU for a tensor on far")
    result = operation(*map(_near, arguments), **{name: _near(value) for name, value in keywords.items()})
    first = operation._schema.arguments[0].alias_info if operation._schema.arguments else None
    if first is not None and first.is_write:
        return arguments[0]
    if "out" in keywords:
        return keywords["out"]
    stays = keywords["device"].type == FAR.type if keywords.get("device") is not None else bool(far)
    return _far(result) if stays else result


def _each(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


def _near(value: Any) -> Any:
    if isinstance(value, FarTensor):
        return value.inner
    if isinstance(value, list | tuple):
        return type(value)(map(_near, value))
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == FAR.type else value


def _far(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_far, value))
    return FarTensor(value) if isinstance(value, Tensor) else value


class _Operations(TorchDispatchMode):
    """Sends operations that name the device to `compute`; those on its tensors get there anyway."""

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Sequence[Any] = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        device = keywords.get("device")
        ours = any(issubclass(kind, FarTensor) for kind in types) or (device is not None and device.type == FAR.type)
        return compute(operation, arguments, keywords) if ours else operation(*arguments, **keywords)


class _Constants(TorchFunctionMode):
    """`torch.tensor(numbers, device=...)` fills its result where no operation is seen."""

    def __torch_function__(self, function: Any, types: Any, arguments: Sequence[Any] = (), keywords: Any = None) -> Any:
        keywords = dict(keywords or {})
        if function in (torch.tensor, torch.as_tensor) and torch.device(keywords.get("device") or "cpu").type == FAR.type:
            return function(*arguments, **keywords | {"device": "cpu"}).to(FAR)
        return function(*arguments, **keywords)


def emulated() -> ExitStack:
    """While the block runs there is a device ``far``."""
    stack = ExitStack()
    stack.enter_context(_Operations())
    stack.enter_context(_Constants())
    return stack


def main(cases: Sequence[str]) -> None:
    """Run the named cases; each prints its name when it has gone well."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with emulated():
        for case in cases:
            CASES[case]()
            print(case, flush=True)


def mixing_fails() -> None:
    """What this file is for."""
    far = torch.ones(2, 3).to(FAR)
    assert (far + torch.tensor(1.0)).sum().item() == 12
    for mixed in (lambda: far + torch.ones(3), lambda: torch.cat([far, torch.ones(1, 3)]), lambda: torch.nn.Linear(3, 1)(far)):
        try:
            mixed()
        except RuntimeError as error:
            assert "on the CPU" in str(error)
        else:
            raise AssertionError("tensors of both devices were computed with")


def case(name: str, pipeline: str = "micro", overrides: Sequence[str] = (), last: str | None = None, **calibration: Any) -> Any:
    """A recipe from recording to sampling on the device, then saved, loaded and sampled there again."""

    def run() -> None:
        import diffquant as dq
        from diffquant.core.model import quantized_layers
        from tests import pipelines

        with tempfile.TemporaryDirectory() as folder:
            pipe = pipelines.build(pipeline, Path(folder) / "made").to(FAR)
            pipe.set_progress_bar_config(disable=True)
            data = dq.record(pipe, dq.Calibration(samples=2, steps=2, batch_size=2, **calibration), progress=False)
            recipe = dq.load_recipe(name, [*pipelines.small_budget(name), *overrides])
            if last is not None:
                recipe = recipe.model_copy(update={"passes": (*recipe.passes, {"pass": last})})
            dq.quantize(pipe, recipe, data, progress=False)
            if last is not None:
                dq.attach(pipe)
            model = getattr(pipe, "unet", None) or pipe.transformer
            assert list(quantized_layers(model))
            assert {value.device for value in (*model.parameters(), *model.buffers())} == {FAR}
            drawn = _drawn(pipe, calibration)
            assert torch.isfinite(drawn).all()
            dq.save(pipe.to("cpu"), Path(folder) / "saved")
            loaded = dq.load(Path(folder) / "saved", engine="simulate").to(FAR)
            assert torch.equal(_drawn(loaded, calibration), drawn)

    return run


def sensitivity() -> None:
    """Of every quantizer, on the device; the pipeline stays there."""
    import diffquant as dq
    from tests import pipelines

    pipe = pipelines.micro().to(FAR)
    pipe.set_progress_bar_config(disable=True)
    data = dq.record(pipe, dq.Calibration(samples=2, steps=2, batch_size=2), progress=False)
    recipe = dq.load_recipe("mse-w4a8", pipelines.small_budget("mse-w4a8"))
    found = dq.sensitivity(pipe, recipe, data, trajectories=1, progress=False)
    assert abs(sum(row.share for row in found.rows) - 1) < 1e-9
    assert {value.device for value in pipe.unet.parameters()} == {FAR}


def _drawn(pipe: Any, calibration: Mapping[str, Any]) -> Tensor:
    import diffquant as dq
    from diffquant.sampling.sample import sample

    pipe.set_progress_bar_config(disable=True)
    protocol = dq.SamplingProtocol(samples=2, steps=2, batch_size=2, guidance_scale=calibration.get("guidance_scale"))
    return sample(pipe, protocol).last_samples


CASES: dict[str, Callable[[], None]] = {
    "mixing fails": mixing_fails,
    "dmq": case("dmq-w4a6"),
    "adp-dm": case("adp-dm-w6a6"),
    "noise estimate": case("mse-w4a8", last="RuntimeNoiseEstimate"),
    "proportional": case("mse-w4a8", last="FitProportional"),
    "sensitivity": sensitivity,
    "accuquant with guidance": case("accuquant-w4a8", "dit", ["layers.0.guidance_sets=true"], guidance_scale=3.0),
}


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
