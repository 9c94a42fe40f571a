"""``latemax index`` and ``latemax search``."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latemax._progress import Bar
from latemax.search import topk
from latemax.store import PatchStore, StoreError, StoreWriter

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# A kill loses at most this much work: 170 images at 256 patches of 384 float16 features.
SHARD_BYTES = 1 << 25


def find_images(paths: Sequence[str]) -> list[str]:
    """Lists the images to index, each once: files as given, and the images below each folder in sorted order.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no file that looks like an image.
    """
    found: dict[str, None] = {}
    for path in paths:
        if os.path.isdir(path):
            inside = (p for p in Path(path).rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            found.update(dict.fromkeys(sorted(os.fspath(p) for p in inside)))
        elif os.path.exists(path):
            found[os.fspath(path)] = None
        else:
            raise FileNotFoundError(f"{path}: no such file or folder")
    if not found:
        raise ValueError(f"no image ({', '.join(SUFFIXES)}) in {', '.join(paths)}")
    return list(found)


def index(
    paths: Sequence[str], *, model: str, store: str, dtype: str = "float16", size: int | None = None,
    batch_size: int = 16, device: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Encodes images into a store with their paths as ids, and skips the images that it already holds.

    However it ends, everything committed stays and the same call continues from there. Unreadable images are named on
    stderr and left out.

    Returns:
        ``{"store", "indexed", "already", "unreadable": [path, …], "documents"}``.
    """
    from latemax.encoders import PatchEncoder
    from latemax.encoders.images import load_image

    images, unreadable, indexed = find_images(paths), [], 0
    meta = {"model": model, "size": size}
    with StoreWriter(store, dtype=getattr(torch, dtype), shard_bytes=SHARD_BYTES, meta=meta) as writer:
        todo = [path for path in images if path not in writer]
        if todo:
            encoder, bar = PatchEncoder.from_pretrained(model), Bar(len(todo), "indexing ")
            for start in range(0, len(todo), batch_size):
                names, batch = [], []
                for path in todo[start : start + batch_size]:
                    try:
                        batch.append(load_image(path, path))
                        names.append(path)
                    except ValueError as error:
                        unreadable.append(path)
                        print(f"latemax index: left out: {error}", file=sys.stderr)
                if batch:
                    out = encoder.encode(batch, batch_size=batch_size, device=device, size=size, output_device="cpu")
                    for path, tokens, mask in zip(names, out.tokens, out.mask, strict=True):
                        writer.add(tokens[mask].to(writer.dtype), path)
                    indexed += len(batch)
                bar.tick(min(batch_size, len(todo) - start))
        documents = len(writer)
    return {
        "store": store, "indexed": indexed, "already": len(images) - len(todo), "unreadable": unreadable,
        "documents": documents,
    }  # fmt: skip


def search(
    store: str, *, image: str | None = None, tokens: str | None = None, k: int = 10, size: int | None = None,
    normalize: bool = False, memory_mib: int = 1024, device: str | None = None, verify: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Finds the k best documents of a store (all of them if it has fewer) for an image or for query tokens.

    Args:
        store: the store's folder.
        image: a file, encoded with the model that the store was indexed with. Exclusive with ``tokens``.
        tokens: a .npy, .safetensors (its only tensor, or the one called "tokens") or .pt file, [l_q, dim] or
            [n_q, l_q, dim].
        k: number of results.
        size: size of the query image in pixels; None takes that of the store's images.
        normalize: L2-normalize all tokens before scoring.
        memory_mib: MiB of read buffers.
        device: device that scores; None is the CPU.
        verify: check every byte of the store first.

    Returns:
        ``{"store", "query", "documents", "results"}``. ``results`` holds a list for every query:
        ``[{"rank", "id", "index", "score"}, …]``; a score that is not finite is None.
    """
    pages = PatchStore(store)
    if verify:
        pages.verify()
    if image is not None:
        q = _encoded(pages, image, size)
    elif tokens is not None:
        q = load_tokens(tokens)
    else:
        raise ValueError("search needs an image or query tokens")
    q = q.unsqueeze(0) if q.dim() == 2 else q
    found = topk(
        q, pages, min(k, len(pages)), normalize=normalize, memory=memory_mib << 20, device=device, progress=True
    )  # fmt: skip
    results = [
        [
            {"rank": rank, "id": pages.ids[i], "index": i, "score": score if math.isfinite(score) else None}
            for rank, (score, i) in enumerate(zip(scores, indices, strict=True), 1)
        ]
        for scores, indices in zip(found.scores.tolist(), found.indices.tolist(), strict=True)
    ]
    return {"store": store, "query": image or tokens, "documents": len(pages), "results": results}


def _encoded(pages: PatchStore, image: str, size: int | None) -> Tensor:
    from latemax.encoders import PatchEncoder

    if "model" not in pages.meta:
        raise StoreError(f"{pages.path} does not say which model made it: pass --tokens instead of --image")
    encoder = PatchEncoder.from_pretrained(pages.meta["model"])
    out = encoder.encode([image], size=pages.meta.get("size") if size is None else size)
    return out.tokens[0][out.mask[0]]


def load_tokens(path: str) -> Tensor:
    """Reads query tokens, [l_q, dim] or [n_q, l_q, dim], from a .npy, .safetensors or .pt file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or other content.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    suffix = Path(path).suffix
    if suffix == ".npy":
        import numpy as np

        found = torch.from_numpy(np.load(path, allow_pickle=False))
    elif suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(path)
        if "tokens" not in tensors and len(tensors) != 1:
            raise ValueError(
                f'{path} must hold one tensor, or one called "tokens"; it has {", ".join(sorted(tensors))}'
            )
        found = tensors.get("tokens", next(iter(tensors.values())))
    elif suffix == ".pt":
        found = torch.load(path, map_location="cpu", weights_only=True)
    else:
        raise ValueError(f"{path} must be a .npy, .safetensors or .pt file")
    if not isinstance(found, Tensor) or found.dim() not in (2, 3):
        came = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{path} must hold tokens [l_q, dim] or [n_q, l_q, dim], got {came}")
    if not found.is_floating_point():
        raise ValueError(f"{path} must hold floats, got {found.dtype}")
    return found


def render(result: dict[str, Any]) -> str:
    """Formats what `search` returned as the text of ``latemax search``."""
    lines = []
    for number, rows in enumerate(result["results"], 1):
        if len(result["results"]) > 1:
            lines.append(f"query {number}")
        for row in rows:
            score = "      none" if row["score"] is None else f"{row['score']:10.4f}"
            lines.append(f"{row['rank']:4}  {score}  {row['id']}")
    return "\n".join(lines)
