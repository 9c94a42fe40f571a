"""``latemax demo``: real photos through a real ViT without CLS, with crops as queries, scored by ``maxsim``."""

from latemax.demo.pipeline import run

__all__ = ["run"]
