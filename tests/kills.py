"""Kill record, quantize, save and evaluate at moments drawn from a seed, run them again, and compare with runs without a kill.

    python tests/kills.py --kills 100 --seed 0 --work FOLDER

The commands run in forked processes of this one, in order, on a small pipeline. After a kill what was there before has to be whole:
the checkpoint that the command replaces, and what it had finished. Run again, it has to end with the same bytes of tensors and the
same figures as without a kill. Outcomes are kept in FOLDER: a killed run of this goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from safetensors.torch import load_file

import diffquant as dq
import pipelines
from diffquant.cli import app
from diffquant.errors import DiffquantError

TIMES = ("seconds", "memory", "date", "_name_or_path")  # parts of keys that differ between equal runs
RECIPE = ("--set", "passes.0.samples=32", "--set", "passes.1.iterations=30", "--set", "passes.1.samples=32")
RECIPE = (*RECIPE, "--set", "passes.2.iterations=10", "--set", "passes.2.samples=32")


def command(*arguments: str) -> Callable[[], None]:
    return lambda: app([*arguments], standalone_mode=False)


def steps_in(folder: Path, model: Path) -> dict[str, Callable[[], None]]:
    """The commands by name, working in `folder`."""
    record = ["record", str(model), "--out", str(folder / "rec"), "--samples", "48", "--steps", "4"]
    quantize = ["quantize", str(model), "--recipe", "brecq-w4a8", "--data", str(folder / "rec"), "--work", str(folder / "work")]
    evaluate = ["evaluate", str(folder / "out"), "--reference", str(model), "--out", str(folder / "report")]

    def save() -> None:  # a checkpoint that takes the place of another, again and again
        pipe = dq.load(folder / "out", engine="simulate")
        for _ in range(20):
            dq.save(pipe, folder / "saved")

    return {
        "record": command(*record),
        "quantize": command(*quantize, "--out", str(folder / "out"), *RECIPE),
        "save": save,
        "evaluate": command(*evaluate, "--samples", "16", "--steps", "4"),
    }


def run_forked(work: Callable[[], None], seconds: float | None = None) -> tuple[bool, float]:
    """Run `work` in a process of its own, killed after `seconds`; whether it came to its end, and how long it took."""
    begun = time.monotonic()
    if (child := os.fork()) == 0:
        code = 1
        with contextlib.suppress(BaseException), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            work()
            code = 0
        os._exit(code)
    while seconds is None or time.monotonic() - begun < seconds:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if status:
                raise RuntimeError(f"ended with status {status}")
            return True, time.monotonic() - begun
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False, time.monotonic() - begun


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(member) for key, member in value.items() if not any(name in key for name in TIMES)}
    return [without_times(member) for member in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, Any]:
    """Tensors and figures of everything below a folder, without what differs between equal runs."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors":
            found[name] = {key: tensor for key, tensor in load_file(file).items()}
        elif file.suffix == ".json":
            found[name] = without_times(json.loads(file.read_text()))
        elif file.is_file() and file.suffix == ".png":
            found[name] = file.stat().st_size
    return found


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """The first thing that differs, "" where nothing does."""
    if ours.keys() != theirs.keys():
        return f"files: {sorted(ours.keys() ^ theirs.keys())[:3]}"
    for name, value in ours.items():
        other = theirs[name]
        if name.endswith(".safetensors"):
            if value.keys() != other.keys() or not all(torch.equal(tensor, other[key]) for key, tensor in value.items()):
                return name
        elif value != other:
            return name
    return ""


def attempt(number: int, seed: int, honest: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """Kill one command at one moment, see what is left, and run it again."""
    draw = random.Random(f"{seed}/{number}")
    name = list(seconds)[number % len(seconds)]
    moment = draw.random() * seconds[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for made in PARTS["before"][name]:
            shutil.copytree(honest / made, folder / made)
        if name == "quantize":  # over another checkpoint
            shutil.copytree(honest / "saved", folder / "out")
        if name == "save":
            shutil.copytree(honest / "saved", folder / "saved")
        before = {made: contents(folder / made) for made in PARTS["before"][name]}
        work = steps_in(folder, honest / "model")[name]
        ended, _ = run_forked(work, moment)
        wrong = ""
        for made, content in before.items():
            wrong = wrong or difference(contents(folder / made), content)
        replaced = {"quantize": "out", "save": "saved"}.get(name)
        if replaced:
            found = [place for place in folder.iterdir() if place.name == replaced or place.name.startswith(f"{replaced}.old")]
            wrong = wrong or ("" if any(map(whole, found)) else f"no whole checkpoint among {[place.name for place in found]}")
        if not wrong:
            run_forked(work)
            made = PARTS["makes"][name]
            wrong = difference(contents(folder / made), contents(honest / made))
        return {"number": number, "command": name, "killed": not ended, "moment": round(moment, 3), "wrong": wrong}


def whole(folder: Path) -> bool:
    try:
        dq.verify(folder)
    except DiffquantError:
        return False
    return True


PARTS: dict[str, dict[str, Any]] = {
    "before": {"record": (), "quantize": ("rec",), "save": ("out",), "evaluate": ("out",)},
    "makes": {"record": "rec", "quantize": "out", "save": "saved", "evaluate": "report"},
}


def run(kills: int, seed: int, work: Path, show: bool = True) -> list[dict[str, Any]]:
    """Outcomes of the kills 0 to `kills` - 1."""
    torch.set_num_threads(1)  # what is forked must not wait for threads that were not
    work.mkdir(parents=True, exist_ok=True)
    kept = work / f"kills-{seed}.jsonl"
    done = (
        {result["number"]: result for line in kept.read_text().splitlines() if (result := json.loads(line))}
        if kept.exists()
        else {}
    )
    with tempfile.TemporaryDirectory() as folder, Progress(disable=not show) as progress, kept.open("a") as out:
        honest = Path(folder)
        run_forked(lambda: pipelines.ddim().save_pretrained(honest / "model"))
        seconds = {}
        for name, step in steps_in(honest, honest / "model").items():
            if name == "save":
                shutil.copytree(honest / "out", honest / "saved")
            seconds[name] = run_forked(step)[1]
        task = progress.add_task("kills", total=kills)
        for number in range(kills):
            if number not in done:
                done[number] = attempt(number, seed, honest, seconds)
                out.write(json.dumps(done[number]) + "\n")
                out.flush()
            progress.advance(task)
    return [done[number] for number in range(kills)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    results = run(arguments.kills, arguments.seed, arguments.work)
    for result in results:
        if result["wrong"]:
            print(json.dumps(result))
    counts = Counter(f"{result['command']} {'wrong' if result['wrong'] else 'whole'}" for result in results)
    killed = sum(result["killed"] for result in results)
    print(f"{killed} of {len(results)} killed before they ended; {', '.join(f'{n} {what}' for what, n in sorted(counts.items()))}")
    sys.exit(1 if any(result["wrong"] for result in results) else 0)


if __name__ == "__main__":
    main()
