"""What each step of the sampler makes of an error of the denoiser's output: what `error: latent` counts by.

    python benchmarks/step_gain.py
    python benchmarks/step_gain.py --steps 20 --trajectories 8

Squared, mean over values, and over steps 1; of guided calls one half (the other differs by a factor).
"""

import argparse

import rows
import study as studies
import torch
from rich.console import Console
from rich.table import Table

import diffquant as dq
from diffquant.calibration.gain import StepGain
from diffquant.host.pipeline import Host

SETTINGS = {  # model, guidance scale, changed options of its scheduler
    "glyph-ddim": ("glyph-ddim", None, []),
    "glyph-ddim, no clipping": ("glyph-ddim", None, ["clip_sample=false"]),
    "glyph-sd, guidance 3": ("glyph-sd", 3.0, []),
    "glyph-dit, guidance 3": ("glyph-dit", 3.0, []),
}


def squares(model: str, guidance: float | None, scheduler: list[str], steps: int, trajectories: int) -> list[float]:
    """The squared gain of each step."""
    pipe = studies.pipeline(model, studies.options_of(scheduler))
    data = dq.record(pipe, dq.Calibration(samples=trajectories, steps=steps, seed=0, guidance_scale=guidance))
    halves = (data.half_of == (1 if int(data.half_of.max()) == 1 else -1)).nonzero()[:, 0]
    found, calls = StepGain(Host(pipe).denoiser, data).sizes(halves).square(), data.call_of[halves]
    means = torch.stack([found[calls == call].mean() for call in range(int(calls.max()) + 1)])
    return [float(value) for value in means / means.mean()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--trajectories", type=int, default=8)
    arguments = parser.parse_args()
    found = {name: squares(*setting, arguments.steps, arguments.trajectories) for name, setting in SETTINGS.items()}
    for name, values in found.items():
        new = [{"setting": name, "step": step, "squared_gain": value} | rows.provenance() for step, value in enumerate(values)]
        rows.put(rows.RESULTS / "step-gain.csv", new, ("setting", "step"))
    table = Table("step", *found)
    for step in sorted({round(share * (arguments.steps - 1)) for share in (0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1)}):
        table.add_row(str(step + 1), *(f"{values[step]:.3f}" if step < len(values) else "" for values in found.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
