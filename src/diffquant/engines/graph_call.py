"""One call of a denoiser as the tensors that a converted graph reads: their names, shapes and order, and the interval's place."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffquant.core.model import clock_of, quantizers
from diffquant.host.denoiser import timestep_argument

INTERVAL = "interval"  # name of the graph's input that chooses the parameter sets


class Call:
    """The arguments of one call of a denoiser, its tensors apart from the rest; the timestep is a tensor, one for each sample."""

    def __init__(self, model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        call_arguments = inspect.signature(model.forward).bind(*arguments, **keywords).arguments
        self.return_dict = bool(call_arguments.pop("return_dict", True))
        name, _ = timestep_argument(model)
        sample = next(leaf for leaf in pytree.tree_leaves(call_arguments) if isinstance(leaf, Tensor))
        batch = len(sample)
        call_arguments[name] = torch.as_tensor(call_arguments[name]).reshape(-1).expand(batch)
        paths, self._structure = pytree.tree_flatten_with_path(call_arguments)
        self._leaves = [leaf for _, leaf in paths]
        self._at = [index for index, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.tensors: list[Tensor] = [self._leaves[index] for index in self._at]
        self.names = [".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in paths[index][0]) for index in self._at]
        self.shapes = [[-1 if len(t) == batch else len(t), *t.shape[1:]] if t.dim() else [] for t in self.tensors]
        rest = [leaf for leaf in self._leaves if not isinstance(leaf, Tensor)]
        self.kind = repr((self.names, self.shapes, [tensor.dtype for tensor in self.tensors], rest))

    def keywords(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """The arguments with other tensors in the place of these."""
        leaves = list(self._leaves)
        for index, tensor in zip(self._at, tensors, strict=True):
            leaves[index] = tensor
        keywords: dict[str, Any] = pytree.tree_unflatten(leaves, self._structure)
        return keywords


def inputs(model: nn.Module, call: Call) -> tuple[list[Tensor], list[str], list[list[int]]]:
    """Examples, names and shapes (-1: open) of what a graph reads; the last is the interval where there are parameter sets."""
    tensors, names, shapes = [*call.tensors], [*call.names], [*call.shapes]
    if any(quantizer.table is not None for _, quantizer in quantizers(model)):
        return [*tensors, torch.zeros(1, dtype=torch.long)], [*names, INTERVAL], [*shapes, [-1]]
    return tensors, names, shapes


def feed(call: Call, model: nn.Module, interval: bool) -> list[Tensor]:
    """What a graph is called with; the last is the `interval` where it reads one."""
    if not interval:
        return list(call.tensors)
    return [*call.tensors, torch.as_tensor(clock_of(model).interval).reshape(-1)]


def timesteps(model: nn.Module) -> str:
    """The timesteps of the model's intervals, for whoever computes the graph's interval."""
    return ",".join(str(timestep) for timestep in clock_of(model).timesteps)
