"""ADP-DM: which timesteps of a layer share which quantization function, found by gradient; and which timesteps to calibrate on.

Every input quantizer has G parameter sets. While searching, its output at timestep t is the mixture of all G quantized inputs by
softmax(logits[t]); logits, scales and zero points are learned together on the error of the model's output plus the entropy of the
mixtures, network weights fixed. Then each timestep takes the set with the largest logit, for good. Calibration latents are added
where the search is undecided (entropy) or was seldom: ``score(t) = H_t + bonus / (N_t + 1)``.

Source: Wang et al. 2024 (arXiv 2305.18723). The released code is another method (groups of channels, never hardened) and is not
followed. *Differs*: the target is the full-precision output and the inputs are recorded latents (paper: the noise itself, on states
of the sampler noised to any timestep); the entropy is a mean over layers, so that its weight does not depend on their number;
learning rates of scales are relative; sets start from clusters of the timesteps' ranges, which the paper leaves open; ``error:
latent`` (off unless asked for) is not the paper's. What else was tried: docs/studies/adp-dm.md.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from diffquant.calibration.fit import Run, fit, iteration_generator
from diffquant.calibration.gain import step_gain
from diffquant.calibration.recording import Trajectory
from diffquant.calibration.replay import rows_of
from diffquant.calibration.timing import Work
from diffquant.core.model import clock_of, device_of, quantizers, switched
from diffquant.core.quantizer import Quantizer
from diffquant.errors import SpecError
from diffquant.host.guidance import leading_channels
from diffquant.host.pipeline import predicted
from diffquant.host.structure import PlannedLayer
from diffquant.methods.adp_dm.clusters import clustered, interval_ranges
from diffquant.methods.adp_dm.mixture import entropies, mixture
from diffquant.methods.adp_dm.pool import Pool
from diffquant.methods.base import Figures, Pass, draw_seed, evaluating
from diffquant.methods.learned import LearnedScale, leaves, placed
from diffquant.methods.ranges import CalibrateRanges

_log = logging.getLogger(__name__)
NO_SETS = "SearchParameterSets: no quantizer has several parameter sets; add sets: 8 to a rule"
LOGITS_LR, SCALE_LR = 0.05, 1e-3  # the latter relative to the scale
ENTROPY = 0.8  # weight of the mixtures' entropy
ONE_HOT = 100.0  # logit margin, in nats, at which the shares of all other sets are zero


@final
class SearchParameterSets(Pass):
    """Learn the G parameter sets of every activation quantizer that a rule gave ``sets``, and the table of their intervals.

    ``images`` distinct latents are added over ``rounds``, each followed by ``updates`` iterations on those added so far. An
    interval without a latent gets the set whose range is nearest. Ranges of sets start from the search of `CalibrateRanges` over
    each cluster of timesteps; ``learn_ranges: false`` leaves them there.

    ``error``: of the model's ``output``, as published, or of the next ``latent`` to first order (`StepGain`): errors of the output
    are largest at the last timesteps, where they change the latent least.

    ``table: clusters`` is the control without a search: every interval keeps its cluster's set, and scales and zero points are
    learned on the same objective, of inputs with one set too.
    """

    images: int = Field(default=512, ge=1)
    rounds: int = Field(default=128, ge=1)
    updates: int = Field(default=4, ge=1)
    batch_size: int = Field(default=16, ge=1)
    learn_ranges: bool = True
    error: Literal["output", "latent"] = "output"
    table: Literal["searched", "clusters"] = "searched"

    def check(self, model: nn.Module, rows: Sequence[PlannedLayer], data: Trajectory) -> None:
        """Raise `SpecError` where no input has several sets, or steps of the sampler are needed and cannot be replayed."""
        if self.table == "searched" and all(row.spec is None or row.spec.sets == 1 for row in rows):
            raise SpecError(NO_SETS)
        if self.error == "latent":
            step_gain("SearchParameterSets", model, data)

    def apply(self, model: nn.Module, data: Trajectory, generator: torch.Generator, run: Run) -> Figures:
        """Search with all quantizers on. Raises `SpecError` where ranges were not calibrated or no quantizer has several sets."""
        seed = draw_seed(generator)
        with evaluating(model), switched(model, True):
            fewest = 2 if self.table == "searched" else 1
            searched = {name: each for name, each in quantizers(model) if each.clock is not None and each.rows >= fewest}
            if not searched and clock_of(model).times == 1:
                note = "the model was recorded at one timestep, so every input has one parameter set; nothing is searched"
                _log.warning("SearchParameterSets: %s", note)
                return {"note": note}
            if not searched:
                raise SpecError(NO_SETS)
            with torch.no_grad():
                nearest = self._initialise(model, searched, data, generator, run)
            search = _Search(self, model, data, searched, nearest)
            curve = self._fit(search, seed, run)
            return search.finish() | {"loss": curve[:: max(1, len(curve) // 50)]}

    def work(self, blocks: int) -> Work:
        """The observed ranges, and there and back in every update, with G quantizations in place of one (counted as twice)."""
        passes = (2.0 if self.table == "searched" else 1.0) * self.rounds * self.updates * self.batch_size
        return Work(self.images + passes, passes)

    def _initialise(
        self, model: nn.Module, searched: dict[str, Quantizer], data: Trajectory, generator: torch.Generator, run: Run
    ) -> dict[str, Tensor]:
        """Give every quantizer clusters of its intervals' ranges as sets; the set of each interval."""
        ranges = interval_ranges(model, searched, data, run)
        nearest = {}
        for name, quantizer in searched.items():
            nearest[name], low, high = clustered(*ranges[name], quantizer.rows)
            quantizer.set_ranges(low, high)
            if quantizer.table is not None:
                quantizer.table = nearest[name].to(quantizer.table)
        calibration = CalibrateRanges(samples=max(self.images, len(data.timesteps)), batch_size=self.batch_size)
        calibration.calibrate_activations(model, data, generator, run, only=searched)
        return nearest

    def _fit(self, search: _Search, seed: int, run: Run) -> list[float]:
        parameters = [(logits, LOGITS_LR) for logits in search.logits.values() if search.searching]
        parameters += leaves(search.scales)
        if not parameters:
            for round_ in range(self.rounds):
                search.grow(round_, iteration_generator(seed, round_))
            return []
        return fit(
            parameters,
            search.loss,
            iterations=self.rounds * self.updates,
            seed=seed,
            run=run,
            label="parameter sets",
            also_saved={"pool": search.pool.chosen, "counts": search.pool.counts},
        )


