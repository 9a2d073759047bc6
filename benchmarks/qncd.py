"""QNCD's two parts on a reference model: what smoothing does to layers, and corrections while sampling against each other.

    python benchmarks/qncd.py layers --bits w4a8 w4a6
    python benchmarks/qncd.py layers --bits w4a6 --arms mse "qncd drop=ReconstructRounding drop=LearnScales"
    python benchmarks/qncd.py corrections --bits w8a8 w4a8 w4a6 --eta 0 1
    python benchmarks/qncd.py corrections --model glyph-sd --guidance 3 --work benchmarks/work/glyph-sd --bits w4a8
    python benchmarks/qncd.py corrections --arms accuquant --bits w4a6 --only proportional
    python benchmarks/qncd.py corrections --redraw
    python benchmarks/qncd.py corrections --table

Corrections are fitted to one model (the first arm) and attached to it in turn, fitted on trajectories of the eta that is sampled
with; the model is calibrated on those without noise at any eta. On full precision, all that the run-time estimate changes is its
own bias. Rows of more steps spend a correction's further denoiser calls on steps instead; where noise is injected theirs is other
noise, so the tables have no final error for them. Recordings and passes
stay in --work, where compare.py and accuquant.py find them; rows of corrections that --out holds, of as many samples, are not
measured again.
"""

import argparse
import copy
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from compare import STEPS, add_arguments, recipe_of, recording, with_scheduler
from matplotlib import pyplot
from tables import over
from torch import Tensor, nn

import diffquant as dq
from diffquant import zoo
from diffquant.calibration import fit
from diffquant.core.model import enable, freeze, full_precision, quantized_layers
from diffquant.evaluation.distances import fid
from diffquant.evaluation.intervals import bootstrap_mean
from diffquant.evaluation.pairs import relative_l2
from diffquant.evaluation.sampling import Sampled, StepResult, sample
from diffquant.host.denoiser import prepare
from diffquant.host.pipeline import Host
from diffquant.host.structure import plan, residual_blocks
from diffquant.methods.noise_correction import FitCoefficients, FitProportional, RuntimeNoiseEstimate
from diffquant.quantization import pass_names, restore_passes
from diffquant.sampling.correction import attach, detach

CALLS = 64  # recorded calls over which layers are compared
LABEL = re.compile(r"(?P<arm>.+) seed (?P<seed>\d+) eta (?P<eta>\S+) (?P<name>.+)")  # of a correction's row


def quantized(arm: str, bits: str, seed: int, arguments: argparse.Namespace) -> tuple[Any, dq.Trajectory]:
    """A pipeline after an arm's passes, its weights still there so that full precision can run beside it."""
    pipe = with_scheduler(zoo.load(arguments.model), arguments.scheduler)
    model = Host(pipe).denoiser
    data = recording(pipe, arguments.work, seed, arguments.guidance)
    recipe = recipe_of(arm, bits, arguments)
    folder = arguments.work / f"passes-{seed}"
    dq.quantize(copy.deepcopy(pipe), recipe, data, seed=seed, folder=folder)
    rows = plan(model, recipe.layers)
    prepare(model, rows, data.timesteps)
    restore_passes(model, folder, pass_names(recipe, rows, seed, data))
    enable(model)
    return pipe, data


def layers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Cosine and SQNR of every layer's output, quantized against full precision on the same recorded calls."""
    found: dict[str, Any] = {}
    for bits in arguments.bits:
        for arm in arguments.arms:
            pipe, data = quantized(arm, bits, arguments.seeds[0], arguments)
            model = Host(pipe).denoiser
            rows = layer_errors(model, data)
            after = {f"{name}.conv2" for name in residual_blocks(model)}
            found[f"{bits} {arm}"] = rows
            chosen = [row for name, row in rows.items() if name in after]
            worst = min(row["cosine"] for row in rows.values())
            mean = sum(row["sqnr"] for row in chosen) / len(chosen)
            print(
                f"{bits} {arm}: least cosine {worst:.4f}, of convolutions after an embedding "
                f"{min(row['cosine'] for row in chosen):.4f}, their mean SQNR {mean:.2f} dB",
                flush=True,
            )
    return found


