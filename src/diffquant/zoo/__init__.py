"""Reference models trained by this project on real data, small enough to ship."""

from diffquant.zoo.models import load, load_statistics

__all__ = ["load", "load_statistics"]
