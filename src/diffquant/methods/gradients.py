"""The gradient of where several denoising steps end: four ways to it, three of them in the memory of one step.

Back-propagation through the chain keeps a graph per step. `identity` hands the gradient at the end to every step; `exact` carries
it back through the steps with recomputation; `accumulate` takes the error so far at every step, in one pass.

Source: Lee et al. 2025, arXiv 2510.20348. *Chosen here*: the squared distance, and the factor 1 in `identity`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffquant.calibration.rollout import Chain
from diffquant.calibration.scheduling import Key, history, with_history
from diffquant.methods.learned import Learned, LearnedRounding

Gradient = Literal["identity", "exact", "accumulate", "chain"]
Ended = tuple[Tensor, Tensor]  # the loss, and the latent at the chain's end
Distance = Callable[[Tensor, Tensor], Tensor]  # of a latent from its target, one number


def squared(end: Tensor, target: Tensor) -> Tensor:
    """The mean squared distance."""
    return (end - target).square().mean()


def segment_gradient(
    chain: Chain,
    start: Tensor,
    targets: Callable[[int], Tensor],
    gradient: Gradient,
    factor: float = 1.0,
    distance: Distance = squared,
) -> Ended:
    """Add the gradient of ``factor * distance(z_M, targets(M - 1))`` to the leaves the model uses; return the loss and z_M.

    `start` is z_0; ``targets(i)`` the full-precision latent after step i. Neither loss nor z_M has a graph.
    """

    def scaled(end: Tensor, target: Tensor) -> Tensor:
        return factor * distance(end, target)

    if gradient in ("identity", "exact"):
        return _backwards(chain, start, targets, scaled, gradient == "exact")
    return (_accumulate if gradient == "accumulate" else _unrolled)(chain, start, targets, scaled)


def carried_back(
    chain: Chain, cotangent: Float[Tensor, "n ..."], after_step: Callable[[], None] = lambda: None
) -> list[Float[Tensor, "n ..."]]:
    """What `cotangent` at the chain's end is at each of its recorded latents, the start first, through the model as it is switched.

    What a multistep solver remembers is taken along from step to step, and left out of what is returned. `after_step` is called
    when a step's gradients are there, the last step first.
    """
    found: list[Tensor] = []
    end = chain.recorded(len(chain.steps))

    def keep(reached: Tensor) -> None:
        found.append(reached)
        after_step()

    def along(reached: Tensor, target: Tensor) -> Tensor:
        return (reached * cotangent.to(reached)).sum()

    with torch.enable_grad():
        _backwards(chain, chain.recorded(0), lambda i: end, along, True, keep)
    return [*reversed(found), cotangent]


def gradient_of(chain: Chain, gradient: Gradient, learned: list[Learned]) -> Tensor:
    """The gradient as one vector, without regularization."""
    for one in learned:
        for tensor, _ in one.parameters():
            tensor.requires_grad_(True)
            tensor.grad = None
        one.place()
    with torch.enable_grad():
        segment_gradient(chain, chain.recorded(0), lambda i: chain.recorded(i + 1), gradient)
    vectors = []
    for one in learned:
        one.collect()
        vectors.append(one.gradient())
        for tensor, _ in one.parameters():
            tensor.requires_grad_(False)
            tensor.grad = None
        one.finish() if not isinstance(one, LearnedRounding) else None
    return torch.cat(vectors)


def _loss_and_cotangent(end: Tensor, target: Tensor, distance: Distance) -> tuple[Tensor, Tensor]:
    """The distance, and its gradient with respect to `end`."""
    leaf = end.detach().requires_grad_(True)
    loss = distance(leaf, target)
    (cotangent,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), cotangent


def _backwards(
    chain: Chain,
    start: Tensor,
    targets: Callable[[int], Tensor],
    distance: Distance,
    exact: bool,
    before_step: Callable[[Tensor], None] = lambda cotangent: None,
) -> Ended:
    """Run the chain without gradients, then visit its steps from the last to the first, one graph at a time.

    The cotangent at a step's end is the one at the chain's end, or (`exact`) what the later steps' Jacobians make of it; then
    `before_step` is shown that of the latent before each step. What a multistep solver remembers carries its own cotangents.
    """
    steps = len(chain.steps)
    latents, states = chain.run(start, steps - 1)
    remembered: dict[Key, Tensor] = {}
    cotangent, loss, reached = torch.zeros(()), torch.zeros(()), start
    for i in reversed(range(steps)):
        latent = latents[i].detach().requires_grad_(exact)
        output = chain.predict(latent, i, states[i])
        model_output = output.detach().requires_grad_(True)
        sample = latents[i].detach().requires_grad_(exact)
        kept = {key: tensor.detach().requires_grad_(True) for key, tensor in history(states[i], sample.shape).items()}
        end, after = chain.step(model_output, sample, i, with_history(states[i], kept))
        if i == steps - 1:
            reached = end.detach()
            loss, cotangent = _loss_and_cotangent(end, targets(i), distance)
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
    return loss, reached


def _accumulate(chain: Chain, start: Tensor, targets: Callable[[int], Tensor], distance: Distance) -> Ended:
    """One pass: at every step the error so far is the cotangent."""
    latent, state, loss = start, chain.state, torch.zeros(())
    for i in range(len(chain.steps)):
        output = chain.predict(latent, i, state)
        model_output = output.detach().requires_grad_(True)
        end, after = chain.step(model_output, latent, i, state)
        loss, cotangent = _loss_and_cotangent(end, targets(i), distance)
        (found,) = torch.autograd.grad(end, model_output, cotangent)
        output.backward(found.to(output.dtype))
        kept = {key: tensor.detach() for key, tensor in history(after, latent.shape).items()}
        latent, state = end.detach(), with_history(after, kept)
    return loss, latent


def _unrolled(chain: Chain, start: Tensor, targets: Callable[[int], Tensor], distance: Distance) -> Ended:
    """Plain back-propagation through the whole chain."""
    latent, state = start, chain.state
    for i in range(len(chain.steps)):
        latent, state = chain.step(chain.predict(latent, i, state), latent, i, state)
    loss = distance(latent, targets(len(chain.steps) - 1))
    loss.backward()
    return loss.detach(), latent.detach()
