"""Which document tokens hold the maximum: argmax shares and similarity distributions by type of token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from latemax import maxsim
from latemax.analysis._groups import Groups, argmax_similarity, as_batches, group_ids


@dataclass(frozen=True)
class ArgmaxShare:
    """How often each group of document tokens holds the maximum of a query token.

    Attributes:
        names: the groups, g of them.
        wins: int64 [g], the number of query tokens whose maximum is in the group.
        share: float64 [g], ``wins / total`` (NaN if nothing was counted).
        chance: float64 [g], the share of the group if every valid token were the argmax equally often.
        score: float64 [g], the part of the MaxSim scores that comes from the group; sums to the counted pairs' scores.
        total: number of query tokens counted, over all counted pairs.
    """

    names: tuple[str, ...]
    wins: Tensor
    share: Tensor
    chance: Tensor
    score: Tensor
    total: int

    def __getitem__(self, name: str) -> dict[str, float]:
        """Returns ``wins``, ``share``, ``chance``, ``lift`` (share / chance) and ``score`` of one group.

        Raises:
            KeyError: no such group.
        """
        if name not in self.names:
            raise KeyError(f"no group {name!r}, there are {', '.join(self.names)}")
        at = self.names.index(name)
        share, chance = float(self.share[at]), float(self.chance[at])
        lift = share / chance if chance else float("nan")
        return {
            "wins": int(self.wins[at]), "share": share, "chance": chance, "lift": lift, "score": float(self.score[at])
        }  # fmt: skip


def argmax_share(
    q: Tensor,
    tokens: Tensor,
    groups: Groups,
    *,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    pairs: Tensor | None = None,
    normalize: bool = False,
) -> ArgmaxShare:
    """Counts how often CLS, registers and patches are the argmax of ``max_j <q_i, d_j>``, compared with chance.

    Args:
        q: [n_q, l_q, dim] or [l_q, dim], any float dtype that `latemax.maxsim` takes.
        tokens: [n_d, l_d, dim] or [l_d, dim], with their prefix tokens.
        groups: name -> slice, positions or bool mask [l_d]; each document token in exactly one group (`token_groups`).
        q_mask: as in `latemax.maxsim`, True = keep.
        d_mask: as in `latemax.maxsim`, True = keep.
        pairs: bool [n_q, n_d], the (query, document) pairs to count; None counts all.
        normalize: compare by cosine instead of the raw dot product.

    Returns:
        Counts, shares, chance and scores by group.

    Raises:
        ValueError: shapes that do not fit, or groups that do not cover each document token exactly once.

    Example:
        >>> everything = torch.cat([out.prefix, out.tokens], 1)
        >>> argmax_share(q, everything, token_groups(out.tokens.shape[1]), normalize=True)["CLS"]
    """
    q, tokens, q_mask, d_mask, pairs = as_batches(q, tokens, q_mask, d_mask, pairs)
    names, ids = group_ids(groups, tokens.shape[1])
    ids = ids.to(q.device)
    _, argmax = maxsim(q, tokens, q_mask, d_mask, normalize=normalize, return_argmax=True)
    counted = (argmax >= 0) & pairs[..., None]

    wins = torch.bincount(ids[argmax[counted].long()], minlength=len(names))
    total = int(wins.sum())

    score = torch.zeros(len(names), dtype=torch.float64, device=q.device)
    for row, query in enumerate(q):
        similarity = argmax_similarity(query, tokens, argmax[row], normalize=normalize)
        keep = counted[row]
        score.index_add_(0, ids[argmax[row][keep].long()], similarity[keep].double())

    valid = F.one_hot(ids, len(names))[None] * d_mask[..., None]
    size = valid.sum(1).double()
    weight = counted.sum((0, 2)).double()
    chance = (size / size.sum(1, keepdim=True).clamp(min=1) * weight[:, None]).sum(0) / weight.sum()
    return ArgmaxShare(names, wins.cpu(), (wins.double() / total).cpu(), chance.cpu(), score.cpu(), total)


@dataclass(frozen=True)
class SimilarityDistribution:
    """Similarities of query tokens to document tokens, by type of document token.

    Attributes:
        raw: group -> float32 [k], a sample of the dot products. The additional key ``"maximum"`` holds one value per
            counted query token and document: the largest over all valid document tokens.
        cosine: the same, L2-normalized.
        raw_mean: group -> mean over all similarities, not only over the sample.
        cosine_mean: the same, L2-normalized.
        count: group -> number of all similarities.
    """

    raw: dict[str, Tensor]
    cosine: dict[str, Tensor]
    raw_mean: dict[str, float]
    cosine_mean: dict[str, float]
    count: dict[str, int]


def similarity_distribution(
    q: Tensor,
    tokens: Tensor,
    groups: Groups,
    *,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    pairs: Tensor | None = None,
    max_values: int = 200_000,
    seed: int = 0,
) -> SimilarityDistribution:
    """Samples <q_i, d_j> by type of document token, and the maximum per query token, raw and by cosine.

    Memory holds the similarities of one query with its documents at a time.

    Args:
        q: as in `argmax_share`.
        tokens: as in `argmax_share`.
        groups: as in `argmax_share`; the name ``"maximum"`` is taken.
        q_mask: as in `argmax_share`.
        d_mask: as in `argmax_share`.
        pairs: as in `argmax_share`.
        max_values: about how many similarities to keep per group, a uniform random sample. Means and counts are exact.
        seed: seed of the sample.

    Returns:
        The samples, means and counts by group.

    Raises:
        ValueError: shapes that do not fit, groups that do not cover each token once, or ``max_values`` below 1.
    """
    if max_values < 1:
        raise ValueError(f"max_values must be 1 or more, got {max_values}")
    q, tokens, q_mask, d_mask, pairs = as_batches(q, tokens, q_mask, d_mask, pairs)
    names, ids = group_ids(groups, tokens.shape[1])
    if "maximum" in names:
        raise ValueError('groups must not use the name "maximum", it is the per-query-token maximum')
    ids = ids.to(q.device)
    # Sizes per document and group; "maximum" comes last, filled from the row maxima.
    sizes = (F.one_hot(ids, len(names))[None] * d_mask[..., None]).sum(1)
    per_pair = pairs.long() * q_mask.sum(1, keepdim=True)
    total = (per_pair.sum(0)[:, None] * sizes).sum(0).tolist()
    total.append(int((per_pair * d_mask.any(1)).sum()))
    keys = (*names, "maximum")
    generator = torch.Generator(device="cpu").manual_seed(seed)

    kept: dict[bool, dict[str, list[Tensor]]] = {norm: {key: [] for key in keys} for norm in (False, True)}
    sums = {norm: dict.fromkeys(keys, 0.0) for norm in (False, True)}
    for row, query in enumerate(q):
        docs = (pairs[row] & d_mask.any(1)).nonzero()[:, 0]
        a, b, b_mask = query[q_mask[row]].float(), tokens[docs].float(), d_mask[docs]
        if not (len(a) and len(docs)):
            continue
        columns = [(ids == g) for g in range(len(names))]
        drawn = None
        for norm in (False, True):
            x, y = (F.normalize(a, dim=-1), F.normalize(b, dim=-1)) if norm else (a, b)
            sims = torch.einsum("ix,njx->nij", x, y)
            keep = b_mask[:, None, :].expand_as(sims)
            values = [sims[:, :, c][keep[:, :, c]].cpu() for c in columns]
            values.append(sims.masked_fill(~keep, float("-inf")).amax(-1).flatten().cpu())
            # One draw for both, so that position k of raw and of cosine is the same pair of tokens.
            if drawn is None:
                drawn = [
                    torch.rand(len(v), generator=generator) < max_values / max(n, 1)
                    for v, n in zip(values, total, strict=True)
                ]
            for key, value, pick in zip(keys, values, drawn, strict=True):
                kept[norm][key].append(value[pick])
                sums[norm][key] += float(value.double().sum())

    count = dict(zip(keys, (int(n) for n in total), strict=True))
    raw, cosine = (
        {key: torch.cat(v) if v else torch.empty(0) for key, v in kept[norm].items()} for norm in (False, True)
    )
    raw_mean, cosine_mean = (
        {key: sums[norm][key] / count[key] if count[key] else float("nan") for key in keys} for norm in (False, True)
    )
    return SimilarityDistribution(raw, cosine, raw_mean, cosine_mean, count)
