"""Token types of a document sequence, and the pairs and tokens a study counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Groups = Mapping[str, "slice | Sequence[int] | Tensor"]


def token_groups(n_patches: int, *, n_cls: int = 1, n_registers: int = 0) -> dict[str, slice]:
    """Positions of CLS, registers and patches in a ViT sequence ``[cls, registers, patches]``.

    Empty groups are left out. The result is what ``groups=`` takes in `argmax_share` and `similarity_distribution`.
    """
    for name, value in (("n_patches", n_patches), ("n_cls", n_cls), ("n_registers", n_registers)):
        if value < 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")
    sizes = {"CLS": n_cls, "registers": n_registers, "patches": n_patches}
    groups, start = {}, 0
    for name, size in sizes.items():
        if size:
            groups[name] = slice(start, start + size)
        start += size
    return groups


def group_ids(groups: Groups, l_d: int) -> tuple[tuple[str, ...], Tensor]:
    """Names of the groups and the group number of every document token, int64 [l_d].

    ValueError unless every one of the ``l_d`` positions lies in exactly one group.
    """
    if not groups:
        raise ValueError("groups must name at least one group of document tokens, got an empty mapping")
    names = tuple(groups)
    member = torch.zeros(len(names), l_d, dtype=torch.int64)
    for row, (name, where) in enumerate(groups.items()):
        if not isinstance(where, slice):
            where = torch.as_tensor(where).cpu()
            if where.dtype == torch.bool and where.shape != (l_d,):
                raise ValueError(f"groups[{name!r}] as a mask must have shape [{l_d}], got {list(where.shape)}")
            if where.dtype != torch.bool and where.numel() and not (0 <= int(where.min()) <= int(where.max()) < l_d):
                raise ValueError(f"groups[{name!r}] must hold positions within 0..{l_d - 1}, got {where.tolist()}")
        member[row, where] = 1
    times = member.sum(0)
    if (times != 1).any():
        position = int((times != 1).nonzero()[0])
        raise ValueError(
            f"groups must cover each of the {l_d} document tokens exactly once, "
            f"position {position} lies in {int(times[position])} groups"
        )
    return names, member.argmax(0)


def as_batches(
    q: Tensor, tokens: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, pairs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """3-D tokens with boolean masks: q [n_q,l_q,dim], tokens [n_d,l_d,dim], masks, and pairs bool [n_q,n_d]."""
    for name, value in (("q", q), ("tokens", tokens)):
        if value.dim() not in (2, 3):
            raise ValueError(f"{name} must be [l, dim] or [n, l, dim], got shape {list(value.shape)}")
    if q.shape[-1] != tokens.shape[-1]:
        raise ValueError(f"q and tokens must share dim, got {q.shape[-1]} and {tokens.shape[-1]}")
    q_mask = torch.ones(q.shape[:-1], dtype=torch.bool, device=q.device) if q_mask is None else q_mask != 0
    d_mask = torch.ones(tokens.shape[:-1], dtype=torch.bool, device=q.device) if d_mask is None else d_mask != 0
    for name, mask, want in (("q_mask", q_mask, q.shape[:-1]), ("d_mask", d_mask, tokens.shape[:-1])):
        if mask.shape != want:
            raise ValueError(f"{name} must have shape {list(want)}, got {list(mask.shape)}")
    if q.dim() == 2:
        q, q_mask = q[None], q_mask[None]
    if tokens.dim() == 2:
        tokens, d_mask = tokens[None], d_mask[None]
    shape = (len(q), len(tokens))
    pairs = torch.ones(shape, dtype=torch.bool, device=q.device) if pairs is None else pairs.to(q.device) != 0
    if pairs.shape != shape:
        raise ValueError(f"pairs must have shape [n_q, n_d] = {list(shape)}, got {list(pairs.shape)}")
    return q, tokens, q_mask, d_mask, pairs


def own_pairs(owner: Tensor, n_d: int) -> Tensor:
    """Bool [n_q, n_d]: True where document ``owner[i]`` belongs to query ``i``. ``~`` of it gives the wrong pairs."""
    if owner.numel() and not (0 <= int(owner.min()) <= int(owner.max()) < n_d):
        raise ValueError(f"owner must hold document numbers within 0..{n_d - 1}, got {owner.tolist()}")
    return F.one_hot(owner.long(), n_d).bool()


def winning_similarity(q: Tensor, d: Tensor, argmax: Tensor, *, normalize: bool) -> Tensor:
    """<q_i, d_argmax(i)> in float32 (float64 for float64 tokens); 0 where the argmax is -1.

    q [l_q, dim], d [..., l_d, dim], argmax int [..., l_q] -> [..., l_q].
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, d.dtype), torch.float32)
    index = argmax.long().clamp(min=0)[..., None].expand(*argmax.shape, d.shape[-1])
    if d.shape[-2] == 0:
        return q.new_zeros(argmax.shape, dtype=dtype)
    winners, q = d.gather(-2, index).to(dtype), q.to(dtype)
    if normalize:
        winners, q = F.normalize(winners, dim=-1), F.normalize(q, dim=-1)
    return (q * winners).sum(-1).masked_fill(argmax < 0, 0.0)