def draw_layers(found: dict[str, Any], path: Path) -> None:
    """The layers' SQNR in the order of the model, a line for each arm, a picture for each bits; a mark after each embedding."""
    bits = sorted({label.split()[0] for label in found})
    figure, panels = pyplot.subplots(len(bits), 1, figsize=(9, 3.2 * len(bits)), squeeze=False, sharex=True, layout="constrained")
    for panel, each in zip(panels[:, 0], bits, strict=True):
        arms = {label.partition(" ")[2]: rows for label, rows in found.items() if label.split()[0] == each}
        for arm, rows in arms.items():
            panel.plot([row["sqnr"] for row in rows.values()], linewidth=1.2, label=arm)
        first = next(iter(arms.values()))
        for index, name in enumerate(first):
            if name.endswith("conv2"):
                panel.axvline(index, color="0.85", linewidth=3, zorder=0)
        panel.set(title=each, ylabel="SQNR of the output, dB")
    panels[0, 0].legend(frameon=False, fontsize=8)
    panels[-1, 0].set_xlabel("layer; grey: convolution after an embedding")
    figure.savefig(path, dpi=110)


def layer_errors(model: nn.Module, data: dq.Trajectory) -> dict[str, dict[str, float]]:
    """By layer, over the recorded calls of all timesteps."""
    indices = data.subset(CALLS, torch.Generator().manual_seed(0))
    outputs: list[dict[str, Tensor]] = []
    for on in (False, True):
        seen: dict[str, Tensor] = {}

        def keep(name: str, seen: dict[str, Tensor] = seen) -> Callable[..., None]:
            return lambda module, given, output: seen.__setitem__(name, output.detach().flatten(1))

        handles = [layer.register_forward_hook(keep(name)) for name, layer in quantized_layers(model)]
        with torch.no_grad():
            if on:
                model(**data.batch(indices)[0])
            else:
                with full_precision(model):
                    model(**data.batch(indices)[0])
        for handle in handles:
            handle.remove()
        outputs.append(seen)
    rows = {}
    for name, wanted in outputs[0].items():
        given = outputs[1][name]
        cosine = torch.nn.functional.cosine_similarity(given, wanted, dim=1).mean()
        sqnr = 10 * torch.log10(wanted.square().sum() / (given - wanted).square().sum())
        rows[name] = {"cosine": float(cosine), "sqnr": float(sqnr)}
    return rows


def corrections(arguments: argparse.Namespace) -> dict[str, Any]:
    """Final error and FID with each correction, eta by eta, on the int8 engine; and what its calls buy as further steps."""
    found: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}

    def held(label: str) -> bool:
        return bool(found.get(label, {}).get("samples") == arguments.samples)

    def measure(label: str, draw: Callable[[], Drawn], reference: Drawn) -> None:
        if not held(label):
            found[label] = row(label, draw(), reference)
            write(arguments, found)

    steps_of = {name: step for name, step in passes().items() if arguments.only is None or name in arguments.only}
    for eta in arguments.eta:
        protocol = dq.SamplingProtocol(
            samples=arguments.samples, steps=STEPS, seed=1000, eta=eta, guidance_scale=arguments.guidance
        )
        full = with_scheduler(zoo.load(arguments.model), arguments.scheduler)
        reference = drawn(full, protocol)
        if not held(f"full precision eta {eta}"):
            found[f"full precision eta {eta}"] = row(f"full precision eta {eta}", reference, reference)
        recorded = recording(full, arguments.work, arguments.seeds[0], arguments.guidance, eta=eta)
        for name, step in steps_of.items():
            if isinstance(step, RuntimeNoiseEstimate):
                control = fitted_by(step, Host(full).denoiser, recorded)
                measure(f"full precision eta {eta} {name}", partial(drawn, full, protocol, control), reference)
        for bits, seed in product(arguments.bits, arguments.seeds):
            label = f"{bits} {arguments.arms[0]} seed {seed} eta {eta}"
            more = f"{label} none, {{}} steps"
            if all(held(f"{label} {name}") for name in ("none", *steps_of)) and all(
                held(more.format(steps)) for steps in longer(found, label, steps_of)
            ):
                continue
            pipe, _ = quantized(arguments.arms[0], bits, seed, arguments)
            data = recording(full, arguments.work, seed, arguments.guidance, eta=eta)
            model = Host(pipe).denoiser
            fitted = {name: fitted_by(step, model, data) for name, step in steps_of.items() if not held(f"{label} {name}")}
            freeze(model)
            dq.use_engine(pipe)
            for name, correction in [("none", None), *fitted.items()]:
                measure(f"{label} {name}", partial(drawn, pipe, protocol, correction), reference)
            for steps in longer(found, label, steps_of):
                measure(more.format(steps), partial(drawn, pipe, replace(protocol, steps=steps)), reference)
    return found


