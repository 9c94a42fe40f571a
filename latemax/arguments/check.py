"""Validators: a canonical tensor, or a TypeError / ValueError that names the argument, the rule and what came.

They read shapes, dtypes and devices. Values are read on the CPU only: elsewhere that would need a device sync.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from latemax.arguments import arrays
from latemax.ops.dispatch import BY_NAME
from latemax.ops.problem import Codes

BACKENDS = ("auto", *BY_NAME)
FLOAT32_MAX = torch.finfo(torch.float32).max
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("sum", "mean")
LEAST_TAU = 1e-6


def check_options(
    *, normalize: Any, empty_score: Any, return_argmax: Any, backend: Any, reduce: Any = "sum"
) -> float:  # fmt: skip
    """Checks the keyword options; returns empty_score as a float."""
    if type(normalize) is not bool or type(return_argmax) is not bool:
        name, value = ("return_argmax", return_argmax) if type(normalize) is bool else ("normalize", normalize)
        raise TypeError(f"{name} must be a Python bool, got {type(value).__module__}.{type(value).__name__}")
    # numbers.Real is an abstract class: asking it takes 0.4 µs
    if type(empty_score) is not float:
        if isinstance(empty_score, bool) or not isinstance(empty_score, numbers.Real):
            raise TypeError(f"empty_score must be a number, got {type(empty_score).__name__}")
        empty_score = float(empty_score)
    if FLOAT32_MAX < abs(empty_score) < math.inf:
        raise ValueError(f"empty_score must be infinite or within the range of float32, got {empty_score}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if type(reduce) is str and reduce in REDUCTIONS:
        return empty_score
    if not isinstance(reduce, str):
        raise TypeError(f"reduce must be a str, {' or '.join(map(repr, REDUCTIONS))}; got {type(reduce).__name__}")
    raise ValueError(f"reduce must be {' or '.join(map(repr, REDUCTIONS))}; got {reduce!r}")


def check_tau(tau: Any) -> float:
    if isinstance(tau, bool) or not isinstance(tau, numbers.Real):
        raise TypeError(f"tau must be a Python float, got {type(tau).__module__}.{type(tau).__name__}")
    tau = float(tau)
    if not LEAST_TAU <= tau < math.inf:
        raise ValueError(f"tau must be finite and at least {LEAST_TAU}, got {tau}")
    return tau


def check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int >= 1, got {value!r}")


def check_tokens(name: str, x: Any, dims: tuple[int, ...], shapes: str, codes: Codes | None = None) -> None:
    """``codes``: x is the codes of QuantizedTokens, or of items of a list."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, a numpy array or a list of them, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor or a jagged nested tensor, got layout {x.layout}")
    if x.dtype not in DTYPES and codes is None:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() not in dims:
        raise ValueError(f"{name} must be {shapes}, got shape {_shape(x, codes)}")


def _shape(x: Tensor, codes: Codes | None) -> list[int]:
    return list(x.shape) if codes is None else [*x.shape[:-1], codes.dim]


def readable(x: Tensor) -> bool:
    """Whether the values of x may be read: an ordinary CPU tensor, outside compilation and tracing."""
    return (
        x.device.type == "cpu"
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def as_mask(name: str, m: Any, of: str, x: Tensor) -> Tensor | None:
    """Any bool, int or float mask, tensor or array, of exactly ``x.shape[:-1]`` → bool.

    On a GPU an additive mask is not recognised.
    """
    if m is None:
        return None
    m = _dense(name, m)
    if m.dtype.is_complex:
        raise TypeError(f"{name} must be bool, int or float, got {m.dtype}")
    _check_one_per_token(name, m, of, x)
    if m.dtype == torch.bool:
        return m
    if readable(m) and bool((m < 0).any()):
        raise ValueError(
            f"{name} must be nonzero where a token is kept and 0 where it is masked; got a negative value, as in an "
            f"additive mask (0 = keep, -inf = mask): pass `{name} == 0` instead"
        )
    return m != 0


def _dense(name: str, x: Any) -> Tensor:
    """A strided tensor, or an array as one."""
    if not isinstance(x, Tensor):
        x = arrays.as_tensor(name, x)
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor or a numpy array, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}")
    return x


