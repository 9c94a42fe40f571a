"""What the CPU path is compared with, each where it is installed: name → a call that returns scores [n_d]."""

from __future__ import annotations

import importlib.util
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

PEERS = ("fast-maxsim", "lateweave", "maxsim-cpu", "numkong")
Runs = dict[str, Callable[[], Any]]


def fast_maxsim(q: torch.Tensor, d: torch.Tensor) -> Runs:
    if not importlib.util.find_spec("fast_maxsim"):
        return {}
    from fast_maxsim import maxsim_scores

    a, b = q.numpy(), d.numpy()
    return {"fast-maxsim": lambda: torch.as_tensor(maxsim_scores(a, b))}


def numkong(q: torch.Tensor, d: torch.Tensor) -> Runs:
    if not importlib.util.find_spec("numkong"):
        return {}
    import numkong as package

    packed_q = package.maxsim_pack(q.numpy())
    packed_d = [package.maxsim_pack(document) for document in d.numpy()]

    # it returns Σ (1 - similarity) of unit vectors
    def run() -> torch.Tensor:
        return torch.tensor([len(q) - package.maxsim_packed(packed_q, document) for document in packed_d])

    return {"numkong (approximate, 1 thread)": run}


def lateweave(q: torch.Tensor, d: torch.Tensor) -> Runs:
    """Its kernel of float32 tokens in memory, and its reranker of a store of int8 codes, which decodes them."""
    if not importlib.util.find_spec("lateweave"):
        return {}
    import lateweave as package

    threads, (n, length, dim) = torch.get_num_threads(), d.shape
    query, documents, lengths = q.numpy(), d.flatten(0, 1).numpy(), np.full(n, length)
    folder = tempfile.TemporaryDirectory()
    path, ids = pathlib.Path(folder.name) / "store", [str(i) for i in range(n)]
    kind = package.Representation(encoder="none", encoder_revision="0", dimension=dim, normalized=True)
    writer = package.VectorStoreWriter.create(path, "d", kind, encoding="int8")
    writer.append(ids, documents, lengths)
    writer.commit()
    reranker = package.MaxSimReranker([package.VectorStore(path)])
    candidates = [package.Candidate("d", id, 0.0, i, "") for i, id in enumerate(ids)]
    asked = package.Query("", multi_vector=package.Feature(kind, query))
    budget = package.ResourceBudget(threads=threads)

    # the default keeps the folder as long as the call
    def int8(_folder: Any = folder) -> torch.Tensor:
        return torch.tensor(reranker.rerank(asked, candidates, budget=budget).scores)

    return {
        "lateweave, float32 × float32": lambda: torch.as_tensor(
            package.maxsim_scores_packed(query, documents, lengths, threads=threads)
        ),
        "lateweave, float32 × int8 store": int8,
    }
