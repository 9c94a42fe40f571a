"""Token types of a document sequence, and the pairs and tokens that a study counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from latemax.arguments.arrays import as_tensor

Groups = Mapping[str, "slice | Sequence[int] | Tensor"]


def token_groups(n_patches: int, *, n_cls: int = 1, n_registers: int = 0) -> dict[str, slice]:
    """Returns the positions of CLS, registers and patches in a ViT sequence ``[cls, registers, patches]``.

    Args:
        n_patches: number of patch tokens.
        n_cls: number of CLS tokens.
        n_registers: number of register tokens.

    Returns:
        name -> slice, without the empty groups: the ``groups=`` of `argmax_share` and `similarity_distribution`.

    Raises:
        ValueError: a negative number.

    Example:
        >>> token_groups(196)
        {'CLS': slice(0, 1, None), 'patches': slice(1, 197, None)}
    """
    for name, value in (("n_patches", n_patches), ("n_cls", n_cls), ("n_registers", n_registers)):
        if value < 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")
    sizes = {"CLS": n_cls, "registers": n_registers, "patches": n_patches}
    groups: dict[str, slice] = {}
    start = 0
    for name, size in sizes.items():
        if size:
            groups[name] = slice(start, start + size)
        start += size
    return groups


def group_ids(groups: Groups, l_d: int) -> tuple[tuple[str, ...], Tensor]:
    """Returns the names of the groups and the group number of every document token, int64 [l_d].

    Raises:
        ValueError: a position that is not in exactly one group.
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
            f"position {position} is in {int(times[position])} groups"
        )
    return names, member.argmax(0)


def as_batches(
    q: Tensor, tokens: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, pairs: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns q [n_q, l_q, dim], tokens [n_d, l_d, dim], their masks, and pairs [n_q, n_d]; masks and pairs are bool.

    Raises:
        ValueError: shapes that do not fit.
    """
    q, tokens, q_mask, d_mask, pairs = (
        as_tensor(name, x) for name, x in dict(q=q, tokens=tokens, q_mask=q_mask, d_mask=d_mask, pairs=pairs).items()
    )
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
    """Marks the pairs of a query with its own document.

    Args:
        owner: int [n_q], the document of each query.
        n_d: number of documents.

    Returns:
        bool [n_q, n_d], True at (i, ``owner[i]``). ``~own_pairs(...)`` selects the wrong pairs.

    Raises:
        ValueError: a document number outside 0..n_d - 1.
    """
    if owner.numel() and not (0 <= int(owner.min()) <= int(owner.max()) < n_d):
        raise ValueError(f"owner must hold document numbers within 0..{n_d - 1}, got {owner.tolist()}")
    return F.one_hot(owner.long(), n_d).bool()


def argmax_similarity(q: Tensor, d: Tensor, argmax: Tensor, *, normalize: bool) -> Tensor:
    """Computes <q_i, d_argmax(i)>.

    Args:
        q: [l_q, dim].
        d: [..., l_d, dim].
        argmax: int [..., l_q]; -1 is no token.
        normalize: cosine instead of the dot product.

    Returns:
        [..., l_q], float32 (float64 for float64 tokens); 0 where the argmax is -1.
    """
    dtype = torch.promote_types(torch.promote_types(q.dtype, d.dtype), torch.float32)
    index = argmax.long().clamp(min=0)[..., None].expand(*argmax.shape, d.shape[-1])
    if d.shape[-2] == 0:
        return q.new_zeros(argmax.shape, dtype=dtype)
    best, q = d.gather(-2, index).to(dtype), q.to(dtype)
    if normalize:
        best, q = F.normalize(best, dim=-1), F.normalize(q, dim=-1)
    return (q * best).sum(-1).masked_fill(argmax < 0, 0.0)
