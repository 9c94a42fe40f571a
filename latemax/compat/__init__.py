"""The scoring functions of host libraries, with the hosts' own names and signatures, computed by latemax.

Every host has a module: ``latemax.compat.colpali_engine.score_multi_vector(qs, ps)``. No host is imported by it.
``padding="exact"`` (the default) never lets zero padding win a maximum and gives float32 scores; ``padding="host"``
follows the host's rule and dtype. ``patch`` replaces the functions inside the host.
"""

from __future__ import annotations

from latemax.compat._patching import Patch, patch

__all__ = ["Patch", "patch"]
