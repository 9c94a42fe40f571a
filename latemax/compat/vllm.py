"""The MaxSim scores of vLLM's pooling models: ``vllm.v1.pool.late_interaction``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from latemax import maxsim, maxsim_pairs
from latemax.compat._inputs import as_float32, as_items, check_padding

__all__ = ["compute_maxsim_score_batched"]


def compute_maxsim_score_batched(
    q_embs: Sequence[Tensor],
    d_embs: Sequence[Tensor],
    max_batch_size: int = 64,
    max_score_matrix_elements: int = 64_000_000,
    *,
    padding: str = "exact",
) -> list[Tensor]:
    """``late_interaction.compute_maxsim_score_batched``: query i against document i.

    Pairs with the same query tensor, which vLLM keeps for all documents of a request, are scored in one call.

    Args:
        q_embs: queries [l_i, dim], of any dtype.
        d_embs: as many documents [l_j, dim].
        max_batch_size, max_score_matrix_elements: checked as in vLLM, and without effect: nothing is padded.
        padding: "exact" and "host" are the same here.

    Returns:
        for every pair a float32 scalar on the pair's device. A document without a token scores -inf.

    Raises:
        ValueError: two lengths, a limit below 1, tokens that are not 2-D, two dims or devices in a pair, an unknown
            ``padding``.
    """
    check_padding(padding)
    if len(q_embs) != len(d_embs):
        raise ValueError(f"q_embs and d_embs must have the same length, got {len(q_embs)} and {len(d_embs)}")
    for name, limit in (("max_batch_size", max_batch_size), ("max_score_matrix_elements", max_score_matrix_elements)):
        if limit <= 0:
            raise ValueError(f"{name} must be greater than 0, got {limit}")
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (q, d) in enumerate(zip(q_embs, d_embs, strict=True)):
        if q.dim() != 2 or d.dim() != 2:
            raise ValueError(f"pair {i}: tokens must be 2-D, got shapes {list(q.shape)} and {list(d.shape)}")
        if q.shape[1] != d.shape[1]:
            raise ValueError(f"pair {i}: query and document must have one dim, got {q.shape[1]} and {d.shape[1]}")
        if q.device != d.device:
            raise ValueError(f"pair {i}: query and document must be on one device, got {q.device} and {d.device}")
        # a cached query is one tensor; an empty one has no address
        groups.setdefault((q.data_ptr() or -i, tuple(q.shape), q.stride()), []).append(i)
    scores: list[Tensor | None] = [None] * len(q_embs)
    single = [members[0] for members in groups.values() if len(members) == 1]
    if single:
        pairs = maxsim_pairs(_float32(q_embs, single), _float32(d_embs, single))
        for i, score in zip(single, pairs.unbind(), strict=True):
            scores[i] = score
    for members in groups.values():
        if len(members) > 1:
            shared = maxsim(_float32(q_embs, members[:1]), _float32(d_embs, members))[0]
            for i, score in zip(members, shared.unbind(), strict=True):
                scores[i] = score
    return cast(list[Tensor], scores)


def _float32(items: Sequence[Tensor], numbers: list[int]) -> list[Tensor]:
    return as_float32(as_items([items[i] for i in numbers]))
