"""``latemax index``: images and pages of PDF files into a store, and the store kept in step with the files."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from latemax._progress import Bar
from latemax.cli.files import SUFFIXES, ImageFile, Opener, Place, find_images, is_gone, place_of, reason_of
from latemax.cli.models import Encoded, Model, load_model
from latemax.cli.terminal import printable
from latemax.store import PatchStore, StoreError, StoreWriter

if TYPE_CHECKING:
    from PIL.Image import Image

# A kill loses at most this much work: 170 images at 256 patches of 384 float16 features.
SHARD_BYTES = 1 << 25


class Known(NamedTuple):
    """A document of the store: its id, and its metadata."""

    id: str
    meta: dict[str, Any]


def index(
    paths: Sequence[str], *, model: str, store: str, dtype: str = "float16", size: int | None = None,
    batch_size: int = 16, device: str | None = None, adapter: str | None = None, prune: bool = False,
    codes: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Encodes images into a store with their paths as ids, and encodes those again that changed since.

    An image is known by its real path, whatever its spelling, and by its size and time of change; a page of a PDF, with
    the id ``report.pdf#page=3``, by its number too. No image ends the run: one that is gone, unreadable or cannot be
    encoded is named on stderr and left out (of one that the store holds, the earlier tokens stay); a PDF that is
    encrypted, damaged or without pages is named once. Pages are rendered a batch at a time. However the run ends,
    everything committed stays and the same call continues from there.

    A model with a text side gives tokens of the space that images share with text. The store records the model and the
    space; one that was made before spaces were recorded keeps the patch tokens it has.

    Args:
        paths: image and PDF files, and folders of them.
        model: a folder or hub name; a folder is recorded by its real path.
        store: the store's folder; created if missing.
        dtype: dtype of the stored tokens.
        size: image size in pixels; None takes the model's own.
        batch_size: images per batch.
        device: device of the encoder; None is the CPU.
        adapter: a LoRA file for the model.
        prune: remove the documents of those images in ``paths`` whose file was deleted, and of pages that their PDF no
            longer has.
        codes: "int8" also stores 8-bit codes; None does what the store does.

    Returns:
        ``{"store", "indexed", "replaced", "already", "deleted", "removed", "left_out": [{"path", "reason"}, …],
        "documents"}``. ``deleted`` counts the images in ``paths`` that the store still holds without ``prune``.

    Raises:
        ImportError: a PDF, and pypdfium2 is missing.
        StoreError: the store is damaged, in use, or was made with other settings.
        ValueError: no image, a device that does not work, or settings that do not fit the model.
    """
    check_device(device)
    found = find_images(paths)
    left_out = dict(found.left_out)
    counts = {"indexed": 0, "replaced": 0, "already": 0, "deleted": 0, "removed": 0}
    meta = settings(model, size, adapter)
    if not found.images and not prune:
        for path, reason in left_out.items():
            say_left_out(path, reason)
        raise ValueError(f"no image ({', '.join(SUFFIXES)}) in {', '.join(map(printable, paths))}")
    encoder, stored = None, stored_meta(store)
    if stored is None:
        encoder = load_model(meta["model"], adapter, None, device)
        meta |= {"model_id": meta["model"], "space": encoder.space}
    else:
        meta |= {key: stored[key] for key in ("model_id", "space") if key in stored}
    with open_store(store, dtype, codes, meta) as writer:
        known = documents_of(store)
        folders, here = [os.path.realpath(path) for path in paths], {image.place for image in found.images}
        read = {place.real for place in here}
        recorded = [place for place, document in known.items() if "file" in document.meta and place not in here]
        for place in [place for place in recorded if place.real in read or is_gone(place.real, folders)]:
            counts["removed" if prune else "deleted"] += 1
            if prune:
                writer.remove(known.pop(place).id)
                left_out = {path: reason for path, reason in left_out.items() if os.path.realpath(path) != place.real}
        for path, reason in left_out.items():
            say_left_out(path, reason)
        todo = []
        for image in found.images:
            document = known.get(image.place)
            if document is None or {**document.meta, **image.meta()} != document.meta:
                todo.append(image)
            else:
                counts["already"] += 1
        if todo:
            if encoder is None:
                space = meta.get("space", "patches" if adapter is None else None)
                encoder = load_model(meta["model"], adapter, space, device)
            check_encoder(encoder, size, writer)
            bar, opener, began = Bar(len(todo), "indexing "), Opener(), time.perf_counter()
            for start in range(0, len(todo), batch_size):
                batch = todo[start : start + batch_size]
                for image, result in encode_each(encoder, opener, batch, size):
                    reason = result if isinstance(result, str) else put(writer, image, known.get(image.place), result)
                    if reason:
                        left_out[image.name] = reason
                        say_left_out(image.name, reason)
                    else:
                        counts["replaced" if image.place in known else "indexed"] += 1
                bar.tick(len(batch))
                if start == 0:
                    say_how_long(len(todo) - len(batch), (time.perf_counter() - began) / len(batch))
            opener.close()
        documents = len(writer)
    reasons = [{"path": path, "reason": reason} for path, reason in left_out.items()]
    return {"store": store, **counts, "left_out": reasons, "documents": documents}


