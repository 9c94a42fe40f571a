"""Images to tokens in batches: ``PatchEncoder.encode``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .adapters.base import Grid, parameter_like
from .images import load_image
from .modes import eval_mode
from .pixels import Box, Pixels, Size, as_list
from .tokens import PatchTokens

if TYPE_CHECKING:
    from .patch_encoder import PatchEncoder

Parts = tuple[Tensor | None, ...]


def encode_images(
    encoder: PatchEncoder,
    images: Any,
    *,
    batch_size: int,
    dtype: torch.dtype | None,
    progress: bool,
    return_prefix: bool,
    size: Size,
    output_device: torch.device | str | None,
) -> PatchTokens:
    """See ``PatchEncoder.encode``."""
    images = as_list(images)
    if not images:
        raise ValueError("images must hold at least one image, got none")
    check_batch(batch_size)
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be None, torch.float32, torch.float16 or torch.bfloat16, got {dtype}")
    like = parameter_like(encoder.adapter.tower)
    device = like.device if like is not None else torch.device("cpu")
    # Autocast covers the half precisions; otherwise the pixels take the model's own dtype.
    mixed = dtype in (torch.float16, torch.bfloat16)
    pixel_dtype = like.dtype if like is not None and not mixed else torch.float32
    transform = encoder.image_transform
    gathered: list[Tensor | None] = []
    grids: list[Grid] = []
    boxes: list[Box | None] = []
    padded = False
    with torch.no_grad(), _evaluating(encoder):
        for start in steps(len(images), batch_size, progress, "image"):
            chunk = images[start : start + batch_size]
            loaded = [load_image(image, f"images[{start + i}]") for i, image in enumerate(chunk)]
            boxes += [transform.crop_box(image, size) for image in loaded]
            pixels = _to(transform.pixels(loaded, size), device, pixel_dtype)
            with torch.autocast(device.type, dtype, enabled=mixed):
                out = encoder(pixels, return_prefix=return_prefix)
            tokens, prefix = (t if t is None or dtype is None else t.to(dtype) for t in (out.tokens, out.prefix))
            gathered = gather(gathered, (tokens, out.mask, prefix), start, len(images), output_device or device)
            padded = isinstance(out.grid, list)
            grids += out.grid if isinstance(out.grid, list) else [out.grid] * len(out.tokens)
    tokens, mask, prefix = gathered
    assert tokens is not None and mask is not None
    one_grid = not padded and len(set(grids)) == 1
    if not one_grid and (longest := max(rows * cols for rows, cols in grids)) < tokens.shape[1]:
        tokens, mask = tokens[:, :longest], mask[:, :longest]
    found = PatchTokens(tokens, mask, grids[0] if one_grid else grids, prefix)
    found.model_id, found.space = encoder.model_id, encoder.space
    if None not in boxes:
        found.crop = torch.tensor(boxes, dtype=torch.float32)
    return found


def warn_of_training(encoder: PatchEncoder, in_training: bool) -> bool:
    """Warns where a call of ``encode`` looks like a part of a training loop; returns whether it did.

    That is where gradients are enabled and the encoder is being trained: ``encoder.train()`` was called, or some of its
    parameters are frozen and others are not (LoRA, a projection). As it is loaded, an encoder is in neither state,
    though all of its parameters require gradients.
    """
    if not torch.is_grad_enabled():
        return False
    wanted = [parameter.requires_grad for parameter in encoder.parameters()]
    if not any(wanted) or (all(wanted) and not in_training):
        return False
    warnings.warn(
        "encode() computes no gradients: to train the encoder, call it on pixels, "
        "encoder(encoder.preprocess(images)); to encode with it, call encode() under torch.no_grad()",
        stacklevel=3,
    )
    return True


@contextmanager
def _evaluating(encoder: PatchEncoder) -> Iterator[None]:
    """Eval mode, seen by the adapter also where a compiled forward does not look at the model's attributes again."""
    try:
        with eval_mode(encoder):
            encoder.sync()
            yield
    finally:
        encoder.sync()


def check_batch(batch_size: int) -> None:
    """Raises ValueError where ``batch_size`` is no positive int."""
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size must be an int >= 1, got {batch_size!r}")


def steps(total: int, batch_size: int, progress: bool, unit: str) -> Iterator[int]:
    """The first index of every batch, with a tqdm bar on stderr where ``progress``."""
    starts = range(0, total, batch_size)
    if not progress:
        yield from starts
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError('progress=True needs tqdm: pip install "latemax[encoders]"') from error
    with tqdm(total=total, unit=unit, desc="encoding") as bar:
        for start in starts:
            yield start
            bar.update(min(batch_size, total - start))


def _to(pixels: Pixels, device: torch.device, dtype: torch.dtype) -> Pixels:
    if isinstance(pixels, dict):
        return {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in pixels.items()}
    return pixels.to(device, dtype)


def gather(
    gathered: list[Tensor | None], parts: Parts, start: int, total: int, device: torch.device | str
) -> list[Tensor | None]:
    """Writes a batch into tensors sized for all images, so that no second copy of the corpus exists at the end."""
    if not gathered:
        gathered = [None if p is None else p.new_zeros(total, *p.shape[1:], device=device) for p in parts]
    for i, part in enumerate(parts):
        whole = gathered[i]
        if part is None or whole is None:
            continue
        if part.shape[1] > whole.shape[1]:
            whole = F.pad(whole, (0, 0) * (part.ndim - 2) + (0, part.shape[1] - whole.shape[1]))
            gathered[i] = whole
        whole[start : start + len(part), : part.shape[1]] = part
    return gathered