def longer(found: dict[str, Any], label: str, names: Iterable[str]) -> list[int]:
    """The numbers of steps that take as many calls as the corrections with further calls did."""
    return sorted({round(found[f"{label} {name}"]["calls"]) for name in names} - {STEPS})


class Drawn(NamedTuple):
    """What a pipeline drew: its samples, the latents' mean and deviation after each step, and denoiser calls a trajectory."""

    sampled: Sampled
    mean: list[float]
    deviation: list[float]
    calls: float


def drawn(pipe: Any, protocol: dq.SamplingProtocol, correction: Any = None) -> Drawn:
    """Sample with a correction attached."""
    moments: dict[int, list[tuple[float, float]]] = {}
    calls = []

    def see(indices: range, result: StepResult) -> None:
        after = result.sample_after
        moments.setdefault(result.step, []).append((float(after.mean()), float(after.square().mean())))

    handle = Host(pipe).denoiser.register_forward_hook(lambda *_: calls.append(1))
    if correction is not None:
        attach(pipe, correction)
    try:
        sampled = sample(pipe, protocol, on_step=see)
    finally:
        handle.remove()
        detach(pipe)
    means = [sum(mean for mean, _ in step) / len(step) for _, step in sorted(moments.items())]
    squares = [sum(square for _, square in step) / len(step) for _, step in sorted(moments.items())]
    deviations = [(square - mean**2) ** 0.5 for mean, square in zip(means, squares, strict=True)]
    return Drawn(sampled, means, deviations, len(calls) / math.ceil(protocol.samples / protocol.batch_size))


def draw_corrections(found: dict[str, Any], path: Path) -> None:
    """How far the latents' mean and deviation are from full precision's over the steps, means over calibration seeds.

    A row of panels for each model and eta, a colour for each correction.
    """
    models = by_model(found)
    colour = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(name for each in models.values() for name in each))}
    figure, panels = pyplot.subplots(len(models), 2, figsize=(10, 2.7 * len(models)), squeeze=False, layout="constrained")
    for ((arm, eta), rows), pair in zip(models.items(), panels, strict=True):
        full = found[f"full precision eta {eta}"]
        for panel, moment in zip(pair, ("mean", "deviation"), strict=True):
            wanted = torch.tensor(full[moment])
            panel.axhline(0, color="0.75", linewidth=4)
            for name, seeds in rows.items():
                lines = [torch.tensor(row[moment]) for row in seeds.values()]
                if lines[0].shape == wanted.shape:
                    panel.plot(torch.stack(lines).mean(dim=0) - wanted, color=colour[name], linewidth=1.2, label=name)
            panel.set(title=f"{arm}, eta {eta}: {moment} of the latents", ylabel="off by")
    panels[0, 0].legend(frameon=False, fontsize=8)
    for panel in panels[-1]:
        panel.set_xlabel("step")
    figure.savefig(path, dpi=110)


