"""What each step of the sampler makes of an error of the denoiser's output: what `error: latent` counts by.

    python benchmarks/step_gain.py
    python benchmarks/step_gain.py --steps 20 --trajectories 8

Squared, mean over values, and over steps 1; of guided calls one half (the other differs by a factor).
"""

import argparse
import json
from pathlib import Path

import torch
from compare import with_scheduler
from rich.console import Console
from rich.table import Table

import diffquant as dq
from diffquant import zoo
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
    pipe = with_scheduler(zoo.load(model), scheduler)
    data = dq.record(pipe, dq.Calibration(samples=trajectories, steps=steps, seed=0, guidance_scale=guidance))
    rows = (data.half_of() == (1 if int(data.half_of().max()) == 1 else -1)).nonzero()[:, 0]
    found, calls = StepGain(Host(pipe).denoiser, data).sizes(rows).square(), data.call_of()[rows]
    means = torch.stack([found[calls == call].mean() for call in range(int(calls.max()) + 1)])
    return [float(value) for value in means / means.mean()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--trajectories", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step_gain.json"))
    arguments = parser.parse_args()
    found = {name: squares(*setting, arguments.steps, arguments.trajectories) for name, setting in SETTINGS.items()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1))
    table = Table("step", *found)
    for step in sorted({round(share * (arguments.steps - 1)) for share in (0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1)}):
        table.add_row(str(step + 1), *(f"{values[step]:.3f}" if step < len(values) else "" for values in found.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
