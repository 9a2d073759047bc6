"""What a frozen model computes with: engines, and what this machine multiplies exactly."""

from diffquant.engines.base import check_engine, engine, engine_names, engine_of, use_engine

__all__ = ["check_engine", "engine", "engine_names", "engine_of", "use_engine"]
