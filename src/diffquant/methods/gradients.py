"""The gradient of where several denoising steps end, in the memory of one step.

Back-propagation through the chain keeps a graph per step. `identity` hands the gradient at the end to every step; `exact` carries
it back through the steps with recomputation.

Source: Lee et al. 2025, arXiv 2510.20348. *Chosen here*: the squared distance, and the factor 1 in `identity`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffquant.calibration.rollout import Chain
from diffquant.host.scheduler import Key, history, with_history
from diffquant.methods.learned import Learned, LearnedRounding, leaves, placed

Gradient = Literal["identity", "exact"]
Distance = Callable[[Tensor], Tensor]  # of a latent from its target, one number


def segment_gradient(
    chain: Chain, start: Float[Tensor, "n ..."], target: Float[Tensor, "n ..."], gradient: Gradient, factor: float = 1.0
) -> Tensor:
    """Add the gradient of ``factor * mean((z_M - target)^2)`` to the leaves the model uses; return that loss, without a graph.

    `start` is z_0, `target` the full-precision latent at the chain's end.
    """

    def distance(end: Tensor) -> Tensor:
        return factor * (end - target).square().mean()

    return _backwards(chain, start, distance, gradient == "exact")


def carried_back(chain: Chain, direction: Float[Tensor, "n ..."], after_step: Callable[[], None]) -> None:
    """Add the gradient of the chain's end along `direction` to the leaves the model uses, through all steps, the last first.

    `after_step` is called when a step's gradients are there.
    """

    def along(end: Tensor) -> Tensor:
        return (end * direction.to(end)).sum()

    with torch.enable_grad():
        _backwards(chain, chain.recorded(0), along, True, after_step)


def gradient_of(chain: Chain, gradient: Gradient, learned: Sequence[Learned]) -> Tensor:
    """The gradient with respect to all leaves as one vector, without penalties. The leaves are left without it."""
    tensors = [tensor for tensor, _ in leaves(learned)]
    for tensor in tensors:
        tensor.requires_grad_(True)
        tensor.grad = None
    with placed(learned), torch.enable_grad():
        segment_gradient(chain, chain.recorded(0), chain.recorded(len(chain.steps)), gradient)
    vector = torch.cat([tensor.grad.flatten() for tensor in tensors if tensor.grad is not None])
    for tensor in tensors:
        tensor.requires_grad_(False)
        tensor.grad = None
    for each in learned:
        if not isinstance(each, LearnedRounding):  # whose codes stay undecided
            each.finish()
    return vector


def _backwards(
    chain: Chain,
    start: Tensor,
    distance: Distance,
    exact: bool,
    after_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Run the chain without gradients, then visit its steps from the last to the first, one graph at a time.

    The cotangent at a step's end is the one at the chain's end; with `exact` it is carried back through the later steps' Jacobians.
    What a multistep solver remembers has cotangents of its own.
    """
    steps = len(chain.steps)
    latents, states = chain.run(start, steps - 1)
    remembered: dict[Key, Tensor] = {}
    cotangent, loss = torch.zeros(()), torch.zeros(())
    for i in reversed(range(steps)):
        latent = latents[i].detach().requires_grad_(exact)
        output = chain.predict(latent, i, states[i])
        model_output = output.detach().requires_grad_(True)
        sample = latents[i].detach().requires_grad_(exact)
        earlier = {key: tensor.detach().requires_grad_(True) for key, tensor in history(states[i], sample.shape).items()}
        end, after = chain.step(model_output, sample, i, with_history(states[i], earlier))
        if i == steps - 1:
            leaf = end.detach().requires_grad_(True)
            loss = distance(leaf)
            (cotangent,) = torch.autograd.grad(loss, leaf)
        later = history(after, sample.shape)
        outputs = [(end, cotangent)] + [(later[key], value) for key, value in remembered.items() if later[key].requires_grad]
        inputs = [model_output, *([sample] if exact else []), *earlier.values()]
        tensors, cotangents = zip(*outputs, strict=True)
        reached = torch.autograd.grad(tensors, inputs, cotangents, allow_unused=True)
        gradients = [torch.zeros_like(tensor) if value is None else value for tensor, value in zip(inputs, reached, strict=True)]
        output.backward(gradients[0].to(output.dtype))
        remembered = dict(zip(earlier, gradients[len(gradients) - len(earlier) :], strict=True))
        if exact:
            assert latent.grad is not None
            cotangent = gradients[1] + latent.grad
        after_step()
    return loss.detach()