def _check_one_per_token(name: str, value: Tensor, of: str, x: Tensor) -> None:
    if value.shape != x.shape[:-1]:
        leading, came = list(x.shape[:-1]), list(value.shape)
        raise ValueError(f"{name} must have the leading shape of {of}, {leading}; got shape {came}")
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of {of}, {x.device}; got {value.device}")


def as_weights(name: str, w: Any, of: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor or array of exactly ``x.shape[:-1]``, of any float dtype → contiguous, in the dtype of the scores."""
    w = _dense(name, w)
    if w.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {w.dtype}")
    _check_one_per_token(name, w, of, x)
    return w.to(dtype).resolve_neg().contiguous()


def as_int64(name: str, x: Any, dims: tuple[int, ...], shape: str, of: Tensor) -> Tensor:
    """An int32 or int64 tensor, or array, on the device of the tokens → contiguous int64."""
    if not isinstance(x, Tensor):
        x = arrays.as_tensor(name, x)
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor or a numpy array, got {type(x).__name__}")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")
    if x.layout != torch.strided or x.dim() not in dims:
        raise ValueError(f"{name} must be {shape}, got shape {list(x.shape)}")
    if x.device != of.device:
        raise ValueError(f"{name} must be on the device of the tokens, {of.device}; got {x.device}")
    return x.to(torch.int64).contiguous()


def as_offsets(name: str, x: Any, n: str, of: str, tokens: Tensor) -> Tensor:
    """Offsets [n + 1] into tokens [t, dim] → int64. On a GPU the kernels stay inside the tokens whatever they hold."""
    x = as_int64(name, x, (1,), f"[{n} + 1]", tokens)
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


def as_candidates(name: str, x: Any, dims: tuple[int, ...], shape: str, n: int, of: Tensor) -> Tensor:
    """Candidates: numbers of documents below n, or -1 → int64."""
    x = as_int64(name, x, dims, shape, of)
    if readable(x) and x.numel() and not (x.min() >= -1 and x.max() < n):
        wrong = x[(x < -1) | (x >= n)][0].item()
        raise ValueError(f"{name} must be numbers of documents, 0 to {n - 1}, or -1 for an empty slot; got {wrong}")
    return x


def as_query_ids(x: Any, n_q: int, of: Tensor) -> Tensor:
    """Numbers of queries below n_q → int64."""
    x = as_int64("query_ids", x, (1,), "[n]", of)
    if not n_q and len(x):
        raise ValueError(f"query_ids must be empty where q holds no query; got shape {list(x.shape)}")
    if readable(x) and len(x) and not (x.min() >= 0 and x.max() < n_q):
        raise ValueError(
            f"query_ids must be numbers of queries, 0 to {n_q - 1}; got {x[(x < 0) | (x >= n_q)][0].item()}"
        )
    return x


def check_together(
    q: Tensor, d: Tensor, d_name: str = "d", q_codes: Codes | None = None, d_codes: Codes | None = None
) -> None:
    """The rules for every form of q and d."""
    if q.device != d.device:
        raise ValueError(f"q and {d_name} must be on one device; got q on {q.device} and {d_name} on {d.device}")
    dim = q.shape[-1] if q_codes is None else q_codes.dim
    if (d.shape[-1] if d_codes is None else d_codes.dim) != dim:
        raise ValueError(
            f"q and {d_name} must have the same dim (last axis); "
            f"got q {_shape(q, q_codes)} and {d_name} {_shape(d, d_codes)}"
        )
    if q_codes is not None and (d_codes is None or d_codes.kind != q_codes.kind):
        came = f"of dtype {d.dtype}" if d_codes is None else f"of kind {d_codes.kind!r}"
        raise TypeError(
            f"q may be QuantizedTokens only where {d_name} is, and of its kind; "
            f"got q of kind {q_codes.kind!r} and {d_name} {came}"
        )
    if dim < 1:
        raise ValueError(f"dim (last axis of q and {d_name}) must be at least 1; got q {list(q.shape)}")
