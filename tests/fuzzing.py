"""Damage what diffquant writes and reads, in ways drawn from a seed, and see that nothing damaged is taken for whole.

    python tests/fuzzing.py --mutations 10000 --seed 0 --work FOLDER

Damaged are checkpoints (bytes of shards, values of the quantization_config, shards exchanged), recordings, finished passes and
recipes. Every mutation is read in a process that is forked for some of them. Its outcome is one of: refused (one line), same (what
was read equals the undamaged), or a fault: silent (read, and different), traceback, hang, memory (more than reading the undamaged
takes), crash. Outcomes are kept in FOLDER: a killed run goes on, and `--only N` repeats one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import json
import os
import random
import resource
import select
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from rich.progress import Progress
from safetensors.torch import load_file, save_file

import diffquant as dq
import pipelines
from diffquant.calibration import fit
from diffquant.core.model import quantizers
from diffquant.core.spec import LayerRule
from diffquant.errors import DiffquantError
from diffquant.files import shipped

WEIGHTS = "diffusion_pytorch_model"
SECONDS = 20.0  # a mutation that takes longer hangs
MEBIBYTES = 96  # that a mutation may take beyond the most that any undamaged reading takes
BLOCK = 50  # mutations of one forked process
GOOD = ("refused", "same")
NUMBERS = (0, -1, 3, 10**12, 1e308, -1e-9, float("nan"), float("inf"))
VALUES: tuple[Any, ...] = (None, True, *NUMBERS, "", "x" * 100_000, "../../etc/passwd", [], [[]], {}, {"a": 1})


def prepare(folder: Path) -> dict[str, str]:
    """Undamaged files of every kind in `folder`, and a digest of what reading each gives."""
    rules = [LayerRule(match="@all", sets=2), LayerRule(match="@attention", sets=2)]
    for number in (0, 1):
        model = pipelines.freeze_by_hand(pipelines.micro(number).unet, sets=2, rules=rules)
        for _, quantizer in quantizers(model):
            if quantizer.rows == 2:
                quantizer.scale.mul_(torch.tensor([1.0, 2.0])[:, None])
        dq.save(model, folder / f"model-{number}", max_shard_size=4000)
        dq.save(DDIMPipeline(model, DDIMScheduler()), folder / f"pipe-{number}")
    calibration = dq.Calibration(samples=4, steps=2, batch_size=2)
    recorded = dq.record(pipelines.micro(), calibration, folder=folder / "recording", progress=False)
    recipe = dq.load_recipe("minmax-w4a8", ["passes.0.samples=8"])
    dq.quantize(pipelines.micro(), recipe, recorded, folder=folder / "passes", progress=False)
    (folder / "recipes").mkdir()
    for name in shipped("recipes"):
        (folder / "recipes" / f"{name}.yaml").write_text((Path(dq.__file__).parent / "recipes" / f"{name}.yaml").read_text())
    return {kind: read(folder / kind) for kind, (read, _) in KINDS.items()}


def of_model(model: Any) -> str:
    """A digest of what a quantized model computes with."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    specs = {name: quantizer.spec.model_dump() for name, quantizer in quantizers(model)}
    digest.update(json.dumps([specs, model.diffquant.clock.timesteps], sort_keys=True).encode())
    return digest.hexdigest()


def read_model(folder: Path) -> str:
    return of_model(dq.load(folder, engine="simulate"))


def read_by_diffusers(folder: Path) -> str:
    return of_model(UNet2DModel.from_pretrained(folder))


def read_verified(folder: Path) -> str:
    dq.verify(folder)
    return "verified"


