"""What an encoder returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .adapters.base import Grid


class PatchTokens(NamedTuple):
    """Patch tokens of a batch of images."""

    tokens: Tensor  # [b, n, dim], row-major over the grid; padded patches are zero
    mask: Tensor  # [b, n] bool, True = a real patch
    grid: Grid | list[Grid]  # (rows, cols); one per image where a padded batch mixes sizes
    prefix: Tensor | None = None  # [b, p, dim]: class, distillation and register tokens, when asked for
