"""``encode``: images and PDF pages into a store, by workers of a Ray cluster that may die at any moment."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from latemax.arguments import check
from latemax.cli.files import ImageFile, Opener, Place, find_images
from latemax.cli.index import documents_of, encode_each, open_store, put, settings, stored_meta
from latemax.cli.models import load_model
from latemax.ray import cluster
from latemax.store import PatchStore, StoreWriter
from latemax.store.merge import append

# Workers that may die at one block: Ray Data starts new ones for ever, and an image that kills each must end the run.
TRIES = 4


class Encoder:
    """A worker: makes the store of one block after the other. Blocks that are there already are left as they are."""

    def __init__(
        self, folder: str, meta: dict[str, Any], space: str | None, dtype: str, codes: str | None, batch_size: int,
        device: str | None,
    ):  # fmt: skip
        self.folder, self.meta, self.batch_size = Path(folder), meta, batch_size
        self.store = dict(dtype=getattr(torch, dtype), codes=codes, shard_bytes=1 << 62)
        self.model = load_model(meta["model"], meta.get("adapter"), space, device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for name, files in zip(batch["name"], batch["files"], strict=True):
            if not (self.folder / name).exists():
                self.block(name, [_image(one) for one in json.loads(files)])
        return {"name": batch["name"]}

    def block(self, name: str, images: list[ImageFile]) -> None:
        """Writes a block's store under a name of its own, and gives it the block's name when it is whole."""
        if len(list(self.folder.glob(f".{name}-*"))) >= TRIES:
            raise RuntimeError(f"{TRIES} workers died at one block, {images[0].name} to {images[-1].name}")
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-{os.getpid()}-", dir=self.folder))
        left_out, opener, size = {}, Opener(), self.meta["size"]
        with StoreWriter(scratch / "store", **self.store) as writer:
            for start in range(0, len(images), self.batch_size):
                for image, result in encode_each(self.model, opener, images[start : start + self.batch_size], size):
                    reason = result if isinstance(result, str) else put(writer, image, None, result)
                    if reason:
                        left_out[image.name] = reason
        opener.close()
        (scratch / "left_out.json").write_text(json.dumps(left_out))
        try:
            os.rename(scratch, self.folder / name)
        except OSError:
            # a worker that was taken for dead was not
            if not (self.folder / name).exists():
                raise
            shutil.rmtree(scratch, ignore_errors=True)


def encode(
    paths: Sequence[str | os.PathLike[str]], *, model: str, out: str | os.PathLike[str], num_workers: int = 1,
    num_cpus: float = 1, num_gpus: float = 0,
    dtype: str = "float16", codes: str | None = None, size: int | None = None, batch_size: int = 16,
    adapter: str | None = None, block: int = 256, progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Encodes images and pages of PDF files into a store, with workers of a Ray cluster (Ray Data).

    Images are cut into blocks. A worker writes the store of a block into the folder ``out + ".blocks"``, named after
    its content, and renames it when it is complete; at the end the documents of all blocks join ``out`` in one
    transaction, in the order of ``paths``. If a worker dies, another one encodes its block again. A run that was
    stopped leaves ``out`` as it was; the same call continues with the blocks that exist. Ids, metadata and what is
    left out are those of ``latemax index``, and images that ``out`` holds unchanged are skipped.

    Args:
        paths: image and PDF files, and folders of them, under the same names on every machine.
        model: a folder or hub name. adapter: a LoRA file for it.
        out: the store's folder, on a disk that all machines share; created if missing.
        num_workers: encoders at a time. num_cpus, num_gpus: of each; with a GPU it encodes there.
        dtype: of the stored tokens. codes: "int8" also stores 8-bit codes.
        size: of images in pixels; None takes the model's own.
        batch_size: images per batch. block: images per block.
        progress: Ray Data's own progress on stderr.

    Returns:
        ``{"store", "indexed", "already", "blocks", "left_out": [{"path", "reason"}, …], "documents"}``; ``blocks``
        counts those that were made now and those that an earlier run had made: ``{"made", "found"}``.

    Raises:
        ImportError: Ray, or what its part for data needs, is missing.
        StoreError: ``out`` is damaged, in use, or was made with other settings.
        ValueError: no list of paths, or no image in them; settings that do not fit the model; numbers below 1.
        RuntimeError: a worker failed for another reason than an image, or four died at one block.
    """
    for name, number in dict(num_workers=num_workers, batch_size=batch_size, block=block).items():
        check.check_positive(name, number)
    if isinstance(paths, (str, os.PathLike)):
        raise ValueError(f"paths must be a list of files and folders, got {paths!r}")
    found, out = find_images([os.fspath(path) for path in paths]), os.fspath(out)
    if not found.images:
        raise ValueError(f"paths must name at least one image or PDF, got {list(paths)!r}")
    meta, stored = settings(model, size, adapter), stored_meta(out)
    space = None
    if stored is not None:
        meta |= {key: stored[key] for key in ("model_id", "space") if key in stored}
        space = meta.get("space", "patches" if adapter is None else None)
    else:
        space = load_model(meta["model"], adapter, None, None).space
        meta |= {"model_id": meta["model"], "space": space}
    known = {} if stored is None else documents_of(out)
    todo = []
    for image in found.images:
        old = known.get(image.place)
        if old is None or {**old.meta, **image.meta()} != old.meta:
            todo.append(image)
    folder = Path(out + ".blocks")
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*"):
        shutil.rmtree(left, ignore_errors=True)
    blocks = {
        _name([meta, dtype, codes], part): part for part in (todo[i : i + block] for i in range(0, len(todo), block))
    }
    missing = {name: part for name, part in blocks.items() if not (folder / name).exists()}
    if missing:
        worker = dict(
            folder=str(folder.absolute()), meta=meta, space=space, dtype=dtype, codes=codes,
            batch_size=batch_size, device="cuda" if num_gpus else None,
        )  # fmt: skip
        _run(missing, worker, num_workers, dict(num_cpus=num_cpus, num_gpus=num_gpus), progress)
    left_out = dict(found.left_out)
    for name in blocks:
        left_out |= json.loads((folder / name / "left_out.json").read_text())
    with open_store(out, dtype, codes, meta) as writer:
        append(writer, [PatchStore(folder / name / "store") for name in blocks])
        documents = len(writer)
    shutil.rmtree(folder, ignore_errors=True)
    lost = len([path for path in left_out if path not in found.left_out])
    return {
        "store": out, "indexed": len(todo) - lost, "already": len(found.images) - len(todo),
        "blocks": {"made": len(missing), "found": len(blocks) - len(missing)},
        "left_out": [{"path": path, "reason": reason} for path, reason in left_out.items()], "documents": documents,
    }  # fmt: skip