class _Search:
    """The state of a search: logits, learned scales, the latents chosen so far and how often each interval was.

    ``nearest``: the set each interval starts nearest to.
    """

    def __init__(
        self,
        options: SearchParameterSets,
        model: nn.Module,
        data: Trajectory,
        searched: dict[str, Quantizer],
        nearest: dict[str, Tensor],
    ) -> None:
        self.options, self.model, self.data, self.searched, self.nearest = options, model, data, searched, nearest
        self.clock = clock = clock_of(model)
        self.searching = options.table == "searched"
        margin = 0.0 if self.searching else ONE_HOT
        self.logits = {
            name: margin * nn.functional.one_hot(nearest[name], each.rows).to(each.scale) for name, each in searched.items()
        }
        self.gain = step_gain("SearchParameterSets", model, data) if options.error == "latent" else None
        learned = searched.values() if options.learn_ranges else ()
        self.scales = [LearnedScale(each, SCALE_LR, zero_points=True) for each in learned]
        interval = torch.tensor([clock.timesteps.index(timestep) for timestep in data.timestep_of.tolist()])
        if clock.conditional is not None:
            half = data.half_of
            interval = interval + clock.times * torch.where(half < 0, clock.conditional, half)
        self.pool = Pool(options.images, interval, clock)
        self.start_entropy = float(self.interval_entropy().mean())

    def interval_entropy(self) -> Float[Tensor, " intervals"]:
        """Entropy of each interval's mixture, a mean over quantizers, in nats."""
        with torch.no_grad():
            return torch.stack([entropies(logits).cpu() for logits in self.logits.values()]).mean(dim=0)

    def grow(self, round_: int, generator: torch.Generator) -> None:
        """Add a round's latents to the pool."""
        self.pool.grow(round_, self.options.rounds, self.interval_entropy(), generator)

    # ---- the loss

    def loss(self, iteration: int, generator: torch.Generator) -> Tensor:
        """The objective on a batch of the pool, which sets the gradients itself."""
        if iteration % self.options.updates == 0:
            self.grow(iteration // self.options.updates, generator)
        pool = self.pool.samples
        picked = pool[torch.randint(len(pool), (self.options.batch_size,), generator=generator)]
        with placed(self.scales):
            with self.mixed() if self.searching else nullcontext():
                total = self.errors(picked).mean()
            if self.searching:
                interval = torch.as_tensor(self.clock.interval).expand(len(picked))
                undecided = [entropies(logits)[interval.to(logits.device)].mean() for logits in self.logits.values()]
                total = total + ENTROPY * torch.stack(undecided).mean()
            total.backward()
        return total.detach()

    def errors(self, picked: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Squared error of the model on each of the recorded samples `picked`, a sum over its values."""
        arguments, target = self.data.batch(picked, device_of(self.model))
        with rows_of(self.model, self.data, picked):
            output = predicted(self.model, self.model(**arguments))
        error = output.float() - target.float()
        if self.gain is not None:
            gain = self.gain.of(picked)
            error = leading_channels(error, gain) * gain
        return error.square().flatten(1).sum(dim=1)

    @contextmanager
    def mixed(self) -> Iterator[None]:
        """Searched quantizers put out their mixtures while the block runs."""
        for name, quantizer in self.searched.items():
            quantizer.forward = functools.partial(mixture, quantizer, self.logits[name])  # type: ignore[method-assign]
        try:
            yield
        finally:
            for quantizer in self.searched.values():
                del quantizer.forward

    # ---- the end

    def decide(self) -> tuple[float, float]:
        """Each interval takes the set with the largest logit; the errors before and after."""
        with self.mixed():
            before = self.error()
        trained = self.pool.visited()
        for name, quantizer in self.searched.items():
            table = torch.where(trained, self.logits[name].argmax(dim=1).cpu(), self.nearest[name])
            quantizer.table = table.to(quantizer.table)
        return before, self.error()

    def finish(self) -> Figures:
        """Leave the quantizers with what was learned; figures of the search."""
        for each in self.scales:
            each.finish()
        mixed, hardened = self.decide() if self.searching else (math.nan, math.nan)
        trained = self.pool.visited()
        rows = []
        for name, quantizer in self.searched.items():
            logits = self.logits[name][trained.to(self.logits[name].device)]
            owner, _, operand = name.rpartition(".")
            table = self.nearest[name] if quantizer.table is None else quantizer.table.cpu()
            rows.append(
                {
                    "layer": owner,
                    "operand": operand,
                    "sets_used": len(table.unique()),
                    "moved": float((table != self.nearest[name]).float().mean()),
                    "entropy": float(entropies(logits).mean()),
                    "largest_share": float(logits.softmax(dim=1).amax(dim=1).mean()),
                }
            )
        figures = {
            "layers": rows,
            "images": len(self.pool.samples),
            "settled_error": self.error(),
            "intervals_chosen": self.pool.counts.tolist(),
        }
        if not self.searching:
            return figures
        return figures | {
            "entropy_at_start": self.start_entropy,
            "entropy_at_end": float(self.interval_entropy()[trained].mean()),
            "mixture_error": mixed,
            "hardened_error": hardened,
            "hardening_gap": hardened / max(mixed, 1e-24) - 1,
        }

    def error(self) -> float:
        """Squared error against full precision, a mean over the pool's latents."""
        with torch.no_grad():
            errors = [self.errors(picked).cpu() for picked in self.pool.samples.split(self.options.batch_size)]
        return float(torch.cat(errors).mean())
