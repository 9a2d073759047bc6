"""The typed errors: each is the user's to mend, and its text is one line."""

from __future__ import annotations


class DiffquantError(ValueError):
    """Base of every error that is the user's to mend; its text is one line: where, what was found, what is allowed, what to do."""


class SpecError(DiffquantError):
    """A layer cannot be quantized as asked."""


class CalibrationError(DiffquantError):
    """Calibration data are missing, damaged, or of another model."""


class RecipeError(DiffquantError):
    """A recipe is not one that can be run."""


class CheckpointError(DiffquantError):
    """A packed checkpoint cannot be written or read."""


class EvaluationError(DiffquantError):
    """Two things cannot be compared."""


class ZooError(DiffquantError):
    """A reference model cannot be trained or found."""
