"""The gradient of where several denoising steps end, in the memory of one step.

Back-propagation through the chain keeps a graph per step. `identity` hands the gradient at the end to every step; `exact` carries
it back through the steps with recomputation.

Source: Lee et al. 2025, arXiv 2510.20348. *Chosen here*: the squared distance, and the factor 1 in `identity`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffquant.calibration.rollout import Chain
from diffquant.host.scheduler import Key, history, with_history
from diffquant.methods.learned import Learned, LearnedRounding

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


def carried_back(
    chain: Chain, cotangent: Float[Tensor, "n ..."], after_step: Callable[[], None] = lambda: None
) -> list[Float[Tensor, "n ..."]]:
    """What `cotangent` at the chain's end is at each of its recorded latents, the start first, through the model as it is switched.

    What a multistep solver remembers is taken along from step to step, and left out of what is returned. `after_step` is called
    when a step's gradients are there, the last step first.
    """
    found: list[Tensor] = []

    def keep(reached: Tensor) -> None:
        found.append(reached)
        after_step()

    def along(reached: Tensor) -> Tensor:
        return (reached * cotangent.to(reached)).sum()

    with torch.enable_grad():
        _backwards(chain, chain.recorded(0), along, True, keep)
    return [*reversed(found), cotangent]


def gradient_of(chain: Chain, gradient: Gradient, learned: list[Learned]) -> Tensor:
    """The gradient as one vector, without regularization."""
    for one in learned:
        for tensor, _ in one.parameters():
            tensor.requires_grad_(True)
            tensor.grad = None
        one.place()
    with torch.enable_grad():
        segment_gradient(chain, chain.recorded(0), chain.recorded(len(chain.steps)), gradient)
    vectors = []
    for one in learned:
        one.collect()
        vectors.append(one.gradient())
        for tensor, _ in one.parameters():
            tensor.requires_grad_(False)
            tensor.grad = None
        one.finish() if not isinstance(one, LearnedRounding) else None
    return torch.cat(vectors)


def _backwards(
    chain: Chain,
    start: Tensor,
    distance: Distance,
    exact: bool,
    before_step: Callable[[Tensor], None] = lambda cotangent: None,
) -> Tensor:
    """Run the chain without gradients, then visit its steps from the last to the first, one graph at a time.

    The cotangent at a step's end is the one at the chain's end, or (`exact`) what the later steps' Jacobians make of it; then
    `before_step` is shown that of the latent before each step. What a multistep solver remembers carries its own cotangents.
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
        kept = {key: tensor.detach().requires_grad_(True) for key, tensor in history(states[i], sample.shape).items()}
        end, after = chain.step(model_output, sample, i, with_history(states[i], kept))
        if i == steps - 1:
            leaf = end.detach().requires_grad_(True)
            loss = distance(leaf)
            (cotangent,) = torch.autograd.grad(loss, leaf)
        later = history(after, sample.shape)
        outputs = [(end, cotangent)] + [(later[key], value) for key, value in remembered.items() if later[key].requires_grad]
        inputs = [model_output, *([sample] if exact else []), *kept.values()]
        tensors, cotangents = zip(*outputs, strict=True)
        found = torch.autograd.grad(tensors, inputs, cotangents, allow_unused=True)
        given = [torch.zeros_like(one) if value is None else value for one, value in zip(inputs, found, strict=True)]
        output.backward(given[0].to(output.dtype))
        remembered = dict(zip(kept, given[len(given) - len(kept) :], strict=True))
        if exact:
            assert latent.grad is not None
            cotangent = given[1] + latent.grad
            before_step(cotangent)
    return loss.detach()
