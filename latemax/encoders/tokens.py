"""What an encoder returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .adapters.base import Grid


class _Fields(NamedTuple):
    tokens: Tensor
    mask: Tensor
    grid: Grid | list[Grid]
    prefix: Tensor | None = None


class PatchTokens(_Fields):
    """Patch tokens of a batch of images: a named tuple ``(tokens, mask, grid, prefix)`` that knows the images' crops.

    Attributes:
        tokens: ``[b, n, dim]``, row-major over the grid; padded patches are zero.
        mask: Bool ``[b, n]``, True = a real patch.
        grid: ``(rows, cols)``; one per image where images differ.
        prefix: ``[b, p, dim]``: class, distillation and register tokens, when asked for.
        crop: Float32 ``[b, 4]``, the part of each upright image that its grid covers, as fractions
            ``(left, top, right, bottom)``: ``(0, 0, 1, 1)`` is the whole image. None where the encoder did not
            preprocess the images itself, or by a rule unknown to it.
    """

    crop: Tensor | None = None
