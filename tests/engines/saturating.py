"""Every layer of `layer_cases` by engines int8 and openvino with kernels that add products in 16 bits, and an export with and
without respect to them; run by test_exactness.

The process has the switches in its environment that give PyTorch and OpenVINO such kernels on any x86 processor.
"""

import copy
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler

import diffquant as dq
import pipelines
from diffquant.core.spec import LayerRule
from diffquant.engines import exactness
from diffquant.errors import CheckpointError
from layer_cases import CASES, OF_SETS, TIMESTEPS, assert_equal_but_for_edges, make_layers, sample

torch.set_num_threads(1)
KERNELS = ("torch linear", "torch convolution", "openvino linear", "openvino convolution", "openvino attention")


@torch.no_grad()
def main() -> None:
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        sys.exit("ATEN_CPU_CAPABILITY=avx2 does not act")
    for kernel in KERNELS:
        if exactness.answer_of(kernel).exact[:2] != (exactness.PORTABLE, exactness.ALL):
            sys.exit(f"ONEDNN_MAX_CPU_ISA=AVX2 does not act: {exactness.answer_of(kernel)}")
    models = {"one set": make_layers(list(CASES.values())), "three sets": make_layers(list(OF_SETS.values()), TIMESTEPS)}
    for text, model in models.items():
        x, timestep = sample(3, seed=1), torch.tensor([100, 500, 900])
        expected = model(x, timestep)
        for engine in ("int8", "openvino"):
            computed = copy.deepcopy(model)
            dq.use_engine(computed, engine)
            outputs = computed(x, timestep)
            dq.use_engine(computed, "simulate")
            names = list(CASES if model is models["one set"] else OF_SETS)
            for index, (name, layer) in enumerate(zip(names, computed.layers, strict=True)):
                layer_input = x if isinstance(layer, torch.nn.Conv2d) else x.flatten(2).transpose(1, 2)
                model.diffquant.clock.set_timestep(timestep)
                try:
                    assert_equal_but_for_edges(layer, layer_input, expected[index], outputs[index])
                except AssertionError as error:
                    sys.exit(f"{engine}, {text}, {name}: {error}")
            print(f"{engine}, {text}: {len(names)} layers are exact")
    pipe = DDIMPipeline(
        pipelines.freeze_by_hand(pipelines.micro().unet, rules=[LayerRule(match="@all", weight_bits=8)]), DDIMScheduler()
    )
    with tempfile.TemporaryDirectory() as folder:
        report = dq.export(pipe, f"{folder}/exact")
        print(f"exact: {report.error:.2g} of {report.allowed:.2g} allowed, pair {report.pair}")
        try:
            report = dq.export(pipe, f"{folder}/single", form="single")
        except CheckpointError as error:
            print(f"single: {error}")
        else:
            sys.exit(f"a file that saturates was written: {report}")
        if [path.name for path in Path(folder).iterdir()] != ["exact"]:
            sys.exit("a file that was refused was kept")


if __name__ == "__main__":
    main()
