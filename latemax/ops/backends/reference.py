"""The oracle as a backend: plain torch on any device, which writes every similarity to memory."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from latemax import reference
from latemax.ops.backends import decode, gather
from latemax.ops.backends.base import Status
from latemax.ops.problem import Batch, Gradients, Needs, Outputs, Plan, Problem, Side

name = "reference"


def status() -> Status:
    return Status(True, "plain torch; writes every similarity to memory")


def why_not(p: Problem, by_name: bool) -> str:
    # no other backend takes float64 where Triton cannot multiply it, or bounds that Triton does not compute
    return "" if by_name or p.dtype == torch.float64 or p.bounds else "plain torch runs only when asked for by name"


def plan(p: Problem, by_name: bool) -> Plan:
    why = "asked for by name" if by_name else "no other backend takes this"
    if p.bounds:
        return Plan(name, f"{why}: bounds in blocks of torch float64")
    return Plan(name, f"{why}: plain torch, writes every similarity to memory")


def forward(b: Batch, plan: Plan, out: Outputs) -> None:
    b = b._replace(q=decode.decoded(b.q, torch.float64), d=decode.decoded(b.d, torch.float64))
    if b.ragged:
        _ragged(b, out)
        return
    scores, argmax = reference.maxsim(
        b.q.tokens, b.d.tokens, b.q.mask, b.d.mask, normalize=b.normalize, empty_score=b.empty_score,
        return_argmax=True, q_weights=b.q.weights, reduce=_reduce(b),
    )  # fmt: skip
    out.scores.copy_(scores)
    if out.argmax is not None:
        out.argmax.copy_(argmax)


def backward(b: Batch, plan: Plan, argmax: Tensor, g: Tensor, needs: Needs) -> Gradients:
    return gather.backward(b, argmax, g, needs)


def _reduce(b: Batch) -> str:
    return "mean" if b.mean else "sum"


def _items(s: Side) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
    """(tokens [l, dim], mask [l] or None, weights [l] or None) of every query or document."""
    at: list[int | slice] = list(range(len(s.tokens)))
    if s.offsets is not None:
        at = [slice(first, last) for first, last in itertools.pairwise(s.offsets.tolist())]
    mask, weights = s.mask, s.weights
    return [(s.tokens[i], None if mask is None else mask[i], None if weights is None else weights[i]) for i in at]


def _ragged(b: Batch, out: Outputs) -> None:
    """Scores every pair on its own."""
    if out.argmax is not None:
        out.argmax.fill_(-1)
    documents = None if b.d.tokens.dim() == 4 else _items(b.d)
    none = (b.d.tokens.reshape(-1, b.dim)[:0], None, None)  # candidate -1
    starts = None if b.q.offsets is None else b.q.offsets.tolist()
    for a, (query, q_mask, weights) in enumerate(_items(b.q)):
        mine = documents
        if documents is None:
            mine = _items(Side(b.d.tokens[a], None if b.d.mask is None else b.d.mask[a]))
        elif b.candidates is not None:
            mine = [none if number < 0 else documents[number] for number in b.candidates[a].tolist()]
        for c, (document, d_mask, _) in enumerate(mine or ()):
            out.scores[a, c], argmax = reference.maxsim(
                query, document, q_mask, d_mask, normalize=b.normalize, empty_score=b.empty_score, return_argmax=True,
                q_weights=weights, reduce=_reduce(b),
            )  # fmt: skip
            if out.argmax is not None:
                into = out.argmax[a, c] if starts is None else out.argmax[c, starts[a] : starts[a + 1]]
                into.copy_(argmax)
