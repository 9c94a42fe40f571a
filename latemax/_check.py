"""Arguments in, canonical tensors out, or a TypeError / ValueError that names the argument, the rule and what came.

Reads shapes, dtypes and devices only, never values: no device-to-host sync.
"""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import torch

BACKENDS = ("auto", "triton", "cuda", "cpu", "reference")
FLOAT32_MAX = torch.finfo(torch.float32).max
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Packing(NamedTuple):
    """Where tokens that lie end to end begin and end; all None for dense tensors."""

    cu_q: torch.Tensor | None = None  # int64 [n_q + 1]: q is [t_q, dim], q_mask [t_q]
    cu_d: torch.Tensor | None = None  # int64 [n_d + 1]: d is [t_d, dim], d_mask [t_d]
    candidates: torch.Tensor | None = None  # int64 [n_q, k] numbers of documents, -1 for none; beside cu_d


DENSE = Packing()


class Arguments(NamedTuple):
    """What the operator takes, in its canonical form."""

    q: torch.Tensor  # [n_q, l_q, dim]
    d: torch.Tensor  # [n_d, l_d, dim] shared by all queries, or own candidates [n_q, n_d, l_d, dim]
    q_mask: torch.Tensor | None  # bool [n_q, l_q]
    d_mask: torch.Tensor | None  # bool, d.shape[:-1]
    one_query: bool  # the caller's q had no n_q axis
    one_document: bool  # the caller's d had no n_d axis
    packing: Packing = DENSE


class Sizes(NamedTuple):
    own: bool  # every query has its own n_d candidates
    n_q: int
    n_d: int
    l_q: int  # all query tokens, t_q, where they lie end to end
    l_d: int  # likewise t_d
    dim: int


def sizes(q: torch.Tensor, d: torch.Tensor, packing: Packing) -> Sizes:
    cu_q, cu_d, candidates = packing
    n_q, l_q = (q.shape[0], q.shape[1]) if cu_q is None else (len(cu_q) - 1, q.shape[0])
    n_d, l_d = (d.shape[-3], d.shape[-2]) if cu_d is None else (len(cu_d) - 1, d.shape[0])
    own = d.dim() == 4 or candidates is not None
    return Sizes(own, n_q, n_d if candidates is None else candidates.shape[1], l_q, l_d, q.shape[-1])