def read_recording(folder: Path) -> str:
    data = dq.Trajectory.open(folder)
    digest = hashlib.sha256(json.dumps([data.manifest, data.timesteps, data.step_count], sort_keys=True).encode())
    arguments, output = data.batch(torch.arange(len(data)))
    tensors = {**arguments, "output": output}
    for k in range(data.step_count):
        step = data.step(torch.arange(data.manifest["calibration"]["samples"]), k)
        tensors |= {f"sample {k}": step.sample, f"prev {k}": step.prev_sample, f"t {k}": step.timestep}
        digest.update(json.dumps(step.options, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return digest.hexdigest()


def read_pass(folder: Path) -> str:
    tensors, metadata = fit.load_tensors(next(folder.glob("*.safetensors")))
    values = {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in tensors.items()}
    return json.dumps([values, metadata], sort_keys=True)


def read_recipes(folder: Path) -> str:
    """A recipe is the user's: one that reads differently is another recipe, so any that reads is as good as the same."""
    for file in sorted(folder.glob("*.yaml")):
        dq.load_recipe(str(file))
    return "recipes"


def damage_bytes(draw: random.Random, file: Path) -> str:
    """Flip, drop, repeat, blank or add bytes."""
    data = bytearray(file.read_bytes())
    kind = draw.choice(("flip", "flip", "flip", "truncate", "blank", "drop", "repeat", "add"))
    place, length = draw.randrange(max(1, len(data))), draw.choice((1, 4, 64, 1024))
    if kind == "flip":
        for _ in range(draw.choice((1, 1, 2, 8))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "truncate":
        del data[place:]
    elif kind == "blank":
        data[place : place + length] = bytes(len(data[place : place + length]))
    elif kind == "drop":
        del data[place : place + length]
    elif kind == "repeat":
        data[place:place] = data[place : place + length]
    else:
        data[place:place] = draw.randbytes(length)
    file.write_bytes(bytes(data))
    return f"{kind} in {file.name}"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in a JSON value."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        yield (*path, key)
        yield from places(member, (*path, key))


def damage_json(draw: random.Random, value: Any) -> str:
    """Replace, remove, double or exchange members of a JSON value."""
    *above, last = draw.choice(list(places(value)))
    holder = functools.reduce(lambda inner, key: inner[key], above, value)
    kind = draw.choice(("replace", "replace", "nudge", "remove", "double", "exchange"))
    if kind == "replace":
        holder[last] = copy.deepcopy(draw.choice(VALUES))
    elif kind == "nudge" and isinstance(holder[last], int | float) and not isinstance(holder[last], bool):
        holder[last] += draw.choice((-1, 1, 1e-6))
    elif kind == "remove":
        del holder[last]
    elif kind == "double" and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[last]))
    else:
        other = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[last], holder[other] = holder[other], holder[last]
    return f"{kind} at {'.'.join(map(str, (*above, last)))}"


def damage_json_file(draw: random.Random, file: Path, below: str | None = None) -> str:
    whole = json.loads(file.read_text())
    said = damage_json(draw, whole if below is None else whole[below])
    file.write_text(json.dumps(whole))
    return f"{said} of {file.name}"


def damage_header(draw: random.Random, file: Path) -> str:
    """The JSON at the beginning of a safetensors file."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for key in ("layout", "row"):  # JSON in JSON
        if key in header.get("__metadata__", {}) and draw.random() < 0.5:
            inner = json.loads(header["__metadata__"][key])
            said = damage_json(draw, inner)
            header["__metadata__"][key] = json.dumps(inner)
            break
    else:
        said = damage_json(draw, header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return f"{said} of the header of {file.name}"


def damage_tensor(draw: random.Random, file: Path) -> str:
    """Change one tensor, and write a whole file with the metadata as they were."""
    with file.open("rb") as opened:
        metadata = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))["__metadata__"]
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    name = draw.choice(sorted(tensors))
    kind = draw.choice(("value", "drop", "rename", "reshape", "dtype"))
    if kind == "value" and tensors[name].numel():
        flat = tensors[name].view(-1)
        flat[draw.randrange(len(flat))] = draw.choice((0, 1, 100))
    elif kind == "drop":
        del tensors[name]
    elif kind == "rename":
        tensors[name + "x"] = tensors.pop(name)
    elif kind == "reshape":
        tensors[name] = tensors[name].reshape(1, -1)
    else:
        tensors[name] = tensors[name].to(torch.float16)
    save_file(tensors, file, metadata)
    return f"{kind} of {name} in {file.name}"


def exchange_files(draw: random.Random, folder: Path, other: Path) -> str:
    """Exchange, double, lose or take from another checkpoint one of the shards."""
    files = sorted(folder.glob("*.safetensors"))
    one, two = draw.choice(files), draw.choice(files)
    kind = draw.choice(("exchange", "copy", "lose", "rename", "foreign", "add"))
    if kind == "exchange":
        content = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(content)
    elif kind == "copy":
        one.write_bytes(two.read_bytes())
    elif kind == "lose":
        one.unlink()
    elif kind == "rename":
        one.rename(one.with_name(f"{WEIGHTS}-of.safetensors"))
    elif kind == "foreign":
        one.write_bytes((other / one.relative_to(folder)).read_bytes())
    else:
        shutil.copy(one, one.with_name("more.safetensors"))
    return f"{kind} {one.name} {two.name}"


def damage_model(draw: random.Random, folder: Path, honest: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    return draw.choice(
        (
            lambda: damage_bytes(draw, draw.choice(files)),
            lambda: damage_header(draw, draw.choice(files)),
            lambda: damage_tensor(draw, draw.choice(files)),
            lambda: damage_json_file(draw, folder / "config.json", "quantization_config"),
            lambda: damage_json_file(draw, folder / f"{WEIGHTS}.safetensors.index.json"),
            lambda: exchange_files(draw, folder, honest.with_name("model-1")),
        )
    )()


def damage_pipe(draw: random.Random, folder: Path, honest: Path) -> str:
    file = draw.choice([file for file in sorted(folder.rglob("*")) if file.is_file()])
    return damage_json_file(draw, file) if file.suffix == ".json" and draw.random() < 0.5 else damage_bytes(draw, file)


def damage_recording(draw: random.Random, folder: Path, honest: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    return draw.choice(
        (
            lambda: damage_bytes(draw, draw.choice([*files, folder / "manifest.json"])),
            lambda: damage_header(draw, draw.choice(files)),
            lambda: damage_tensor(draw, draw.choice(files)),
            lambda: damage_json_file(draw, folder / "manifest.json"),
            lambda: exchange_files(draw, folder, honest),
        )
    )()


def damage_pass(draw: random.Random, folder: Path, honest: Path) -> str:
    file = next(folder.glob("*.safetensors"))
    return draw.choice((damage_bytes, damage_header, damage_tensor))(draw, file)


def damage_recipe(draw: random.Random, folder: Path, honest: Path) -> str:
    file = draw.choice(sorted(folder.glob("*.yaml")))
    lines = file.read_text().splitlines()
    at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    kind = draw.choice(("bytes", "remove", "double", "exchange", "value"))
    if kind == "bytes":
        return damage_bytes(draw, file)
    if kind == "remove":
        del lines[at]
    elif kind == "double":
        lines.insert(other, lines[at])
    elif kind == "exchange":
        lines[at], lines[other] = lines[other], lines[at]
    else:
        head, colon, _ = lines[at].rpartition(":")
        lines[at] = f"{head}{colon} {json.dumps(draw.choice(VALUES))}" + "}" * ("{" in head)
    file.write_text("\n".join(lines))
    return f"{kind} of line {at} of {file.name}"


Damage = Callable[[random.Random, Path, Path], str]
KINDS: dict[str, tuple[Callable[[Path], str], Damage]] = {
    "model-0": (read_model, damage_model),
    "pipe-0": (read_verified, damage_pipe),
    "recording": (read_recording, damage_recording),
    "passes": (read_pass, damage_pass),
    "recipes": (read_recipes, damage_recipe),
}


def attempt(number: int, seed: int, honest: Path, digests: dict[str, str]) -> dict[str, Any]:
    """Outcome of one mutation."""
    draw = random.Random(f"{seed}/{number}")
    kind = draw.choices(list(KINDS), (5, 1, 2, 1, 1))[0]
    read, damage = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(shutil.copytree(honest / kind, Path(folder) / kind))
        said = damage(draw, copied, honest / kind)
        by_diffusers = kind == "model-0" and draw.random() < 0.3
        line = ""
        try:
            found = read_by_diffusers(copied) if by_diffusers else read(copied)
            outcome = "same" if found == digests[kind] else "silent"
        except DiffquantError as error:
            outcome, line = "refused", str(error)
        except Exception as error:
            outcome, line = "traceback", "".join(traceback.format_exception(error)[-4:])
            own = Path(dq.__file__).parent
            if by_diffusers and not any(own in Path(one.filename).parents for one in traceback.extract_tb(error.__traceback__)):
                outcome = "refused"  # by diffusers, before it asked us
    return {"number": number, "kind": kind, "damage": said, "outcome": outcome, "line": line[-600:]}


def in_fork(numbers: list[int], seed: int, honest: Path, digests: dict[str, str], limit: int) -> Iterator[dict[str, Any]]:
    """Outcomes of some mutations in a process of their own, which is watched; one that ends it is the last."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), os.fdopen(writing, "w") as out, open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            for number in numbers:
                result = attempt(number, seed, honest, digests)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
                if peak > limit:
                    result |= {"outcome": "memory", "line": f"{peak} MiB; {limit} allowed"}
                out.write(json.dumps(result) + "\n")
                out.flush()
                if peak > limit:
                    break
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as lines:
        for number in numbers:
            ready = select.select([lines], [], [], SECONDS)[0]
            line = lines.readline() if ready else ""
            if not line:
                os.kill(child, 9)
                os.waitpid(child, 0)
                yield {"number": number, "kind": "", "damage": "", "outcome": "crash" if ready else "hang", "line": ""}
                return
            result = json.loads(line)
            yield result
            if result["outcome"] == "memory":
                break
    os.waitpid(child, 0)


def peak_of(honest: Path) -> int:
    """MiB at the peak of a process that reads everything undamaged."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        for kind, (read, _) in KINDS.items():
            read(honest / kind)
        os.write(writing, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024).encode())
        os._exit(0)
    os.waitpid(child, 0)
    peak = int(os.read(reading, 100))
    os.close(reading)
    os.close(writing)
    return peak


def run(mutations: int, seed: int, work: Path, show: bool = True) -> Counter[str]:
    """Outcomes of the mutations 0 to `mutations` - 1, by how often."""
    torch.set_num_threads(1)  # what is forked must not wait for threads that were not
    work.mkdir(parents=True, exist_ok=True)
    kept = work / f"outcomes-{seed}.jsonl"
    done = {}
    if kept.exists():
        done = {result["number"]: result for line in kept.read_text().splitlines() if (result := json.loads(line))}
    with tempfile.TemporaryDirectory() as folder, Progress(disable=not show) as progress, kept.open("a") as out:
        honest = Path(folder)
        digests = prepare(honest)
        limit = peak_of(honest) + MEBIBYTES
        missing = [number for number in range(mutations) if number not in done]
        task = progress.add_task("mutations", total=mutations, completed=mutations - len(missing))
        while missing:
            for result in in_fork(missing[:BLOCK], seed, honest, digests, limit):
                done[result["number"]] = result
                out.write(json.dumps(result) + "\n")
                out.flush()
                progress.advance(task)
            missing = [number for number in missing if number not in done]
    return Counter(done[number]["outcome"] for number in range(mutations))


def faults(seed: int, work: Path) -> list[dict[str, Any]]:
    """What went wrong."""
    results = [json.loads(line) for line in (work / f"outcomes-{seed}.jsonl").read_text().splitlines()]
    return [result for result in results if result["outcome"] not in GOOD]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", type=int, help="number of a mutation to repeat, with its traceback")
    arguments = parser.parse_args()
    if arguments.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(attempt(arguments.only, arguments.seed, Path(folder), prepare(Path(folder))), indent=1))
        return
    counts = run(arguments.mutations, arguments.seed, arguments.work)
    for result in faults(arguments.seed, arguments.work)[:20]:
        print(f"{result['number']} {result['outcome']}: {result['kind']}: {result['damage']}\n  {result['line'][-300:]}")
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    sys.exit(0 if set(counts) <= set(GOOD) else 1)


if __name__ == "__main__":
    main()
