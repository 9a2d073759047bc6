"""Training of the reference models that come with the package: ``python -m tools.train_zoo glyph-ddim --out zoo/``."""
