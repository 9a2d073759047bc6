"""The interval belongs to the call: threads, and what is computed again for a backward pass, on a denoiser with parameter sets."""

import copy
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import diffquant as dq
import pipelines
from diffquant.core.model import quantizers
from diffquant.core.spec import LayerRule
from diffquant.engines.int8 import engine as int8

TIMESTEPS = (900, 500, 100)
ENGINES = ["simulate", *([] if int8.Int8.unsupported() else ["int8", "openvino"])]


@pytest.fixture(scope="module")
def model() -> Any:
    """Its sets differ much, so that each other's interval is seen."""
    rules = [LayerRule(match="@all", sets=3), LayerRule(match="@attention", sets=3)]
    unet = pipelines.freeze_by_hand(pipelines.micro().unet, sets=3, rules=rules)
    unet.diffquant.clock.divide(TIMESTEPS)
    for _, quantizer in quantizers(unet):
        if quantizer.rows == 3:
            quantizer.scale.mul_(torch.tensor([1.0, 2.0, 4.0])[:, None])
            quantizer.zero_point.copy_(quantizer.zero_point[:1].expand(3, -1))
    return unet


def called(model: Any, timestep: int, x: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(x, timestep).sample
    return output


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_that_share_a_denoiser_keep_their_timesteps(engine: str, model: Any) -> None:
    model = copy.deepcopy(model)
    dq.use_engine(model, engine)
    x = torch.randn(1, 3, 8, 8)
    alone = {timestep: called(model, timestep, x) for timestep in TIMESTEPS}
    assert not torch.equal(alone[900], alone[100])
    wrong: list[int] = []

    def calls(timestep: int) -> None:
        for _ in range(20):
            if not torch.equal(called(model, timestep, x), alone[timestep]):
                wrong.append(timestep)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=calls, args=(timestep,)) for timestep in TIMESTEPS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


@pytest.mark.parametrize("thread", [False, True])
def test_what_a_checkpoint_computes_again_is_of_its_own_call(thread: bool, model: Any) -> None:
    """Also in another thread, and after a call at another timestep."""
    x = torch.randn(1, 3, 8, 8)
    gradients = []
    for checkpointing in (False, True):
        each = copy.deepcopy(model).train()
        if checkpointing:
            each.enable_gradient_checkpointing()
        leaf = x.clone().requires_grad_()
        loss = each(leaf, 900).sample.square().sum()
        called(each, 100, x)
        if thread:
            worker = threading.Thread(target=loss.backward)
            worker.start()
            worker.join()
        else:
            loss.backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_of_mixed_timesteps(engine: str, model: Any) -> None:
    model = copy.deepcopy(model)
    dq.use_engine(model, engine)
    x = torch.randn(3, 3, 8, 8)
    together = called(model, torch.tensor([100, 900, 500]), x)  # type: ignore[arg-type]
    for index, timestep in enumerate((100, 900, 500)):
        alone = called(model, timestep, x[index : index + 1])
        assert (together[index] - alone[0]).norm() < 0.05 * alone.norm()  # codes on rounding edges