def table_of_corrections(found: dict[str, Any]) -> str:
    """A Markdown table for each eta: means over the calibration seeds, least and largest in brackets."""
    models = by_model(found)
    lines = []
    for eta in dict.fromkeys(eta for _, eta in models):
        full = found[f"full precision eta {eta}"]
        first, second = (moment[-1] for moment in (full["mean"], full["deviation"]))
        lines += [
            f"\neta {eta}; full precision: last latents {first:.3f}, {second:.3f}, data FID {full['fid_to_data']['value']:.1f}\n",
            "| model | correction | calls | seeds | final error | to none | FID | mean and deviation |",
            f"|{'---|' * 8}",
        ]
        controls = {
            name.removeprefix(f"full precision eta {eta} "): {0: row}
            for name, row in found.items()
            if name.startswith(f"full precision eta {eta} ")
        }
        chosen = {arm: rows for (arm, its_eta), rows in models.items() if its_eta == eta}
        for arm, rows in {**chosen, "full precision": controls}.items():
            plain = rows.get("none", {})
            for name, seeds in rows.items():
                compared = (
                    row["final_error"]["value"] / plain[seed]["final_error"]["value"]
                    for seed, row in seeds.items()
                    if name != "none" and seed in plain
                )
                other_noise = name.startswith("none, ") and float(eta) > 0
                cells = (
                    arm,
                    name,
                    f"{next(iter(seeds.values()))['calls']:.0f}",
                    " ".join(str(seed) for seed in sorted(seeds)) if plain else "",
                    "" if other_noise else over(row["final_error"]["value"] for row in seeds.values()),
                    "" if other_noise else over(compared),
                    over(row["fid"]["value"] for row in seeds.values()),
                    ", ".join(f"{fmean(row[key][-1] for row in seeds.values()):.3f}" for key in ("mean", "deviation")),
                )
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def by_model(found: dict[str, Any]) -> dict[tuple[str, str], dict[str, dict[int, dict[str, Any]]]]:
    """Rows of quantized models, by bits with arm, and eta; then by correction; then by calibration seed."""
    models: dict[tuple[str, str], dict[str, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for label, row in found.items():
        if parts := LABEL.fullmatch(label):
            models[parts["arm"], parts["eta"]][parts["name"]][int(parts["seed"])] = row
    return models


def passes() -> dict[str, Any]:
    return {
        "estimate": RuntimeNoiseEstimate(),
        "estimate interval=5": RuntimeNoiseEstimate(interval=5),
        "estimate once": RuntimeNoiseEstimate(hold=False),
        "estimate calibrated": RuntimeNoiseEstimate(baseline="calibrated"),
        "estimate calibrated batch": RuntimeNoiseEstimate(baseline="calibrated", scope="batch"),
        "estimate once calibrated batch": RuntimeNoiseEstimate(hold=False, baseline="calibrated", scope="batch"),
        "proportional": FitProportional(),
        "coefficients": FitCoefficients(),
        "coefficients without bias": FitCoefficients(input_bias=False),
    }


def fitted_by(step: Any, model: nn.Module, data: dq.Trajectory) -> Any:
    with fit.run() as run:
        step.apply(model, data, torch.Generator().manual_seed(0), run)
    correction = model.diffquant.correction
    del model.diffquant.correction
    return correction


def row(label: str, result: Drawn, reference: Drawn) -> dict[str, Any]:
    """Against full precision at `STEPS` steps and, where the noise is the same, its samples one by one."""
    generator = torch.Generator().manual_seed(0)
    classifier, data = zoo.load("glyph-classifier"), zoo.load_statistics()
    pictures, wanted = (each.sampled.pictures for each in (result, reference))
    features = classifier.features(pictures)
    errors = relative_l2(reference.sampled.last_samples, result.sampled.last_samples)
    found: dict[str, Any] = {
        "final_error": asdict(bootstrap_mean(errors, generator)),
        "median": float(errors.median()),
        "fid": asdict(fid(features, classifier.features(wanted), "paired", generator)),
        "fid_to_data": asdict(fid(features, data.features, "fixed", generator)),
        "legibility": asdict(bootstrap_mean(classifier.confidence(pictures), generator)),
        "samples": len(errors),
        "calls": result.calls,
        "mean": [round(value, 5) for value in result.mean],
        "deviation": [round(value, 5) for value in result.deviation],
    }
    error = found["final_error"]
    print(
        f"{label}: {result.calls:.0f} calls, final error {error['value']:.4f} [{error['low']:.4f}, {error['high']:.4f}], median "
        f"{found['median']:.4f}, FID to full precision {found['fid']['value']:.3f}, to data {found['fid_to_data']['value']:.3f}, "
        f"legibility {found['legibility']['value']:.3f}, last mean {result.mean[-1]:.4f}, deviation {result.deviation[-1]:.4f}",
        flush=True,
    )
    return found


def write(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layers", "corrections"])
    add_arguments(parser, Path("benchmarks/work/accuquant"), ["brecq", "qncd", "qncd EmbeddingSmoothing.guard=false"])
    parser.add_argument("--eta", nargs="+", type=float, default=[0.0])
    parser.add_argument("--only", nargs="+", choices=list(passes()), help="these corrections (default: all)")
    parser.add_argument("--redraw", action="store_true", help="only the picture, of what --out holds")
    parser.add_argument("--table", action="store_true", help="only a table of the corrections that --out holds")
    arguments = parser.parse_args()
    arguments.out = arguments.out or Path(f"benchmarks/results/qncd-{arguments.what}.json")
    measure, draw = {"layers": (layers, draw_layers), "corrections": (corrections, draw_corrections)}[arguments.what]
    if arguments.table:
        print(table_of_corrections(json.loads(arguments.out.read_text())))
        return
    if arguments.redraw:
        found = json.loads(arguments.out.read_text())
    else:
        found = measure(arguments)
        write(arguments, found)
    draw(found, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
