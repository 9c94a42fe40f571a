"""Importing ``latemax.viz`` does not import matplotlib."""

import sys

import latemax.viz  # noqa: F401

assert "matplotlib" not in sys.modules
