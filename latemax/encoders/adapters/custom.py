"""Any other model: a callable that returns all tokens, and how many of the first ones are not patches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .base import Adapter, Grid, RawTokens


class CustomAdapter(Adapter):
    """``source(pixel_values)`` gives ``[b, n_prefix + n, dim]``, ``(tokens, (rows, cols))``, or an output with
    ``last_hidden_state``."""

    def __init__(self, source: Callable[..., Any]):
        self.source = source
        self.family = type(source).__name__ if isinstance(source, nn.Module) else "callable"
        super().__init__(source if isinstance(source, nn.Module) else nn.Module(), n_prefix=0, dim=None)

    def run(self, pixel_values: Tensor, **inputs: Any) -> RawTokens:
        output, grid = self.source(pixel_values, **inputs), None
        if isinstance(output, tuple) and len(output) == 2 and not isinstance(output[1], Tensor):
            output, grid = output
        tokens = getattr(output, "last_hidden_state", output)
        if not isinstance(tokens, Tensor) or tokens.ndim != 3:
            got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"model: the callable must return tokens [b, n_prefix + n, dim], got {got}")
        return RawTokens(tokens, grid or self._guess_grid(tokens.shape[1] - self.n_prefix, pixel_values))

    def _guess_grid(self, n: int, pixel_values: Tensor) -> Grid:
        """Square patches that tile the image exactly: patch = sqrt(height * width / n)."""
        height, width = pixel_values.shape[-2:]
        patch = math.isqrt(height * width // n) if n > 0 else 0
        if patch and height % patch == 0 and width % patch == 0 and (height // patch) * (width // patch) == n:
            return height // patch, width // patch
        raise ValueError(
            f"model: {n} tokens are left after n_prefix={self.n_prefix}, and no square patch tiles a {height}x{width} "
            f"image that many times; correct n_prefix, or return (tokens, (rows, cols))"
        )
