"""``latemax evaluate``: what codes and first stages keep of a store's exact ranking, and what they cost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from latemax.cli.files import SUFFIXES
from latemax.cli.index import check_device
from latemax.cli.models import load_model
from latemax.cli.search import load_tokens
from latemax.cli.terminal import printable
from latemax.search import Quality, retention
from latemax.store import PatchStore, StoreError


def evaluate(
    store: str, *, queries: Sequence[str], k: int = 10, candidates: int = 50, normalize: bool = False,
    memory_mib: int = 1024, device: str | None = None, plot: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compares 8-bit codes, one-bit codes and mean pooling with the exact ranking of a store.

    Args:
        store: the store's folder.
        queries: files of query tokens (.npy, .safetensors, .pt), or images, which the store's model encodes.
        k: documents that count. candidates: of a first stage, which are rescored.
        normalize: L2-normalize all tokens before scoring.
        memory_mib: MiB of read buffers.
        device: device of the encoder; None is the CPU.
        plot: a file for the plot of quality against bytes.

    Returns:
        ``{"store", "documents", "queries", "k", "rows": [{"method", "overlap", "ndcg", "bytes", "ms"}, …]}``, and
        ``"plot"``, the file, with ``plot``.

    Raises:
        FileNotFoundError: no such file, or no folder for the plot. StoreError: the store is damaged, or does not say
            which model made it. ValueError: a wrong file or device, an empty store.
    """
    check_device(device)
    if plot is not None and not os.path.isdir(os.path.dirname(os.path.abspath(plot))):
        raise FileNotFoundError(f"--plot {plot}: no such folder")
    pages = PatchStore(store)
    if not len(pages):
        raise ValueError(f"{store} holds no document")
    q, mask = padded(load_queries(pages, queries, device))
    rows = retention(
        q, pages, k, mask, n_candidates=candidates, normalize=normalize, memory=memory_mib << 20, progress=True
    )
    result: dict[str, Any] = {"store": store, "documents": len(pages), "queries": len(q), "k": min(k, len(pages))}
    result["rows"] = [{name: value for name, value in row._asdict().items() if name != "indices"} for row in rows]
    if plot is not None:
        _save_plot(rows, plot, os.path.basename(os.path.normpath(store)))
        result["plot"] = plot
    return result


def load_queries(pages: PatchStore, paths: Sequence[str], device: str | None) -> list[Tensor]:
    """Query tokens [l_i, dim] of files of tokens and of images."""
    found: list[Tensor] = []
    images = [path for path in paths if path.lower().endswith(SUFFIXES)]
    for path in paths:
        if not path.lower().endswith(SUFFIXES):
            tokens = load_tokens(path)
            found += [tokens] if tokens.dim() == 2 else list(tokens)
    if images:
        if "model" not in pages.meta:
            raise StoreError(f"{pages.path} does not say which model made it: pass files of tokens as queries")
        adapter = pages.meta.get("adapter")
        space = pages.meta.get("space", "patches" if adapter is None else None)
        model = load_model(pages.meta["model"], adapter, space, device)
        found += [out.tokens for path in images for out in model.images([path], pages.meta.get("size"))]
    if not found:
        raise ValueError("evaluate needs at least one query")
    return [tokens.float().cpu() for tokens in found]


def padded(queries: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """[n_q, l_q, dim] and its mask, None where all have one length."""
    dims = {tokens.shape[-1] for tokens in queries}
    if len(dims) != 1:
        raise ValueError(f"queries must have one dim, got {', '.join(map(str, sorted(dims)))}")
    lengths = torch.tensor([len(tokens) for tokens in queries])
    q = pad_sequence(queries, batch_first=True)
    mask = torch.arange(q.shape[1]) < lengths.unsqueeze(1)
    return q, None if bool(mask.all()) else mask


def _save_plot(rows: list[Quality], path: str, title: str) -> None:
    from latemax.viz import plot_quality

    plot_quality(rows, title=title).savefig(path)


def render(result: dict[str, Any]) -> str:
    """Formats what `evaluate` returned as the text of ``latemax evaluate``."""
    k = result["k"]
    lines = [
        f"{printable(result['store'])}: {result['documents']} documents, {result['queries']} queries, "
        f"against the exact top {k}",
        f"{'':28}{f'top {k} kept':>12}{'nDCG':>8}{'bytes':>12}{'ms a query':>12}",
    ]
    lines += [
        f"{row['method']:28}{row['overlap']:12.3f}{row['ndcg']:8.3f}{row['bytes']:12,.0f}{row['ms']:12.2f}"
        for row in result["rows"]
    ]
    if "plot" in result:
        lines.append(f"{printable(result['plot'])} shows them")
    return "\n".join(lines)
