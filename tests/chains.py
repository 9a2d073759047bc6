"""Gradients of chains of denoising steps by plain back-propagation, with a graph for each step: the reference."""

from diffquant.methods.gradients import segment_gradient


def by_autograd(chain, start, target):
    """Back-propagate the squared distance at the chain's end through all of it."""
    latent, state = start, chain.state
    for i in range(len(chain.steps)):
        latent, state = chain.step(chain.predict(latent, i, state), latent, i, state)
    loss = (latent - target).square().mean()
    loss.backward()
    return loss.detach()


def gradient_into_leaves(chain, target, gradient):
    """By name: `chain` by plain back-propagation, the others by the code under test."""
    start = chain.recorded(0)
    return by_autograd(chain, start, target) if gradient == "chain" else segment_gradient(chain, start, target, gradient)
