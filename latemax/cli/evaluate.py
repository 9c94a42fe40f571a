"""``latemax evaluate``: what codes and first stages keep of a store's exact ranking, and how well they answer."""

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
from latemax.cli.qrels import judged, measure, measuring, read
from latemax.cli.search import load_tokens
from latemax.cli.terminal import printable
from latemax.search import retention
from latemax.store import PatchStore, StoreError


def evaluate(
    store: str, *, queries: Sequence[str], k: int = 10, candidates: int = 50, normalize: bool = False,
    memory_mib: int = 1024, device: str | None = None, plot: str | None = None, qrels: str | None = None,
    stages: Sequence[str] = ("binary", "mean"),
) -> dict[str, Any]:  # fmt: skip
    """Compares 8-bit codes and first stages with the exact ranking of a store, and with judgements if there are any.

    Args:
        store: the store's folder.
        queries: files of query tokens (.npy, .safetensors, .pt), or images, which the store's model encodes.
        k: documents that count. candidates: of a first stage, which are rescored.
        normalize: L2-normalize all tokens before scoring.
        memory_mib: MiB of read buffers.
        device: device of the encoder; None is the CPU.
        plot: a file for the plot of quality against bytes; with ``qrels``, also against time.
        qrels: a file of judgements, ``query 0 document relevance`` a line. A query's name is that of its file, with
            ``#0``, ``#1``, … after it where the file holds several; a document's is its id. Queries without judgements
            do not count.
        stages: as in `latemax.search.retention`.

    Returns:
        ``{"store", "documents", "queries", "k", "rows": [{"method", "overlap", "ndcg", "bytes", "ms"}, …]}``, and
        ``"plot"``, the file, with ``plot``. With ``qrels``, ``"judged"`` counts the queries that have judgements, and a
        row's ``"relevance"`` is ``{"ndcg", "recall", "mrr"}`` at k.

    Raises:
        ImportError: ``qrels`` without ir-measures.
        FileNotFoundError: no such file, or no folder for the plot. StoreError: the store is damaged, or does not say
            which model made it. ValueError: a wrong file or device, an empty store.
    """
    check_device(device)
    if plot is not None and not os.path.isdir(os.path.dirname(os.path.abspath(plot))):
        raise FileNotFoundError(f"--plot {plot}: no such folder")
    judgements = None
    if qrels is not None:
        measuring()
        judgements = read(qrels)
    pages = PatchStore(store)
    if not len(pages):
        raise ValueError(f"{store} holds no document")
    named = load_queries(pages, queries, device)
    names, (q, mask) = [name for name, _ in named], padded([tokens for _, tokens in named])
    if judgements is not None:
        judged(names, judgements)
    rows = retention(
        q, pages, k, mask, n_candidates=candidates, stages=stages, normalize=normalize, memory=memory_mib << 20,
        progress=True,
    )  # fmt: skip
    result: dict[str, Any] = {"store": store, "documents": len(pages), "queries": len(q), "k": min(k, len(pages))}
    result["rows"] = [{name: value for name, value in row._asdict().items() if name != "indices"} for row in rows]
    if judgements is not None:
        result["judged"] = len(judged(names, judgements))
        for row, one in zip(rows, result["rows"], strict=True):
            one["relevance"] = measure(row.indices, names, pages.ids, judgements)
    if plot is not None:
        _save_plot(result["rows"], plot, os.path.basename(os.path.normpath(store)), result["k"])
        result["plot"] = plot
    return result


def load_queries(pages: PatchStore, paths: Sequence[str], device: str | None) -> list[tuple[str, Tensor]]:
    """(name, tokens [l_i, dim]) of the queries of files of tokens and of images, in the order of the files."""
    found: list[tuple[str, Tensor]] = []
    model = None
    for path in paths:
        name = os.path.basename(path)
        if not path.lower().endswith(SUFFIXES):
            tokens = load_tokens(path)
            several = tokens.dim() == 3
            found += [(f"{name}#{i}", one) for i, one in enumerate(tokens)] if several else [(name, tokens)]
            continue
        if model is None:
            if "model" not in pages.meta:
                raise StoreError(f"{pages.path} does not say which model made it: pass files of tokens as queries")
            adapter = pages.meta.get("adapter")
            space = pages.meta.get("space", "patches" if adapter is None else None)
            model = load_model(pages.meta["model"], adapter, space, device)
        found += [(name, out.tokens) for out in model.images([path], pages.meta.get("size"))]
    if not found:
        raise ValueError("evaluate needs at least one query")
    return [(name, tokens.float().cpu()) for name, tokens in found]


def padded(queries: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """[n_q, l_q, dim] and its mask, None where all have one length."""
    dims = {tokens.shape[-1] for tokens in queries}
    if len(dims) != 1:
        raise ValueError(f"queries must have one dim, got {', '.join(map(str, sorted(dims)))}")
    lengths = torch.tensor([len(tokens) for tokens in queries])
    q = pad_sequence(queries, batch_first=True)
    mask = torch.arange(q.shape[1]) < lengths.unsqueeze(1)
    return q, None if bool(mask.all()) else mask


def _save_plot(rows: list[dict[str, Any]], path: str, title: str, k: int) -> None:
    from types import SimpleNamespace

    from latemax.viz import plot_quality

    plain = [
        SimpleNamespace(**{**row, **{f"judged_{x}": y for x, y in row.get("relevance", {}).items()}}) for row in rows
    ]
    if "relevance" in rows[0]:
        figure = plot_quality(plain, value="judged_ndcg", over=("bytes", "ms"), label=f"nDCG@{k}", title=title)
    else:
        figure = plot_quality(plain, title=title)
    figure.savefig(path)


def render(result: dict[str, Any]) -> str:
    """Formats what `evaluate` returned as the text of ``latemax evaluate``."""
    k = result["k"]
    judged = f", {result['judged']} of them judged" if "judged" in result else ""
    head = f"{'':28}{f'top {k} kept':>12}{'nDCG':>8}{'bytes':>12}{'ms per query':>14}"
    lines = [
        f"{printable(result['store'])}: {result['documents']} documents, {result['queries']} queries{judged}, "
        f"against the exact top {k}",
        head + (f"{f'nDCG@{k}':>10}{f'recall@{k}':>11}{f'MRR@{k}':>9}" if judged else ""),
    ]
    for row in result["rows"]:
        line = f"{row['method']:28}{row['overlap']:12.3f}{row['ndcg']:8.3f}{row['bytes']:12,.0f}{row['ms']:14.2f}"
        if judged:
            of = row["relevance"]
            line += f"{of['ndcg']:10.3f}{of['recall']:11.3f}{of['mrr']:9.3f}"
        lines.append(line)
    if "plot" in result:
        lines.append(f"{printable(result['plot'])} shows them")
    return "\n".join(lines)
