"""The ``latemax`` command; ``latemax.cli:main`` is its entry point."""

from latemax.cli.main import main

__all__ = ["main"]