def _run(
    blocks: dict[str, list[ImageFile]], worker: dict[str, Any], num_workers: int, needs: dict[str, Any], progress: bool
) -> None:
    """Has every block made, by a pool of actors that Ray Data keeps alive."""
    ray = cluster.imported()
    try:
        import ray.data as data
    except ImportError as error:
        raise ImportError(f'latemax.ray.encode needs Ray Data: pip install "latemax[ray]" ({error})') from error
    rows = [{"name": name, "files": json.dumps([_plain(image) for image in part])} for name, part in blocks.items()]
    with _quiet(data, progress):
        done = data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Encoder, batch_size=1, fn_constructor_kwargs=worker,
            compute=data.ActorPoolStrategy(size=min(num_workers, len(rows)), max_tasks_in_flight_per_actor=1),
            **needs,
        )  # fmt: skip
        try:
            names = {row["name"] for row in done.iter_rows()}
        except ray.exceptions.RayError as error:
            cause = str(error).strip().splitlines()
            raise RuntimeError(f"encode: a worker failed: {cause[-1] if cause else type(error).__name__}") from error
    assert names == set(blocks)


@contextmanager
def _quiet(data: Any, progress: bool) -> Iterator[None]:
    """Ray Data without its log lines and bars."""
    context, logger = data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, logger.level, logger.disabled
    try:
        if not progress:
            context.enable_progress_bars, logger.disabled = False, True
            logger.setLevel(logging.ERROR)
        yield
    finally:
        context.enable_progress_bars, _, logger.disabled = before
        logger.setLevel(before[1])


def _plain(image: ImageFile) -> list[Any]:
    return [image.path, *image.place, image.size, image.mtime_ns]


def _image(plain: list[Any]) -> ImageFile:
    path, real, page, size, mtime_ns = plain
    return ImageFile(path, Place(real, page), size, mtime_ns)


def _name(settings: list[Any], images: list[ImageFile]) -> str:
    """The name of a block: the same files in the same state with the same settings have the same."""
    content = json.dumps([settings, [_plain(image) for image in images]], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]