def score_dtype(q: torch.dtype, d: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.promote_types(q, d) == torch.float64 else torch.float32


class Problem(NamedTuple):
    """Shapes and flags of one call: all that the choice of backend and tile may depend on."""

    own: bool  # every query has its own n_d candidates
    n_q: int
    n_d: int
    l_q: int
    l_d: int
    dim: int
    q_dtype: torch.dtype
    d_dtype: torch.dtype
    device: torch.device
    q_masked: bool
    d_masked: bool
    normalize: bool
    argmax: bool
    train: bool
    matmul_precision: str
    q_ragged: bool = False  # l_q is then the mean, rounded up
    d_ragged: bool = False  # likewise l_d
    in_place: bool = False  # candidates are named by number and scored where they lie

    @property
    def dtype(self) -> torch.dtype:
        """The promoted dtype of q and d: what the products are taken in."""
        return torch.promote_types(self.q_dtype, self.d_dtype)


def problem(args: Arguments, *, normalize: bool, argmax: bool, train: bool) -> Problem:
    q, d, packing = args.q, args.d, args.packing
    own, n_q, n_d, l_q, l_d, dim = sizes(q, d, packing)
    if packing is not DENSE:
        if packing.cu_q is not None:
            l_q = max(1, -(-l_q // max(1, n_q)))
        if packing.cu_d is not None:
            l_d = -(-l_d // max(1, len(packing.cu_d) - 1))
    return Problem(
        own, n_q, n_d, l_q, l_d, dim, q.dtype, d.dtype, q.device,
        args.q_mask is not None, args.d_mask is not None, normalize, argmax, train,
        torch.get_float32_matmul_precision(),
        packing.cu_q is not None, packing.cu_d is not None, packing.candidates is not None,
    )  # fmt: skip


def options(*, normalize, empty_score, return_argmax, backend) -> float:
    """Checks the keyword options; returns empty_score as a float."""
    for name, value in (("normalize", normalize), ("return_argmax", return_argmax)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a Python bool, got {type(value).__module__}.{type(value).__name__}")
    # numbers.Real is an abstract class: asking it takes 0.4 µs
    if type(empty_score) is not float and (isinstance(empty_score, bool) or not isinstance(empty_score, numbers.Real)):
        raise TypeError(f"empty_score must be a number, got {type(empty_score).__name__}")
    if FLOAT32_MAX < abs(empty_score) < math.inf:
        raise ValueError(f"empty_score must be infinite or within the range of float32, got {empty_score}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    return float(empty_score)


def positive(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int >= 1, got {value!r}")


def tokens(name: str, x, dims: tuple[int, ...], shapes: str) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or a list of them, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor or a jagged nested tensor, got layout {x.layout}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() not in dims:
        raise ValueError(f"{name} must be {shapes}, got shape {list(x.shape)}")


def mask(name: str, m, of: str, x: torch.Tensor) -> torch.Tensor | None:
    """Any bool, int or float mask of exactly ``x.shape[:-1]`` → bool."""
    if m is None:
        return None
    if not isinstance(m, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(m).__name__}")
    if m.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {m.layout}")
    if m.dtype.is_complex:
        raise TypeError(f"{name} must be bool, int or float, got {m.dtype}")
    if m.shape != x.shape[:-1]:
        raise ValueError(f"{name} must have the leading shape of {of}, {list(x.shape[:-1])}; got shape {list(m.shape)}")
    if m.device != x.device:
        raise ValueError(f"{name} must be on the device of {of}, {x.device}; got {m.device}")
    return m if m.dtype == torch.bool else m != 0


def readable(x: torch.Tensor) -> bool:
    """Whether the values of x can be looked at here: an ordinary CPU tensor, outside compilation and tracing."""
    return (
        x.device.type == "cpu"
        and type(x) is torch.Tensor
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def integers(name: str, x, dims: tuple[int, ...], shape: str, of: torch.Tensor) -> torch.Tensor:
    """An int32 or int64 tensor on the device of the tokens → contiguous int64."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")
    if x.layout != torch.strided or x.dim() not in dims:
        raise ValueError(f"{name} must be {shape}, got shape {list(x.shape)}")
    if x.device != of.device:
        raise ValueError(f"{name} must be on the device of the tokens, {of.device}; got {x.device}")
    return x.to(torch.int64).contiguous()


def offsets(name: str, x, n: str, of: str, tokens: torch.Tensor) -> torch.Tensor:
    """Offsets [n + 1] into tokens [t, dim] → int64.

    Values are looked at on the CPU alone: elsewhere that would wait for the device, and the kernels keep themselves
    inside the tokens.
    """
    x = integers(name, x, (1,), f"[{n} + 1]", tokens)
    if not len(x):
        raise ValueError(f"{name} must be [{n} + 1], with at least one element; got shape {list(x.shape)}")
    if readable(x):
        if x[0] != 0:
            raise ValueError(f"{name} must start at 0, got {x[0].item()}")
        if bool((x[1:] < x[:-1]).any()):
            at = int((x[1:] < x[:-1]).nonzero()[0, 0])
            raise ValueError(f"{name} must never fall; got {x[at].item()}, {x[at + 1].item()} at {at}")
        if x[-1] > len(tokens):
            raise ValueError(f"{name} must end within the {len(tokens)} tokens of {of}; got {x[-1].item()}")
    return x


def numbers_of(name: str, x, dims: tuple[int, ...], shape: str, n: int, of: torch.Tensor) -> torch.Tensor:
    """Candidates: numbers of documents below n, or -1 → int64. Values are looked at on the CPU alone."""
    x = integers(name, x, dims, shape, of)
    if readable(x) and x.numel() and not (x.min() >= -1 and x.max() < n):
        wrong = x[(x < -1) | (x >= n)][0].item()
        raise ValueError(f"{name} must be numbers of documents, 0 to {n - 1}, or -1 for an empty slot; got {wrong}")
    return x


def together(q: torch.Tensor, d: torch.Tensor, d_name: str = "d") -> None:
    """What holds for any form of q and d."""
    if q.device != d.device:
        raise ValueError(f"q and {d_name} must be on one device; got q on {q.device} and {d_name} on {d.device}")
    dim = q.shape[-1]
    if dim != d.shape[-1]:
        raise ValueError(
            f"q and {d_name} must have the same dim (last axis); got q {list(q.shape)} and {d_name} {list(d.shape)}"
        )
    if dim < 1:
        raise ValueError(f"dim (last axis of q and {d_name}) must be at least 1; got q {list(q.shape)}")


def arguments(q, d, q_mask=None, d_mask=None, *, cu_q=None, cu_d=None, pairs: bool = False) -> Arguments:
    """Canonical tensors of maxsim's and maxsim_pairs' arguments.

    cu_q, cu_d: offsets of a side given as a list, whose tokens lie end to end in q or d (its mask is right already).
    pairs: row b of q meets row b of d alone.
    """
    if cu_q is None:
        if pairs:
            tokens("q", q, (3,), "[b, l_q, dim]")
        else:
            tokens("q", q, (2, 3), "[l_q, dim] or [n_q, l_q, dim]")
    if cu_d is None:
        if pairs:
            tokens("d", d, (3,), "[b, l_d, dim]")
        else:
            tokens("d", d, (2, 3, 4), "[l_d, dim], [n_d, l_d, dim] or [n_q, k, l_d, dim]")
    together(q, d)
    if cu_q is None and q.shape[-2] < 1:
        raise ValueError(f"q must have at least one token (l_q >= 1); got q {list(q.shape)}")
    if pairs or (cu_d is None and d.dim() == 4):
        n_q = len(cu_q) - 1 if cu_q is not None else q.shape[0] if q.dim() == 3 else None
        n_d = d.shape[0] if cu_d is None else len(cu_d) - 1
        if pairs and n_q != n_d:
            raise ValueError(
                f"pairs need q and d with the same b (first axis or length of a list); got {n_q} and {n_d}"
            )
        if n_q != n_d:
            came = list(q.shape) if cu_q is None else f"a list of {n_q}"
            raise ValueError(
                "own candidates d [n_q, k, l_d, dim] need q [n_q, l_q, dim] with the same n_q; "
                f"got q {came} and d {list(d.shape)}"
            )
    if q_mask is not None:
        q_mask = mask("q_mask", q_mask, "q", q)
    if d_mask is not None:
        d_mask = mask("d_mask", d_mask, "d", d)
    one_query, one_document = cu_q is None and q.dim() == 2, cu_d is None and d.dim() == 2
    if one_query:
        q, q_mask = q.unsqueeze(0), None if q_mask is None else q_mask.unsqueeze(0)
    candidates = None
    if cu_d is not None and pairs:
        candidates = torch.arange(n_d, device=d.device).unsqueeze(1)
    elif one_document or pairs:
        axis = 1 if pairs else 0
        d, d_mask = d.unsqueeze(axis), None if d_mask is None else d_mask.unsqueeze(axis)
    packing = DENSE if cu_q is None and cu_d is None else Packing(cu_q, cu_d, candidates)
    return Arguments(q, d, q_mask, d_mask, one_query, one_document or pairs, packing)


def varlen(q, d, cu_seqlens_q, cu_seqlens_d, q_mask=None, d_mask=None) -> Arguments:
    """Canonical tensors of maxsim_varlen's arguments."""
    tokens("q", q, (2,), "[t_q, dim]")
    tokens("d", d, (2,), "[t_d, dim]")
    together(q, d)
    cu_q = offsets("cu_seqlens_q", cu_seqlens_q, "n_q", "q", q)
    cu_d = offsets("cu_seqlens_d", cu_seqlens_d, "n_d", "d", d)
    q_mask, d_mask = mask("q_mask", q_mask, "q", q), mask("d_mask", d_mask, "d", d)
    return Arguments(q, d, q_mask, d_mask, False, False, Packing(cu_q, cu_d))


def rerank(q, corpus, corpus_offsets, candidates, q_mask=None, *, cu_q=None) -> Arguments:
    """Canonical tensors of rerank's arguments; cu_q as for ``arguments``."""
    if cu_q is None:
        tokens("q", q, (2, 3), "[l_q, dim] or [n_q, l_q, dim]")
    tokens("tokens", corpus, (2,), "[t_d, dim]")
    together(q, corpus, "tokens")
    if cu_q is None and q.shape[-2] < 1:
        raise ValueError(f"q must have at least one token (l_q >= 1); got q {list(q.shape)}")
    cu_d = offsets("offsets", corpus_offsets, "n_d", "tokens", corpus)
    one_query = cu_q is None and q.dim() == 2
    n_q = len(cu_q) - 1 if cu_q is not None else 1 if one_query else len(q)
    shape = "[k]" if one_query else "[n_q, k]"
    candidates = numbers_of("candidates", candidates, (1,) if one_query else (2,), shape, len(cu_d) - 1, corpus)
    if one_query:
        candidates = candidates.unsqueeze(0)
    if len(candidates) != n_q:
        raise ValueError(f"candidates must be [n_q, k] with the n_q of q, {n_q}; got shape {list(candidates.shape)}")
    q_mask = mask("q_mask", q_mask, "q", q)
    if one_query:
        q, q_mask = q.unsqueeze(0), None if q_mask is None else q_mask.unsqueeze(0)
    return Arguments(q, corpus, q_mask, None, one_query, False, Packing(cu_q, cu_d, candidates))
