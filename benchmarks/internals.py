"""The only module of the benchmarks that knows the inside of latemax; the others use its public names."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from benchmarks.shapes import Shape
from latemax import _check
from latemax._bench import fifths, limits, sync
from latemax.ops import launch, schema, select, tiles
from latemax.ops.select import cuda_status

if TYPE_CHECKING:
    from benchmarks.null_driver import NullDriver

__all__ = ["cuda_status", "fifths", "limits", "sync", "tiles"]


def install_null_driver(arch: int = 90) -> NullDriver:
    """Lets ``backend="triton"`` take CPU tensors in this process: compiled for ``arch``, launched nowhere."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("unset TRITON_INTERPRET: the interpreter compiles and launches nothing")
    from benchmarks.null_driver import NullDriver

    null = NullDriver(arch)
    select.triton_status = lambda: (True, "null driver")
    select.interpreted = lambda: True
    select.capability = lambda device: arch
    return null


class Launch(NamedTuple):
    """What the Triton backend launches for a forward."""

    tile: tiles.TileConfig
    queries: int  # that share a tile
    norm: int  # 0 none, 1 norms inside the kernel, 2 norms by a kernel before it


def triton_launch(shape: Shape, capability: int) -> Launch:
    """The forward launch of a shape on a GPU of this compute capability, which need not be here."""
    dtype = getattr(torch, shape.dtype)
    problem = _check.Problem(
        shape.own, shape.n_q, shape.n_d, shape.l_q, shape.l_d, shape.dim, dtype, dtype, torch.device("cuda"), False,
        shape.masked, shape.normalize, shape.argmax, False, torch.get_float32_matmul_precision(),
    )  # fmt: skip
    tile, _ = tiles.pick(
        select.kind(problem), shape.dim, select.query_rows(problem), dtype.itemsize, capability, shape.argmax
    )
    # as in triton_backend.packed and forward, which need triton to be imported
    queries = 1 if shape.own or shape.n_q == 1 else max(1, tile.block_q >> (shape.l_q - 1).bit_length())
    one_tile = shape.n_q <= queries and shape.l_q <= tile.block_q and shape.dim <= tile.block_k
    return Launch(tile, queries, (1 if one_tile else 2) if shape.normalize else 0)


def forward_with_tile(
    q: torch.Tensor, d: torch.Tensor, tile: tiles.TileConfig, scores: torch.Tensor, argmax: torch.Tensor
) -> None:
    """The Triton forward of dense tensors with a given tile."""
    from latemax.ops import triton_backend

    triton_backend.forward(q, d, None, None, scores, argmax, normalize=False, empty_score=0.0, tile=tile)


def forget_prepared_launches() -> None:
    """The next call of any form is prepared anew."""
    launch._again.clear()


def steps_of_a_prepared_call(q: torch.Tensor, d: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What an eager call with a prepared launch consists of."""
    empty_score = float("-inf")
    options = functools.partial(
        _check.options, normalize=False, empty_score=empty_score, return_argmax=False, backend="triton"
    )
    return {
        "check the options": options,
        "check the arguments": lambda: _check.arguments(q, d),
        "rule out transforms": lambda: (schema._refuse_transforms(q, d), schema._plain(q, d, None, None)),
        "look up, allocate, launch": lambda: launch.forward(q, d, None, None, False, empty_score, False, "triton"),
    }


def steps_of_an_unprepared_call(q: torch.Tensor, d: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What a call without a prepared launch does instead of looking one up."""
    from latemax.ops import triton_backend

    arguments = _check.arguments(q, d)
    options = dict(normalize=False, argmax=False, train=False)
    choice = launch.choose(arguments, "triton", **options)
    scores, argmax = launch.allocate(q, d, False)
    return {
        "choose backend and tile": lambda: launch.choose(arguments, "triton", **options),
        "allocate the outputs": lambda: launch.allocate(q, d, False),
        "prepare and launch": lambda: triton_backend.forward(
            q, d, None, None, scores, argmax, normalize=False, empty_score=float("-inf"), tile=choice.tile
        ),
    }
