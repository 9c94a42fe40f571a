"""One image of any kind to a Pillow RGB image, or an error that names it."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

ORIENTATION = 0x0112
# Where a file keeps its orientation; dropped after turning, so that nobody turns the image again.
ORIENTATION_INFO = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


def load_image(image: Any, name: str = "image") -> Image:
    """A Pillow image in mode RGB, turned upright by its EXIF orientation.

    Grey becomes three equal channels; transparency (alpha or a colour key) is laid over white; 16-bit grey is scaled to
    8 bits; the first frame of an animation is taken. Metadata that cannot be read is ignored with a warning.

    Args:
        image: Pillow image; path; array ``[h, w]`` or ``[h, w, 1|3|4]``; tensor ``[h, w]`` or ``[1|3|4, h, w]``. Arrays
            and tensors hold uint8, uint16, bool, or floats in [0, 1].
        name: What errors call it; a path is named as well.

    Raises:
        ImportError: Pillow is missing.
        TypeError: Not an image.
        ValueError: Unreadable, truncated, empty, or values out of range or of an ambiguous range.
        FileNotFoundError: No such file.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('reading images needs Pillow: pip install "latemax[encoders]"') from error
    if isinstance(image, (str, os.PathLike)):
        return _open(image, name)
    if isinstance(image, Tensor):
        image = _channels_last(image, name)
    if isinstance(image, np.ndarray):
        return _to_rgb(_from_array(image, name), name)
    if isinstance(image, Image.Image):
        return _decode(image, name)
    raise TypeError(f"{name} must be a Pillow image, a path, an array or a tensor, got {type(image).__name__}")


def _open(path: str | os.PathLike[str], name: str) -> Image:
    from PIL import Image

    name = f"{name} ({os.fspath(path)})"
    if not os.path.exists(path):
        raise FileNotFoundError(f"{name}: no such file")
    try:
        with Image.open(path) as file:
            return _decode(file, name)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: not a readable image: {error}") from error


def _decode(image: Image, name: str) -> Image:
    if 0 in image.size:
        raise ValueError(f"{name}: an image needs at least one pixel, got {image.width}x{image.height}")
    # Before the load, which forgets how the pixels were stored.
    stored = str(getattr(image, "tile", ""))
    try:
        image.load()
    # Pillow reports damaged files as OSError, SyntaxError (PNG) or, from some decoders, as an IndexError or a
    # struct.error.
    except Exception as error:
        raise ValueError(f"{name}: corrupt or truncated image: {error}") from error
    key = image.info.get("transparency")
    if isinstance(key, tuple) and "RGB;16" in stored:
        # Pillow keeps the high byte of each channel, but the whole key.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    return _to_rgb(_upright(image, name), name)


def _upright(image: Image, name: str) -> Image:
    """``image`` turned by its EXIF or XMP orientation.

    Pillow's ``exif_transpose`` writes the whole block back, which fails on one bad tag; only the orientation is read
    here.
    """
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(ORIENTATION)
    # A damaged block raises nearly anything: SyntaxError, struct.error, ValueError, KeyError.
    except Exception as error:
        warnings.warn(f"{name}: unreadable EXIF data, so the image is not turned: {error}", stacklevel=2)
        return image
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(orientation) if isinstance(orientation, int) else None
    if turn is None:
        return image
    image = image.transpose(turn)
    for key in ORIENTATION_INFO:
        image.info.pop(key, None)
    return image


def _to_rgb(image: Image, name: str) -> Image:
    from PIL import Image

    mode = image.mode
    # A colour key: the pixels of this value are transparent.
    key = image.info.get("transparency")
    if mode.startswith("I") or mode == "F":
        return _from_high_range(image, key, name)
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or key is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")


def _from_high_range(image: Image, key: Any, name: str) -> Image:
    from PIL import Image

    values = np.asarray(image)
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        raise ValueError(
            f"{name}: a float image has no fixed range (here {low:g} to {high:g}); scale it to uint8 first"
        )
    if low < 0 or high > 65535:
        raise ValueError(f"{name}: 16-bit values must be in 0..65535, got {low} to {high}")
    if image.mode == "I" and 0 < high <= 255:
        raise ValueError(
            f"{name}: 32-bit grey of {low} to {high} may be 8-bit or dark 16-bit values; convert it first: to uint8, "
            f"or to uint16"
        )
    # 65535 / 257 = 255 exactly.
    grey = (values.astype(np.float64) / 257).round().astype(np.uint8)
    if isinstance(key, int):
        grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")


def _channels_last(image: Tensor, name: str) -> np.ndarray:
    if image.ndim == 3 and image.shape[0] not in (1, 3, 4):
        raise ValueError(f"{name}: a tensor must be [channels, h, w] with 1, 3 or 4 channels, got {tuple(image.shape)}")
    if image.ndim == 3:
        image = image.permute(1, 2, 0)
    if image.dtype == torch.bfloat16:
        image = image.float()
    return image.detach().cpu().numpy()


def _from_array(values: np.ndarray, name: str) -> Image:
    from PIL import Image

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
                f"{name}: float values must be in [0, 1], got {low:g} to {high:g}; if they are normalised already, "
                f"call the encoder on them directly"
            )
        values = (values.astype(np.float64) * 255).round().astype(np.uint8)
    elif values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    elif values.dtype != np.uint8:
        raise TypeError(f"{name}: values must be uint8, uint16, bool or floats in [0, 1], got {values.dtype}")
    return Image.fromarray(np.ascontiguousarray(values))
