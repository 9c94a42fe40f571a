"""What an encoder returns."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Fields(NamedTuple):
    tokens: Tensor
    mask: Tensor
    grid: Any
    prefix: Tensor | None = None


class PatchTokens(_Fields):
    """Patch tokens of a batch of images: a named tuple ``(tokens, mask, grid, prefix)`` that knows the images' crops.

    Attributes:
        tokens: ``[b, n, dim]``, row-major over the grid; padded patches are zero.
        mask: Bool ``[b, n]``, True = a real patch.
        grid: ``(rows, cols)``; a list of them, one per image, where images differ. None in the list where the patches
            of an image are no single grid (a retriever's tiles), so that only ``regions`` places them.
        prefix: ``[b, p, dim]``: class, distillation and register tokens, when asked for.
        crop: Float32 ``[b, 4]``, the part of each upright image that its grid covers, as fractions
            ``(left, top, right, bottom)``: ``(0, 0, 1, 1)`` is the whole image. None where the encoder did not
            preprocess the images itself, or by a rule unknown to it.
        is_patch: Bool ``[b, n]``, True = a part of the image; False for text and special tokens of a retriever's image
            side and for padding. None where every token is a patch.
        regions: Float32 ``[b, n, 4]``, the part of the upright image that every token shows, as fractions
            ``(left, top, right, bottom)``; NaN where ``is_patch`` is False. None where ``grid`` and ``crop`` say it.
        model_id: The model that made the tokens; None where it has no name.
        space: What the tokens may be compared with; see ``PatchEncoder.space``.
    """

    crop: Tensor | None = None
    is_patch: Tensor | None = None
    regions: Tensor | None = None
    model_id: str | None = None
    space: str | None = None


class _TextFields(NamedTuple):
    tokens: Tensor
    mask: Tensor
    pieces: list[list[str]]
    word_of: Tensor


class TextTokens(_TextFields):
    """Tokens of a batch of texts: a named tuple ``(tokens, mask, pieces, word_of)``.

    Attributes:
        tokens: ``[b, n, dim]``, a row per word piece; padding is zero. ``n`` is at least 1, also where no text has a
            piece.
        mask: Bool ``[b, n]``, True = a token that is scored.
        pieces: The text of every token, for display: ``pieces[i][j]`` belongs to ``tokens[i, j]``.
        word_of: Int64 ``[b, n]``, the word each piece is a part of, as an index into ``words[i]``; -1 for padding and
            for tokens that are not part of the text.
        words: The words of every text, split at white space.
        model_id: The model that made the tokens; None where it has no name.
        space: What the tokens may be compared with; see ``PatchEncoder.space``.
    """

    words: list[list[str]]
    model_id: str | None = None
    space: str | None = None


def l2_normalize(tokens: Tensor) -> Tensor:
    """Every token divided by its length, computed in float32 or more, returned in the tokens' dtype."""
    wide = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    # The eps of F.normalize: a zero token stays zero.
    length = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=wide)
    return (tokens / length.clamp_min(1e-12)).to(tokens.dtype)
