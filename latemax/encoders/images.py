"""One image of any kind to a Pillow RGB image, or an error that names it."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor


def load_image(image, name: str = "image"):
    """A Pillow image in mode RGB, turned upright by its EXIF orientation.

    Grey becomes three equal channels; alpha is laid over white; 16-bit grey is scaled to 8 bits; the first frame of an
    animation is taken.

    Args:
        image: Pillow image; path; array [h, w] or [h, w, 1|3|4]; tensor [h, w] or [1|3|4, h, w]. Arrays and tensors
            hold uint8, uint16, bool, or floats in [0, 1].
        name: how errors call it; a path is named as well.

    Raises:
        ImportError: Pillow is missing.
        TypeError: not an image.
        ValueError: unreadable, truncated, empty, or values out of range.
        FileNotFoundError: no such file.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('reading images needs Pillow: pip install "latemax[encoders]"') from error
    if isinstance(image, (str, os.PathLike)):
        return _open(Image, image, name)
    if isinstance(image, Tensor):
        image = _channels_last(image, name)
    if isinstance(image, np.ndarray):
        return _to_rgb(Image, _from_array(Image, image, name), name)
    if isinstance(image, Image.Image):
        return _decode(Image, image, name)
    raise TypeError(f"{name} must be a Pillow image, a path, an array or a tensor, got {type(image).__name__}")


def _open(Image, path, name: str):
    name = f"{name} ({os.fspath(path)})"
    if not os.path.exists(path):
        raise FileNotFoundError(f"{name}: no such file")
    try:
        with Image.open(path) as file:
            return _decode(Image, file, name)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: not a readable image: {error}") from error


def _decode(Image, image, name: str):
    from PIL import ImageOps

    if 0 in image.size:
        raise ValueError(f"{name}: an image needs at least one pixel, got {image.width}x{image.height}")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    # Pillow reports damaged files as OSError, SyntaxError (PNG) or, from some decoders, as an IndexError or a
    # struct.error.
    except Exception as error:
        raise ValueError(f"{name}: corrupt or truncated image: {error}") from error
    return _to_rgb(Image, image, name)


def _to_rgb(Image, image, name: str):
    mode = image.mode
    if mode == "RGB":
        return image
    if mode.startswith("I") or mode == "F":
        return _from_high_range(Image, np.asarray(image), name).convert("RGB")
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_high_range(Image, values: np.ndarray, name: str):
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        raise ValueError(
            f"{name}: a float image has no fixed range (here {low:g} to {high:g}); scale it to uint8 first"
        )
    if low < 0 or high > 65535:
        raise ValueError(f"{name}: 16-bit values must lie in 0..65535, got {low} to {high}")
    # 65535 / 257 = 255 exactly.
    return Image.fromarray((values.astype(np.float64) / 257).round().astype(np.uint8))


def _channels_last(image: Tensor, name: str) -> np.ndarray:
    if image.ndim == 3 and image.shape[0] not in (1, 3, 4):
        raise ValueError(f"{name}: a tensor must be [channels, h, w] with 1, 3 or 4 channels, got {tuple(image.shape)}")
    if image.ndim == 3:
        image = image.permute(1, 2, 0)
    if image.dtype == torch.bfloat16:
        image = image.float()
    return image.detach().cpu().numpy()


def _from_array(Image, values: np.ndarray, name: str):
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        raise ValueError(
            f"{name}: an array must be [h, w] or [h, w, channels] with 1, 3 or 4 channels, got {tuple(values.shape)}"
        )
    if 0 in values.shape:
        raise ValueError(f"{name}: an image needs at least one pixel, got {tuple(values.shape)}")
    if values.dtype == np.uint16:
        values = (values.astype(np.float64) / 257).round().astype(np.uint8)
    elif values.dtype.kind == "f":
        low, high = values.min(), values.max()
        # Written so that NaN fails it too.
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"{name}: float values must lie in [0, 1], got {low:g} to {high:g}; if they are normalised already, "
                f"call the encoder on them directly"
            )
        values = (values.astype(np.float64) * 255).round().astype(np.uint8)
    elif values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    elif values.dtype != np.uint8:
        raise TypeError(f"{name}: values must be uint8, uint16, bool or floats in [0, 1], got {values.dtype}")
    return Image.fromarray(np.ascontiguousarray(values))
