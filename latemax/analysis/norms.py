"""Token norms before and after the final norm of a ViT, and its high-norm patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latemax.analysis._groups import Groups, group_ids
from latemax.arguments.arrays import as_tensor


@dataclass(frozen=True)
class TokenNorms:
    """L2 norms of a batch of ViT sequences before and after the final norm.

    Attributes:
        before: group -> float32 [b, n_group].
        after: the same; None if only the tokens before the norm were given.
        outlier: bool [b, n_patches], the patches whose norm before the final norm exceeds ``threshold``.
        threshold: float32 [b].
        k: how many MADs above the median the threshold is.
        largest_ratio: the largest ratio of a patch norm before the final norm to the median of its own image.
    """

    before: dict[str, Tensor]
    after: dict[str, Tensor] | None
    outlier: Tensor
    threshold: Tensor
    k: float
    largest_ratio: float

    @property
    def outlier_share(self) -> float:
        """The share of all patches that are flagged."""
        return float(self.outlier.float().mean())


def token_norms(
    before: Tensor, after: Tensor | None = None, *, groups: Groups, patches: str = "patches", k: float = 10.0
) -> TokenNorms:
    """Measures token norms by group and flags the patches of unusually high norm.

    A patch is flagged if its norm before the final norm exceeds ``median + k * MAD`` of its own image's patches (MAD:
    median absolute deviation from the median). The final norm hides these norms, so the search is before it. ``k = 10``
    is 6.7 standard deviations above the median of normally distributed norms; the artefacts reported for large ViTs
    (Darcet et al., "Vision Transformers Need Registers", 2024) have about ten times the usual norm. Mask flagged
    patches (``d_mask``) and do not remove them, which would break the grid.

    Args:
        before: [b, n, dim], the whole sequence before the final norm, prefix tokens included: prefix and patches of
            ``PatchEncoder(model, final_norm=None, normalize=False)``, concatenated.
        after: the same after the final norm, from ``PatchEncoder(model, normalize=False)``; or None.
        groups: name -> positions in the sequence (`token_groups`).
        patches: the group that is searched for outliers.
        k: how many MADs above the median the threshold is.

    Returns:
        The norms by group and the flagged patches.

    Raises:
        ValueError: shapes that differ, an unknown patch group, or a negative k.
    """
    before, after = as_tensor("before", before), as_tensor("after", after)
    if before.dim() != 3:
        raise ValueError(f"before must be [b, n, dim], got shape {list(before.shape)}")
    if after is not None and after.shape != before.shape:
        raise ValueError(f"after must have the shape of before, {list(before.shape)}, got {list(after.shape)}")
    if patches not in groups:
        raise ValueError(f"patches must name one of the groups {', '.join(groups)}, got {patches!r}")
    if k < 0:
        raise ValueError(f"k must be 0 or more, got {k}")
    names, ids = group_ids(groups, before.shape[1])
    ids = ids.to(before.device)

    def by_group(tokens: Tensor) -> dict[str, Tensor]:
        norms = torch.linalg.vector_norm(tokens.float(), dim=-1)
        return {name: norms[:, ids == g].cpu() for g, name in enumerate(names)}

    norms = by_group(before)
    patch = norms[patches]
    median = patch.median(dim=1, keepdim=True).values
    mad = (patch - median).abs().median(dim=1, keepdim=True).values
    threshold = median + k * mad
    ratio = float((patch / median).max())
    return TokenNorms(norms, None if after is None else by_group(after), patch > threshold, threshold[:, 0], k, ratio)
