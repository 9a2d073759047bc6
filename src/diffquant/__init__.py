"""diffquant: post-training quantization for diffusion models.

Importing the package registers it with diffusers, so that `DiffusionPipeline.from_pretrained` loads packed checkpoints.
"""

from importlib.metadata import version

from diffquant.calibration.observe import Calibration
from diffquant.calibration.record import record
from diffquant.calibration.trajectory import Trajectory
from diffquant.core.spec import DiffquantError, LayerRule, LayerSpec, QuantSpec
from diffquant.core.surgery import full_precision
from diffquant.evaluation.evaluate import evaluate
from diffquant.evaluation.robustness import Robustness, robustness
from diffquant.evaluation.sampling_protocol import SamplingProtocol
from diffquant.quantization import QuantizationReport, quantize
from diffquant.recipe import Recipe, load_recipe
from diffquant.runtime import hf
from diffquant.runtime.checkpoint import load, save, verify
from diffquant.runtime.correction import attach, detach
from diffquant.runtime.engines import engine, use_engine
from diffquant.runtime.estimate import inspect
from diffquant.runtime.export import export
from diffquant.runtime.info import Info, info
from diffquant.runtime.sensitivity import Sensitivity, sensitivity

__version__ = version("diffquant")

hf.register()

__all__ = [
    "Calibration",
    "DiffquantError",
    "Info",
    "LayerRule",
    "LayerSpec",
    "QuantSpec",
    "QuantizationReport",
    "Recipe",
    "Robustness",
    "SamplingProtocol",
    "Sensitivity",
    "Trajectory",
    "attach",
    "detach",
    "engine",
    "evaluate",
    "export",
    "full_precision",
    "info",
    "inspect",
    "load",
    "load_recipe",
    "quantize",
    "record",
    "robustness",
    "save",
    "sensitivity",
    "use_engine",
    "verify",
]