def render(done: dict[str, Any]) -> str:
    """Formats what `index` returned as the text of ``latemax index``."""
    parts = [f"{done['indexed']} images indexed"]
    parts += [
        f"{number} {what}"
        for number, what in (
            (done["replaced"], "encoded again"),
            (done["already"], "already there"),
            (done["deleted"], "deleted but kept (--prune removes them)"),
            (done["removed"], "removed"),
            (len(done["left_out"]), "left out"),
        )
        if number
    ]
    return f"{', '.join(parts)}; {printable(done['store'])} holds {done['documents']}"


def say_how_long(images: int, seconds_each: float) -> None:
    """Says on stderr how long the remaining images take, if that is more than a moment."""
    seconds = images * seconds_each
    if seconds >= 30:
        length = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
        if seconds >= 7200:
            length = f"{seconds / 3600:.1f} h"
        print(f"latemax: {images} more images, about {length} at the rate of the first batch", file=sys.stderr)


def say_left_out(path: str, reason: str) -> None:
    """Names an image that is left out, on stderr."""
    print(f"latemax index: left out: {printable(path)}: {printable(reason)}", file=sys.stderr)


def settings(model: str, size: int | None, adapter: str | None) -> dict[str, Any]:
    """Returns the metadata of a store: how its images are encoded.

    Raises:
        ValueError: no such adapter file.
    """
    meta: dict[str, Any] = {"model": os.path.realpath(model) if os.path.isdir(model) else model, "size": size}
    if adapter is not None:
        if not os.path.isfile(adapter):
            raise ValueError(f"--adapter {adapter}: no such file")
        digest = hashlib.sha256(Path(adapter).read_bytes()).hexdigest()
        meta |= {"adapter": os.path.realpath(adapter), "adapter_sha256": digest}
    return meta


def stored_meta(store: str) -> dict[str, Any] | None:
    """Returns the metadata of a store, or None if there is no store yet."""
    try:
        return PatchStore(store).meta
    except FileNotFoundError:
        return None


def open_store(store: str, dtype: str, codes: str | None, meta: dict[str, Any]) -> StoreWriter:
    """Opens the writer.

    Raises:
        StoreError: as `StoreWriter`, or other settings than those of the store.
        ValueError: a store with integer ids, which paths cannot join.
    """
    writer = StoreWriter(store, dtype=getattr(torch, dtype), codes=codes, shard_bytes=SHARD_BYTES, meta=meta)
    if writer.id_type == "int":
        writer.close()
        raise ValueError(f"{store} has integer ids, to which paths of images cannot be added")
    return writer


def documents_of(store: str) -> dict[Place, Known]:
    """Returns place of the image -> document, of all documents of a store."""
    pages = PatchStore(store)
    known: dict[Place, Known] = {}
    for id, meta in zip(pages.ids, pages.metas(), strict=True):
        known.setdefault(place_of(str(id), meta), Known(str(id), meta))
    return known


def check_device(device: str | None) -> None:
    """Checks that torch can use a device.

    Raises:
        ValueError: naming it and the reason.
    """
    try:
        torch.empty(0, device=device)
    # AssertionError without CUDA, RuntimeError for unknown names and for a missing device
    except Exception as error:
        raise ValueError(f"--device {device} does not work here: {str(error).splitlines()[0]}") from error


def check_encoder(encoder: Model, size: int | None, writer: StoreWriter) -> None:
    """Encodes a grey image, so that wrong settings end the run before the first image and no image is blamed for them.

    Raises:
        ValueError: tokens of another width than the store's, or what the encoder raises.
    """
    from PIL import Image as pillow

    (out,) = encoder.images([pillow.new("RGB", (224, 224), "gray")], size)
    if writer.dim not in (None, out.tokens.shape[-1]):
        raise ValueError(f"{writer.path} holds tokens of {writer.dim} features, the model gives {out.tokens.shape[-1]}")


def encode_each(
    encoder: Model, opener: Opener, files: list[ImageFile], size: int | None
) -> Iterator[tuple[ImageFile, Encoded | str]]:
    """Encodes images in one batch, without those that the model's preprocessing refuses.

    Yields:
        (file, its document), or (file, why it cannot be encoded).
    """
    loaded: list[tuple[ImageFile, Image]] = []
    for file in files:
        try:
            loaded.append((file, opener.open(file)))
        except Exception as error:
            yield file, reason_of(error).removeprefix(f"image ({file.path}): ")
    if not loaded:
        return
    try:
        out = encoder.images([image for _, image in loaded], size)
    except Exception:
        bad = [encoder.why_not(image, size) for _, image in loaded]
        # not the fault of an image
        if not any(bad):
            raise
        yield from ((file, reason) for (file, _), reason in zip(loaded, bad, strict=True) if reason)
        loaded = [one for one, reason in zip(loaded, bad, strict=True) if not reason]
        if not loaded:
            return
        out = encoder.images([image for _, image in loaded], size)
    yield from ((file, document) for (file, _), document in zip(loaded, out, strict=True))


def put(writer: StoreWriter, image: ImageFile, document: Known | None, encoded: Encoded) -> str:
    """Adds a document, or replaces the image's earlier one; returns why it cannot be added, or ""."""
    tokens = encoded.tokens.to(writer.dtype)
    meta = {**image.meta(), "crop": encoded.crop}
    try:
        if document is None:
            writer.add(tokens, image.id, encoded.grid, meta, regions=encoded.regions)
        else:
            meta = {**document.meta, **meta}
            writer.replace(tokens, document.id, encoded.grid, meta, regions=encoded.regions)
    except StoreError:
        raise
    except ValueError as error:
        return reason_of(error)
    return ""
