"""Chunks of a corpus on the device that scores them; the next one is read while the last one is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from latemax.search.corpus import Corpus
from latemax.search.tokens import copy

Run = tuple[int, int]


def chunks(
    corpus: Corpus, runs: list[Run], device: torch.device, buffers: list[Any] | None = None
) -> Iterator[tuple[Run, Any]]:
    """((a, b), tokens [t, dim] of documents a … b - 1 on the device) in order; valid until the next.

    buffers: of `reserved`, for several calls that read on the host: their pages are touched once.
    """
    if corpus.resident and corpus.device == device:
        return (((a, b), corpus.view(a, b)) for a, b in runs)
    return _to_cuda(corpus, runs, device) if device.type == "cuda" else _read_ahead(corpus, runs, buffers)


def reserved(corpus: Corpus, rows: int, device: torch.device) -> list[Any] | None:
    """Two buffers for chunks of at most ``rows`` tokens; None where `chunks` needs none, or torch keeps them."""
    if device.type == "cuda" or (corpus.resident and corpus.device == device):
        return None
    return [corpus.empty(min(rows, int(corpus.offsets[-1]))) for _ in range(2)]


def _rows(corpus: Corpus, run: Run) -> int:
    return int(corpus.offsets[run[1]] - corpus.offsets[run[0]])


def _buffers(corpus: Corpus, runs: list[Run], place: Callable[[Tensor], Tensor] | None = None) -> list[Any]:
    longest = max((_rows(corpus, run) for run in runs), default=0)
    buffers = [corpus.empty(longest) for _ in runs[:2]]
    if place is None:
        return buffers
    return [place(x) if isinstance(x, Tensor) else x._map(place) for x in buffers]


def _read_ahead(corpus: Corpus, runs: list[Run], kept: list[Any] | None) -> Iterator[tuple[Run, Any]]:
    """Through two host buffers; a thread fills one while the other is scored."""
    buffers = _buffers(corpus, runs) if kept is None else kept

    def read(i: int) -> Any:
        tokens = buffers[i % 2][: _rows(corpus, runs[i])]
        corpus.read(*runs[i], tokens)
        return tokens

    if len(runs) == 1:
        yield runs[0], read(0)
        return
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(read, 0) if runs else None
        for i, run in enumerate(runs):
            tokens = coming.result()
            if i + 1 < len(runs):
                coming = pool.submit(read, i + 1)
            yield run, tokens


def _to_cuda(corpus: Corpus, runs: list[Run], device: torch.device) -> Iterator[tuple[Run, Any]]:
    """Through two pinned host buffers and two on the device; copies on a side stream.

    A host buffer is filled again once its copy has ended (the thread waits for the event), a device buffer is copied
    into again once the scoring that read it has ended (the side stream waits for the event; the host does not).
    """
    hosts = _buffers(corpus, runs, lambda x: torch.empty_like(x, pin_memory=True))
    devices = _buffers(corpus, runs, lambda x: torch.empty_like(x, device=device))
    compute, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    # the device buffers were allocated on the stream that computes
    side.wait_stream(compute)
    copied, scored = [torch.cuda.Event() for _ in hosts], [torch.cuda.Event() for _ in hosts]

    def send(i: int) -> Any:
        slot, rows = i % 2, _rows(corpus, runs[i])
        with torch.cuda.device(device), torch.no_grad():
            # an event that was never recorded is complete
            copied[slot].synchronize()
            corpus.read(*runs[i], hosts[slot][:rows])
            with torch.cuda.stream(side):
                side.wait_event(scored[slot])
                copy(hosts[slot][:rows], devices[slot][:rows], non_blocking=True)
                copied[slot].record(side)
        return devices[slot][:rows]

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(send, 0) if runs else None
        try:
            for i, run in enumerate(runs):
                tokens = coming.result()
                if i + 1 < len(runs):
                    # its device buffer is that of chunk i - 1, whose scoring was recorded below
                    coming = pool.submit(send, i + 1)
                compute.wait_event(copied[i % 2])
                yield run, tokens
                scored[i % 2].record(compute)
        finally:
            # before the buffers go back to the allocator of the stream that computes
            compute.wait_stream(side)
