"""Images to tokens in batches: `PatchEncoder.encode`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from .adapters.base import parameter_like
from .preprocess import as_list
from .tokens import PatchTokens


def encode_images(encoder, images, batch_size, dtype, progress, return_prefix, size, output_device):
    """See `PatchEncoder.encode`."""
    images = as_list(images)
    if not images:
        raise ValueError("images must hold at least one image, got none")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an int >= 1, got {batch_size!r}")
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be None, torch.float32, torch.float16 or torch.bfloat16, got {dtype}")
    like = parameter_like(encoder.adapter.tower)
    device = like.device if like is not None else torch.device("cpu")
    # Autocast covers the half precisions; otherwise the pixels take the model's own dtype.
    mixed = dtype in (torch.float16, torch.bfloat16)
    pixel_dtype = like.dtype if like is not None and not mixed else torch.float32
    gathered, grids, training = None, [], encoder.training
    encoder.eval()
    try:
        for start in _steps(len(images), batch_size, progress):
            pixels = encoder.preprocess(images[start : start + batch_size], size=size)
            with torch.autocast(device.type, dtype, enabled=mixed):
                out = encoder(_to(pixels, device, pixel_dtype), return_prefix=return_prefix)
            parts = [t if t is None or dtype is None else t.to(dtype) for t in (out.tokens, out.prefix)]
            parts = [parts[0], out.mask, parts[1]]
            gathered = _gather(gathered, parts, start, len(images), output_device or device)
            grids += out.grid if isinstance(out.grid, list) else [out.grid] * len(out.tokens)
    finally:
        encoder.train(training)
    tokens, mask, prefix = gathered
    padded = isinstance(out.grid, list)
    if padded and (longest := max(rows * cols for rows, cols in grids)) < tokens.shape[1]:
        tokens, mask = tokens[:, :longest], mask[:, :longest]
    return PatchTokens(tokens, mask, grids if padded else grids[0], prefix)


def _steps(total: int, batch_size: int, progress: bool):
    starts = range(0, total, batch_size)
    if not progress:
        yield from starts
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError('progress=True needs tqdm: pip install "latemax[encoders]"') from error
    with tqdm(total=total, unit="image", desc="encoding") as bar:
        for start in starts:
            yield start
            bar.update(min(batch_size, total - start))


def _to(pixels, device, dtype):
    if isinstance(pixels, Mapping):
        return {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in pixels.items()}
    return pixels.to(device, dtype)


def _gather(gathered, parts: list[Tensor | None], start: int, total: int, device):
    """Writes a batch into tensors sized for all images, so that no second copy of the corpus exists at the end."""
    if gathered is None:
        gathered = [None if p is None else p.new_zeros(total, *p.shape[1:], device=device) for p in parts]
    for i, part in enumerate(parts):
        if part is None:
            continue
        if i < 2 and part.shape[1] > gathered[i].shape[1]:
            grow = (0, 0) * (part.ndim - 2) + (0, part.shape[1] - gathered[i].shape[1])
            gathered[i] = F.pad(gathered[i], grow)
        gathered[i][start : start + len(part), : part.shape[1]] = part
    return gathered
