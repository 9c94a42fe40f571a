"""``MaxSim``: the operator as a module."""

from __future__ import annotations

import math

from torch import nn

from latemax.api import Masks, Scores, Tokens, Weights, maxsim


class MaxSim(nn.Module):
    """Late interaction as a parameter-free module; options as in ``latemax.maxsim``. Weights go to the call.

    Example:
        >>> scores = MaxSim(normalize=True)(query_tokens, page_tokens, d_mask=page_mask)  # [n_q, n_d]
    """

    def __init__(
        self,
        *,
        normalize: bool = False,
        empty_score: float = -math.inf,
        return_argmax: bool = False,
        reduce: str = "sum",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.normalize, self.empty_score, self.return_argmax = normalize, empty_score, return_argmax
        self.reduce, self.backend = reduce, backend

    def forward(
        self, q: Tokens, d: Tokens, q_mask: Masks = None, d_mask: Masks = None, *, q_weights: Weights = None
    ) -> Scores:
        """Shapes, dtypes and errors as ``latemax.maxsim``."""
        return maxsim(
            q,
            d,
            q_mask,
            d_mask,
            normalize=self.normalize,
            empty_score=self.empty_score,
            return_argmax=self.return_argmax,
            q_weights=q_weights,
            reduce=self.reduce,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"normalize={self.normalize}, empty_score={self.empty_score}, return_argmax={self.return_argmax}, "
            f"reduce={self.reduce!r}, backend={self.backend!r}"
        )
