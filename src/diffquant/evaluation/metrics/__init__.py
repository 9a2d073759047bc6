"""The metrics of an evaluation, one file each: to add one is to add a file."""

from __future__ import annotations

from diffquant.evaluation.metrics.base import Metric as Metric
from diffquant.evaluation.metrics.base import registered as registered
