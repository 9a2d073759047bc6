"""Runtimes that a quantized denoiser is written for: a file for each, which registers its target."""
