"""diffquant: post-training quantization for diffusion models.

Importing the package registers it with diffusers, so that `DiffusionPipeline.from_pretrained` loads packed checkpoints.
"""

from importlib.metadata import version

from diffquant.analysis.estimate import inspect
from diffquant.analysis.robustness import Robustness, robustness
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
from diffquant.host.conditions import Calibration
from diffquant.methods.accuquant import AccuQuant
from diffquant.methods.adp_dm.search import SearchParameterSets
from diffquant.methods.base import Pass
from diffquant.methods.bias_correction import CorrectBiases
from diffquant.methods.dmq import LearnEquivalentScaling, PowerOfTwoScaling
from diffquant.methods.mixed_precision import AllocateBits, AllocateWeightBits
from diffquant.methods.noise_correction import FitCoefficients, FitProportional, RuntimeNoiseEstimate
from diffquant.methods.qncd import EmbeddingSmoothing
from diffquant.methods.ranges import CalibrateRanges
from diffquant.methods.reconstruction import LearnScales, ReconstructRounding
from diffquant.quantization import QuantizationReport, quantize
from diffquant.recipe import Recipe, load_recipe
from diffquant.sampling.correction import attach, detach
from diffquant.sampling.protocol import SamplingProtocol
from diffquant.sampling.protocol_files import load_protocol
from diffquant.sampling.sample import sample

__version__ = version("diffquant")

hf.register()

__all__ = [
    "AccuQuant",
    "AllocateBits",
    "AllocateWeightBits",
    "CalibrateRanges",
    "Calibration",
    "CorrectBiases",
    "DiffquantError",
    "EmbeddingSmoothing",
    "FitCoefficients",
    "FitProportional",
    "Info",
    "LayerRule",
    "LayerSpec",
    "LearnEquivalentScaling",
    "LearnScales",
    "Pass",
    "PowerOfTwoScaling",
    "QuantSpec",
    "QuantizationReport",
    "Recipe",
    "ReconstructRounding",
    "Robustness",
    "RuntimeNoiseEstimate",
    "SamplingProtocol",
    "SearchParameterSets",
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
    "load_protocol",
    "load_recipe",
    "quantize",
    "record",
    "robustness",
    "sample",
    "save",
    "sensitivity",
    "use_engine",
    "verify",
]
