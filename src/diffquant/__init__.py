"""diffquant: post-training quantization for diffusion models.

Importing the package registers it with diffusers, so that `DiffusionPipeline.from_pretrained` loads packed checkpoints.
"""

from importlib.metadata import version

from diffquant.analysis.estimate import inspect
from diffquant.analysis.sensitivity import Sensitivity, sensitivity
from diffquant.calibration.record import record
from diffquant.calibration.recording import Trajectory
from diffquant.checkpoint import quantizer as hf
from diffquant.checkpoint.export import export
from diffquant.checkpoint.folder import load, save, verify
from diffquant.core.model import full_precision
from diffquant.core.spec import LayerRule, LayerSpec, QuantSpec
from diffquant.engines.base import engine, use_engine
from diffquant.engines.info import Info, info
from diffquant.errors import DiffquantError
from diffquant.evaluation.evaluate import evaluate
from diffquant.evaluation.robustness import Robustness, robustness
from diffquant.evaluation.sampling_protocol import SamplingProtocol
from diffquant.host.conditions import Calibration
from diffquant.quantization import QuantizationReport, quantize
from diffquant.recipe import Recipe, load_recipe
from diffquant.sampling.correction import attach, detach

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
