"""Many processes (torch.distributed, torchrun): exact top-k over sharded corpora, and in-batch scoring across ranks.

Every function here is a collective: all ranks of the group call it, in the same order. Ranks compare what they were
given first and fail together, with one message; a rank that dies or never comes ends the wait after ``timeout``.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from latemax.api import maxsim
from latemax.arguments import check
from latemax.arguments.batch import batch_of
from latemax.ops.problem import score_dtype
from latemax.search import TopK
from latemax.search import corpus as corpora
from latemax.search import topk as local_topk
from latemax.search.exact import Within
from latemax.search.merge import best

__all__ = ["in_batch", "topk"]
Result = TypeVar("Result")


class _Group:
    """The group's collectives with a time limit, on the device its backend takes."""

    def __init__(self, group: dist.ProcessGroup | None, timeout: float, what: str):
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("torch.distributed is not set up: call torch.distributed.init_process_group first")
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
            raise ValueError(f"timeout must be a number of seconds above 0, got {timeout!r}")
        self.group, self.what, self.seconds = group, what, timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        on_cuda = "nccl" in str(dist.get_backend(group))
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")

    def wait(self, start: Callable[..., Any], *tensors: Any, **options: Any) -> None:
        """Runs a collective to its end, or raises after the time limit."""
        try:
            start(*tensors, group=self.group, async_op=True, **options).wait(datetime.timedelta(seconds=self.seconds))
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.what}: rank {self.rank} of {self.size} lost another rank: it died, failed, or did not answer "
                f"within {self.seconds:g} s ({str(error).splitlines()[0]})"
            ) from error

    def gather(self, x: Tensor) -> list[Tensor]:
        """x of every rank, all of one shape and dtype."""
        x = x.to(self.device).contiguous()
        found = [torch.empty_like(x) for _ in range(self.size)]
        self.wait(dist.all_gather, found, x)
        return found

    def exchange(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        """The message of every rank, as json can write it."""
        text = torch.tensor(list(json.dumps(message).encode()), dtype=torch.uint8, device="cpu")
        lengths = torch.cat(self.gather(torch.tensor([len(text)], device="cpu"))).tolist()
        padded = torch.nn.functional.pad(text, (0, max(lengths) - len(text)))
        texts = [bytes(x.tolist()) for x in self.gather(padded)]
        return [json.loads(text[:length]) for text, length in zip(texts, lengths, strict=True)]

    def agree(self, facts: list[dict[str, Any]], *names: str) -> None:
        """The same ValueError on every rank where facts differ."""
        for name in names:
            if len({json.dumps(fact[name]) for fact in facts}) > 1:
                came = ", ".join(f"rank {rank} has {fact[name]}" for rank, fact in enumerate(facts))
                raise ValueError(f"{self.what}: all ranks must have the same {name}; {came}")

    def share(self, work: Callable[[], Result]) -> Result:
        """``work()`` on this rank; if it failed on any rank, all raise, before anybody waits for a result."""
        results, error = [], None
        try:
            results.append(work())
        except Exception as failed:
            error = failed
        said = self.exchange({"error": None if error is None else f"{type(error).__name__}: {error}"})
        if error is not None:
            raise error
        failed = [f"rank {rank}: {fact['error']}" for rank, fact in enumerate(said) if fact["error"]]
        if failed:
            raise RuntimeError(f"{self.what}: {'; '.join(failed)}")
        return results[0]


def topk(
    q: Tensor,
    shard: Any,
    k: int,
    q_mask: Tensor | None = None,
    *,
    within: Within = None,
    return_argmax: bool = False,
    group: dist.ProcessGroup | None = None,
    timeout: float = 600.0,
    **options: Any,
) -> TopK:
    """`latemax.topk` over the shards of all ranks, as if they were concatenated in the order of the ranks.

    Every rank searches its own shard and sends k scores and indices per query. Equal bit for bit to one process
    with the whole corpus, where the backend scores a document alike whatever its batch mates (the native kernels do).

    Args:
        q: [l_q, dim] or [n_q, l_q, dim], the same on every rank. q_mask: likewise.
        shard: this rank's part of the corpus, in any form `latemax.topk` takes; of any size, an empty dense one too.
        k: how many; at most the documents of all ranks.
        within: as in `latemax.topk`, of this rank's shard; may be empty.
        return_argmax: as in `latemax.topk`, the same on every rank.
        group: of processes; None is all of them.
        timeout: seconds to wait for the other ranks at every step; must cover the slowest rank's search.
        options: as in `latemax.topk`.

    Returns:
        TopK on q's device, the same on every rank; indices count documents over all shards.

    Raises:
        ValueError: on every rank, where q's shape or dtype, k, return_argmax, or the corpus's dim or dtype differ among
            ranks.
        RuntimeError: on every rank that is left, where another failed, died or was too late.
    """
    ranks = _Group(group, timeout, "topk")

    def look() -> dict[str, Any]:
        check.check_tokens("q", q, (2, 3), "[l_q, dim] or [n_q, l_q, dim]")
        check.check_positive("k", k)
        found = corpora.of(shard, options.get("d_mask"))
        documents = corpora.chosen(within, found)
        return {
            "shape of q": list(q.shape),
            "dtype of q": str(q.dtype),
            "k": k,
            "return_argmax": return_argmax,
            "dim of the corpus": found.dim,
            "dtype of the corpus": str(found.dtype),
            "documents": len(found),
            "within": len(found) if documents is None else len(documents),
        }

    facts = ranks.exchange(ranks.share(look))
    ranks.agree(facts, "shape of q", "dtype of q", "k", "return_argmax", "dim of the corpus", "dtype of the corpus")
    counts, searched = [fact["documents"] for fact in facts], [fact["within"] for fact in facts]
    if k > sum(searched):
        raise ValueError(f"k must be at most the number of documents of all ranks, {sum(searched)}; got {k}")
    kept = min(k, searched[ranks.rank])
    options |= dict(within=within, return_argmax=return_argmax)
    mine = ranks.share(lambda: local_topk(q, shard, kept, q_mask, **options) if kept else None)

    n_q, l_q = 1 if q.dim() == 2 else len(q), q.shape[-2]
    of_corpus = getattr(torch, facts[0]["dtype of the corpus"].removeprefix("torch."))
    scores = torch.zeros(n_q, k, dtype=score_dtype(q.dtype, of_corpus), device="cpu")
    indices = torch.zeros(n_q, k, dtype=torch.int64, device="cpu")
    argmax = torch.zeros(n_q, k, l_q if return_argmax else 0, dtype=torch.int32, device="cpu")
    if mine is not None:
        scores[:, :kept] = mine.scores.view(n_q, kept)
        indices[:, :kept] = mine.indices.view(n_q, kept) + sum(counts[: ranks.rank])
        if mine.argmax is not None:
            argmax[:, :kept] = mine.argmax.view(n_q, kept, l_q)
    real = [min(k, count) for count in searched]

    def together(x: Tensor) -> Tensor:
        return torch.cat([part[:, :n] for part, n in zip(ranks.gather(x), real, strict=True)], 1)

    all_scores, all_indices = together(scores), together(indices)
    order = best(all_scores, torch.arange(all_scores.shape[1], device=all_scores.device).expand_as(all_scores), k)
    result = TopK(order.scores.to(q.device), all_indices.gather(1, order.indices).to(q.device))
    if return_argmax:
        at = order.indices.unsqueeze(-1).expand(-1, -1, l_q)
        result.argmax = together(argmax).gather(1, at).to(q.device)
    return result.row(0) if q.dim() == 2 else result


def in_batch(
    q: Tensor,
    d: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
    *,
    chunk: int | None = None,
    group: dist.ProcessGroup | None = None,
    timeout: float = 600.0,
    normalize: bool = False,
    empty_score: float = -math.inf,
    backend: str = "auto",
) -> Tensor:
    """Scores of this rank's queries against the documents of all ranks, differentiable on both sides.

    Documents travel ``chunk`` at a time, so memory holds that many foreign documents, not the whole batch. Backward is
    collective too: it sends them again, scores again, and adds every rank's gradient of a document on the rank that
    owns it. Gradients are sums over the ranks' losses, as with torch.distributed.nn.functional.all_gather; DDP's mean
    over ranks is the caller's.

    Args:
        q: [n_q, l_q, dim] and d: [n_d, l_d, dim] of this rank; n_q, l_q, n_d and l_d may differ among ranks.
        q_mask, d_mask: [n_q, l_q], [n_d, l_d].
        chunk: documents per transfer; None sends all of a rank's at once.
        group, timeout: as in `topk`. normalize, empty_score, backend: as in `maxsim`.

    Returns:
        scores [n_q, documents of all ranks], in the order of the ranks: this rank's own begin after those of the ranks
        before it.

    Raises:
        ValueError: on every rank, where dtype, dim, options or the need of gradients differ among ranks.
        RuntimeError: on every rank that is left, where another failed, died or was too late.
    """
    ranks = _Group(group, timeout, "in_batch")

    def look() -> dict[str, Any]:
        number = check.check_options(normalize=normalize, empty_score=empty_score, return_argmax=False, backend=backend)
        check.check_tokens("q", q, (3,), "[n_q, l_q, dim]")
        check.check_tokens("d", d, (3,), "[n_d, l_d, dim]")
        batch_of(q, d, q_mask, d_mask)
        if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
            raise ValueError(f"chunk must be an int >= 1 or None, got {chunk!r}")
        grads = torch.is_grad_enabled()
        return {
            "dim": q.shape[-1],
            "dtype of q": str(q.dtype),
            "dtype of d": str(d.dtype),
            "chunk": chunk,
            "normalize": normalize,
            "empty_score": number,
            "need of gradients (q, d)": [grads and q.requires_grad, grads and d.requires_grad],
            "n_d": d.shape[0],
            "l_d": d.shape[1],
            "masked": d_mask is not None,
        }

    facts = ranks.exchange(ranks.share(look))
    ranks.agree(
        facts, "dim", "dtype of q", "dtype of d", "chunk", "normalize", "empty_score", "need of gradients (q, d)"
    )
    keep = None if q_mask is None else q_mask != 0
    d_keep = None if d_mask is None else d_mask != 0
    options = dict(normalize=normalize, empty_score=empty_score, backend=backend)
    return _InBatch.apply(q, d, keep, d_keep, ranks, facts, chunk, options)


class _InBatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        d: Tensor,
        q_mask: Tensor | None,
        d_mask: Tensor | None,
        ranks: _Group,
        facts: list[dict[str, Any]],
        chunk: int | None,
        options: dict[str, Any],
    ) -> Tensor:
        ctx.save_for_backward(q, d, q_mask, d_mask)
        ctx.rest = ranks, facts, chunk, options
        parts = [
            maxsim(q, part, q_mask, keep, **options)
            for _, _, part, keep in _documents(q, d, d_mask, ranks, facts, chunk)
        ]
        # no rank has a document: the dtype is that of this one's own empty d
        return torch.cat(parts or [maxsim(q, d, q_mask, d_mask, **options)], 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, d, q_mask, d_mask = ctx.saved_tensors
        ranks, facts, chunk, options = ctx.rest
        needs_q, needs_d = ctx.needs_input_grad[:2]
        # sums over chunks and ranks in float32 or wider, rounded once at the end
        wide = torch.promote_types(q.dtype, torch.float32), torch.promote_types(d.dtype, torch.float32)
        grad_q = torch.zeros_like(q, dtype=wide[0]) if needs_q else None
        grad_d = torch.zeros_like(d, dtype=wide[1]) if needs_d else None
        column = 0
        for owner, start, part, keep in _documents(q, d, d_mask, ranks, facts, chunk):
            with torch.enable_grad():
                one, other = q.detach().requires_grad_(needs_q), part.detach().requires_grad_(needs_d)
                scores = maxsim(one, other, q_mask, keep, **options)
                wanted = [x for x, needed in ((one, needs_q), (other, needs_d)) if needed]
                found = list(torch.autograd.grad(scores, wanted, g[:, column : column + len(part)]))
            column += len(part)
            if needs_q:
                grad_q += found.pop(0)
            if needs_d:
                total = found.pop(0).to(ranks.device, wide[1]).contiguous()
                ranks.wait(dist.reduce, total, dst=_global_rank(ranks, owner))
                if owner == ranks.rank:
                    grad_d[start : start + len(part)] = total.to(d.device)
        return (
            None if grad_q is None else grad_q.to(q.dtype),
            None if grad_d is None else grad_d.to(d.dtype),
            *(None,) * 6,
        )


def _global_rank(ranks: _Group, rank: int) -> int:
    return rank if ranks.group is None else dist.get_global_rank(ranks.group, rank)


def _documents(
    q: Tensor, d: Tensor, d_mask: Tensor | None, ranks: _Group, facts: list[dict[str, Any]], chunk: int | None
) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
    """(owner, first, documents [n, l_d, dim], mask or None) of every rank in turn, on q's device; a collective."""
    for owner, fact in enumerate(facts):
        step = chunk or max(fact["n_d"], 1)
        for start in range(0, fact["n_d"], step):
            n, own = min(step, fact["n_d"] - start), owner == ranks.rank
            part = d.detach()[start : start + n].to(ranks.device).contiguous() if own else None
            if part is None:
                part = torch.empty(n, fact["l_d"], fact["dim"], dtype=d.dtype, device=ranks.device)
            ranks.wait(dist.broadcast, part, src=_global_rank(ranks, owner))
            keep = None
            if fact["masked"]:
                shape = (n, fact["l_d"])
                keep = d_mask[start : start + n].to(ranks.device, torch.uint8).contiguous() if own else None
                keep = torch.empty(shape, dtype=torch.uint8, device=ranks.device) if keep is None else keep
                ranks.wait(dist.broadcast, keep, src=_global_rank(ranks, owner))
                keep = keep.bool().to(q.device)
            yield owner, start, part.to(q.device), keep
