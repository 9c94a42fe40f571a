"""The only module of the benchmarks that knows the inside of latemax; the others use its public names."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

import latemax
from benchmarks.shapes import Shape
from latemax.arguments.batch import batch_of
from latemax.arguments.check import check_options
from latemax.cli.bench import fifths, limits, sync
from latemax.ops import dispatch, operator, tiles
from latemax.ops.backends import native, triton
from latemax.ops.backends.base import Status
from latemax.ops.backends.cuda import status as cuda_status
from latemax.ops.problem import Batch, Codes, Outputs, Plan, Problem, Side, allocate, problem_of
from latemax.warm import run as warm

if TYPE_CHECKING:
    from benchmarks.null_driver import NullDriver

__all__ = ["cuda_status", "fifths", "limits", "sync", "tiles", "warm"]


def install_null_driver(arch: int = 90) -> NullDriver:
    """Lets ``backend="triton"`` take CPU tensors in this process: compiled for ``arch``, launched nowhere."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("unset TRITON_INTERPRET: the interpreter compiles and launches nothing")
    from benchmarks.null_driver import NullDriver

    null = NullDriver(arch)
    triton.status = lambda: Status(True, "null driver")
    triton.interpreted = lambda: True
    triton.capability = lambda device: arch
    return null


def limit_native(level: str) -> None:
    """Lets the native CPU kernel use no instruction set above ``level`` in this process."""
    known = native.levels()[: native.levels().index(level) + 1]
    native.levels = lambda: known
    native.status = lambda: Status(True, f"native kernel ({level}, by order of the benchmark)")
    dispatch.plan_for.cache_clear()


def triton_launch(shape: Shape, capability: int) -> tiles.Launch:
    """The forward launch of a dense shape on a GPU of this compute capability, which need not be here."""
    dtype = getattr(torch, shape.dtype)
    problem = Problem(
        torch.device("cuda"), dtype, dtype, torch.get_float32_matmul_precision(), shape.dim, shape.n_q, shape.l_q,
        q_ragged=False, own=shape.own, candidates=False, normalize=shape.normalize, argmax=shape.argmax,
        l_d=tiles.length_class(shape.l_d),
    )  # fmt: skip
    with mock.patch.object(triton, "capability", lambda device: capability):
        return triton.plan(problem, by_name=True).launch


def warm_smooth(dim: int, l_q: int, dtype: torch.dtype, train: bool) -> None:
    """Compiles what ``smooth_maxsim`` launches on a GPU, with its gradients if ``train``."""
    q, d = (torch.zeros(1, length, dim, dtype=dtype, requires_grad=train) for length in (l_q, 16))
    scores = latemax.smooth_maxsim(q, d, tau=1.0, normalize=True, backend="triton")
    if train:
        scores.sum().backward()


def tile_of(batch: Batch, argmax: bool, bounds: str = "") -> tiles.TileConfig:
    """The tile of the Triton forward."""
    return dispatch.plan_for(problem_of(batch, argmax=argmax, bounds=bounds), "triton").launch.tile


def forward_with_tile(q: torch.Tensor, d: torch.Tensor, tile: tiles.TileConfig, scores: torch.Tensor) -> None:
    """The Triton forward of a few dense queries with a given tile."""
    from latemax.ops.backends import triton_launch

    pack = triton.queries_per_tile(tile, q.shape[1], len(q), own=d.dim() == 4)
    triton_launch.forward(Batch(Side(q), Side(d)), tiles.Launch(tile, pack, tiles.NO_NORM), Outputs(scores, None))


def forget_prepared_launches() -> None:
    """The next call of any form is prepared anew."""
    dispatch._prepared.clear()


def steps_of_a_prepared_call(q: torch.Tensor, d: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What an eager call with a prepared launch consists of."""
    batch, _ = batch_of(q, d, None, None)
    options = dict(normalize=False, empty_score=float("-inf"), return_argmax=False, backend="triton")
    return {
        "check the options": functools.partial(check_options, **options),
        "check the arguments": lambda: batch_of(q, d, None, None),
        "rule out transforms": lambda: (operator.refuse_transforms("maxsim", q, d), operator.plain(q, d, None, None)),
        "look up, allocate, launch": lambda: dispatch.forward(batch, False, "triton"),
    }


def steps_of_an_unprepared_call(q: torch.Tensor, d: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What a call without a prepared launch does instead of looking one up."""
    batch, _ = batch_of(q, d, None, None)
    out = allocate(batch, False)

    def plan():
        return dispatch.plan_for(problem_of(batch, argmax=False), "triton")

    launch = plan()
    return {
        "choose backend and tile": plan,
        "allocate the outputs": lambda: allocate(batch, False),
        "prepare and launch": lambda: triton.forward(batch, launch, out),
    }


def native_levels() -> tuple[str, ...]:
    """Instruction sets of the native CPU kernels on this processor, worst first."""
    return native.levels()


def _native_call(q: Any, d: Any, level: str | None) -> tuple[Batch, Plan]:
    levels = native.levels()
    plan = Plan("native", "", launch=levels.index(levels[-1] if level is None else level))
    return Batch(_side(q), _side(d)), plan


def _side(x: Any) -> Side:
    if isinstance(x, torch.Tensor):
        return Side(x)
    return Side(x.codes, codes=Codes(x.kind, x.dim, x.scale, x.error))


def native_scores(q: Any, d: Any, level: str | None) -> torch.Tensor:
    """Scores by one instruction set, None: the best, of dense tokens or QuantizedTokens."""
    b, plan = _native_call(q, d, level)
    out = Outputs(torch.empty(b.n_q, b.n_d), None)
    native.forward(b, plan, out)
    return out.scores


def native_bounds(q: Any, d: Any, level: str | None, coarse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    b, plan = _native_call(q, d, level)
    lower, upper = torch.empty(b.n_q, b.n_d), torch.empty(b.n_q, b.n_d)
    native.bounds(b, plan, lower, upper, coarse=coarse)
    return lower, upper
