"""QNCD's two parts on a reference model: what smoothing does to layers, and corrections while sampling against each other.

    python benchmarks/qncd.py layers --bits w4a8 w4a6
    python benchmarks/qncd.py corrections --bits w8a8 w4a8 w4a6 --eta 0 1

Corrections are fitted to one model (brecq) and attached to it in turn; ``control`` rows attach the run-time estimate to full
precision, where all it changes is its own bias. Recordings and passes stay in --work, where compare.py and accuquant.py find them.
"""

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from compare import STEPS, add_arguments, recipe_of, recording
from torch import Tensor, nn

import diffquant as dq
from diffquant import zoo
from diffquant.calibration import fit
from diffquant.core.surgery import enable, full_precision, plan, prepare, quantized_layers
from diffquant.evaluation.compare import ReferenceRun, compare_to, run_reference
from diffquant.methods.corrections import FitCoefficients, FitProportional, NoiseEstimate
from diffquant.methods.passes import restore_quantizers
from diffquant.methods.qncd import residual_blocks
from diffquant.recipe import pass_names
from diffquant.runtime.correction import attach, detach

CALLS = 64  # recorded calls over which layers are compared


def quantized(arm: str, bits: str, seed: int, arguments: argparse.Namespace) -> tuple[Any, dq.Trajectory]:
    """A pipeline after an arm's passes, its weights still there so that full precision can run beside it."""
    pipe = zoo.load("glyph-ddim")
    data = recording(pipe, arguments.work, seed)
    recipe = recipe_of(arm, bits, arguments)
    folder = arguments.work / f"passes-{seed}"
    dq.quantize(copy.deepcopy(pipe), recipe, data, seed=seed, folder=folder)
    last = pass_names(recipe, recipe.steps(), seed, data)[-1]
    prepare(pipe.unet, plan(pipe.unet, recipe.layers), data.timesteps)
    restore_quantizers(pipe.unet, fit.load_tensors(folder / f"{last}.safetensors")[0])
    enable(pipe.unet)
    return pipe, data


def layers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Cosine and SQNR of every layer's output, quantized against full precision on the same recorded calls."""
    found: dict[str, Any] = {}
    for bits in arguments.bits:
        for arm in ("brecq", "qncd drop=RuntimeNoiseEstimate", "qncd drop=RuntimeNoiseEstimate EmbeddingSmoothing.guard=false"):
            pipe, data = quantized(arm, bits, arguments.seeds[0], arguments)
            rows = layer_errors(pipe.unet, data)
            after = {f"{name}.conv2" for name in residual_blocks(pipe.unet)}
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
    """Final error and FID to full precision with each correction, eta by eta."""
    found: dict[str, Any] = {}
    for eta in arguments.eta:
        reference = None
        for bits in arguments.bits:
            for seed in arguments.seeds:
                pipe, data = quantized("brecq", bits, seed, arguments)
                fitted = {name: fitted_by(step, pipe.unet, data) for name, step in passes().items()}
                if reference is None:
                    full = zoo.load("glyph-ddim")
                    protocol = dq.SamplingProtocol(
                        samples=arguments.samples, steps=STEPS, seed=1000, eta=eta, accumulation_samples=0
                    )
                    reference = run_reference(full, protocol, features=zoo.load("glyph-classifier"), data=zoo.load_statistics())
                    found |= measured(f"control eta {eta}", reference, full, NoiseEstimate())
                label = f"{bits} seed {seed} eta {eta}"
                found |= measured(f"{label} none", reference, pipe, None)
                for name, correction in fitted.items():
                    found |= measured(f"{label} {name}", reference, pipe, correction)
                write(arguments, found)
    return found


def passes() -> dict[str, Any]:
    return {
        "estimate": NoiseEstimate(),
        "estimate interval=5": NoiseEstimate(interval=5),
        "estimate once": NoiseEstimate(hold=False),
        "proportional": FitProportional(),
        "coefficients": FitCoefficients(),
        "coefficients without bias": FitCoefficients(input_bias=False),
    }


def fitted_by(step: Any, model: nn.Module, data: dq.Trajectory) -> Any:
    if isinstance(step, NoiseEstimate):
        return step
    with fit.run() as run:
        step.apply(model, data, torch.Generator().manual_seed(0), run)
    correction = model.correction
    del model.correction
    return correction


def measured(label: str, reference: ReferenceRun, pipe: Any, correction: Any) -> dict[str, Any]:
    """One row: `pipe` with a correction attached, against full precision."""
    attached = attach(pipe, correction) if correction is not None else None
    try:
        result = compare_to(reference, pipe, name=label)
    finally:
        detach(pipe)
    row = {
        "final_error": asdict(result.final_error),
        "median": asdict(result.final_error_median),
        "fid": asdict(result.to_reference.fid),
        "extra_calls_a_batch": attached.extra_calls if attached else 0,
    }
    print(
        f"{label}: final error {result.final_error.value:.4f} [{result.final_error.low:.4f}, {result.final_error.high:.4f}], "
        f"median {result.final_error_median.value:.4f}, FID to full precision {result.to_reference.fid.value:.3f} "
        f"(floor {reference.floor.fid.value:.2f})",
        flush=True,
    )
    return {label: row}


def write(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["layers", "corrections"])
    add_arguments(parser, Path("benchmarks/work/accuquant"), [])
    parser.add_argument("--eta", nargs="+", type=float, default=[0.0])
    arguments = parser.parse_args()
    arguments.out = arguments.out or Path(f"benchmarks/results/qncd-{arguments.what}.json")
    write(arguments, {"layers": layers, "corrections": corrections}[arguments.what](arguments))


if __name__ == "__main__":
    main()
