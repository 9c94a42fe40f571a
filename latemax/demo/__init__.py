"""`latemax demo`: real photos through a real ViT with its CLS dropped, crops as queries, scored with `maxsim`."""

from latemax.demo.pipeline import run

__all__ = ["run"]
