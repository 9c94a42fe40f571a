"""Images of any kind to a model's pixel values, with Pillow only: the resize, crop and scale rule of a model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .adapters.base import Grid
from .images import load_image

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = Tensor | dict[str, Tensor]
Size = int | Sequence[int] | None
# Fractions of the image: left, top, right, bottom.
Box = tuple[float, float, float, float]
# 100 megapixels: what a 1x10000 image would grow to before its crop is refused rather than allocated.
MAX_PIXELS = 100_000_000


class ImageTransform:
    """Images to pixel values; made by a rule of ours (``Preprocess``) or by a library's processor.

    Attributes:
        rule: The ``Preprocess`` that gives the same pixels up to the resize filter; None where there is none.
    """

    rule: Preprocess | None

    def __call__(self, images: Any, *, size: Size = None) -> Pixels:
        """Loads and transforms one image or a list of them; see ``PatchEncoder.preprocess``."""
        images = as_list(images)
        if not images:
            raise ValueError("images must hold at least one image, got an empty list")
        return self.pixels([load_image(image, f"images[{i}]") for i, image in enumerate(images)], size)

    def pixels(self, images: list[Image], size: Size = None) -> Pixels:
        """Pixel values of RGB images, as ``load_image`` returns them."""
        raise NotImplementedError

    def crop_box(self, image: Image, size: Size = None) -> Box | None:
        """The part of ``image`` that its pixel values show; None where it is unknown."""
        raise NotImplementedError


@dataclass(frozen=True)
class Preprocess(ImageTransform):
    """How a model wants its images.

    Args:
        size: ``(height, width)`` of the pixel values; None takes the image as the resize leaves it.
        mean: Per channel, for values in [0, 1]; one number serves all three.
        std: Likewise.
        shortest_edge: Resizes the shorter side to this, then crops the center to ``size``; None squashes to
            ``resize_to``.
        longest_edge: With ``shortest_edge``, the longer side grows no larger than this; without, it becomes this.
        resize_to: ``(height, width)`` to squash to before the center crop; None is ``size`` itself.
        resize: False only crops.
        resample: Pillow's filter number (2 bilinear, 3 bicubic).
        rescale: Multiplies the 0..255 values.
        round_crop: An odd margin around the center crop is rounded (torchvision, timm, open_clip) instead of cut down
            (transformers).
        patch_size: Set for NaFlex models: the image keeps its aspect ratio, is cut into at most ``max_patches`` patches
            and padded.
        max_patches: See ``patch_size``.

    Raises:
        ValueError: Not three numbers in ``mean`` or ``std``, a 0 in ``std``, or nothing that fixes the size.

    Example:
        >>> rule = Preprocess((224, 224), mean=0.5, std=0.5)
        >>> rule(["a.jpg", "b.png"]).shape
        torch.Size([2, 3, 224, 224])
    """

    size: Grid | None
    mean: Sequence[float] | float
    std: Sequence[float] | float
    shortest_edge: int | None = None
    resize_to: Grid | None = None
    resample: int = 3
    rescale: float = 1 / 255
    round_crop: bool = False
    patch_size: Grid | None = None
    max_patches: int | None = None
    longest_edge: int | None = None
    resize: bool = True

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = _three(getattr(self, name))
            if len(values) != 3:
                raise ValueError(f"{name} must be three numbers or one, got {values}")
            object.__setattr__(self, name, values)
        if 0 in _three(self.std):
            raise ValueError(f"std must not hold a 0, got {self.std}")
        if self.resize and not any((self.size, self.shortest_edge, self.longest_edge, self.resize_to)):
            raise ValueError("size must be (height, width) where neither an edge, resize_to nor resize=False is given")

    @property
    def rule(self) -> Preprocess:  # type: ignore[override]
        """Itself."""
        return self

    def pixels(self, images: list[Image], size: Size = None) -> Pixels:
        """Float32 ``[b, 3, height, width]``.

        Of NaFlex models the mapping ``pixel_values [b, n, patch*patch*3]``, ``pixel_attention_mask [b, n]``,
        ``spatial_shapes [b, 2]``.
        """
        rule = self._resized(size)
        if rule.max_patches is not None:
            return _pad_patches([rule._patches(image) for image in images], rule.max_patches)
        return stack([rule._normalise(rule._fit(image)) for image in images])

    def crop_box(self, image: Image, size: Size = None) -> Box:
        rule = self._resized(size)
        if rule.max_patches is not None:
            return 0.0, 0.0, 1.0, 1.0
        height, width = rule._resized_size(image)
        left, top, right, bottom = rule._crop(height, width)
        return left / width, top / height, right / width, bottom / height

    def _resized(self, size: Size) -> Preprocess:
        if size is None:
            return self
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            if self.size is None or self.max_patches is not None:
                raise ValueError(f"size must be (height, width) or None for a model of free aspect ratio, got {size}")
            scale = size / min(self.size)
            shortest, longest = (
                None if edge is None else round(edge * scale) for edge in (self.shortest_edge, self.longest_edge)
            )
            squash = None if self.resize_to is None else _scaled(self.resize_to, scale)
            return replace(self, size=(size, size), resize_to=squash, shortest_edge=shortest, longest_edge=longest)
        if not isinstance(size, (tuple, list)) or len(size) != 2 or not all(isinstance(s, int) and s > 0 for s in size):
            raise ValueError(f"size must be None, an int > 0 or (height, width), got {size!r}")
        height, width = size
        whole: dict[str, Any] = {"size": (height, width), "shortest_edge": None, "longest_edge": None, "resize": True}
        if self.max_patches is not None and self.patch_size is not None:
            if height % self.patch_size[0] or width % self.patch_size[1]:
                raise ValueError(f"size must be a multiple of the patch {self.patch_size}, got {tuple(size)}")
            n = (height // self.patch_size[0]) * (width // self.patch_size[1])
            return replace(self, **whole, resize_to=(height, width), max_patches=n)
        return replace(self, **whole, resize_to=None)

    def _resized_size(self, image: Image) -> Grid:
        """``(height, width)`` of ``image`` after the resize, before the crop."""
        if not self.resize:
            return image.height, image.width
        short, long = sorted(image.size)
        least, most = self.shortest_edge, self.longest_edge
        if least is not None and (most is None or long / short * least <= most):
            scaled = least, int(least * long / short)
        elif least is not None and most is not None:
            exact = most * short / long
            scaled = round(exact), int(exact * long / short)
        elif most is not None:
            scaled = max(1, int(most * short / long)), most
        else:
            size = self.resize_to or self.size
            assert size is not None  # __post_init__ refused the rest.
            return size
        return scaled if image.height <= image.width else (scaled[1], scaled[0])

    def _crop(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Center crop (left, top, right, bottom) of a resized image, in its pixels."""
        if self.size is None:
            return 0, 0, width, height
        top, left = (self._margin(a - b) for a, b in zip((height, width), self.size, strict=True))
        return left, top, left + self.size[1], top + self.size[0]

    def _margin(self, total: int) -> int:
        """The pixels before the crop; negative where the crop is larger than the image."""
        if not self.round_crop:
            return total // 2
        return round(total / 2) if total >= 0 else -(-total // 2)

    def check_resize(self, image: Image) -> Grid:
        """``(height, width)`` of ``image`` after the resize, before the crop.

        Raises:
            ValueError: More pixels than ``MAX_PIXELS``, as of a very long image whose shorter side is enlarged.
        """
        if self.max_patches is not None:
            return self.resize_to or (image.height, image.width)
        height, width = self._resized_size(image)
        if height * width > MAX_PIXELS:
            raise ValueError(
                f"images: a {image.width}x{image.height} image would be resized to {width}x{height} before its center "
                f"crop; pass size=(height, width) to squash it, or crop it first"
            )
        return height, width

    def _fit(self, image: Image) -> Image:
        """``image`` resized and cropped to ``size``."""
        height, width = self.check_resize(image)
        if (width, height) != image.size:
            image = image.resize((width, height), self.resample)
        crop = self._crop(height, width)
        # Where the crop is larger than the image, Pillow fills with black, as the processors do.
        return image if crop == (0, 0, width, height) else image.crop(crop)

    def _normalise(self, image: Image) -> Tensor:
        values = np.asarray(image, dtype=np.float32) * np.float32(self.rescale)
        values = (values - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))

    def _patches(self, image: Image) -> tuple[Tensor, Grid]:
        """``([rows*cols, patch*patch*3], (rows, cols))`` of one image, its aspect ratio kept."""
        assert self.patch_size is not None and self.max_patches is not None
        (ph, pw), size = self.patch_size, self.resize_to
        if size is None:
            size = fit_patches((image.height, image.width), self.patch_size, self.max_patches)
        if (size[1], size[0]) != image.size:
            image = image.resize((size[1], size[0]), self.resample)
        rows, cols = size[0] // ph, size[1] // pw
        pixels = self._normalise(image).reshape(3, rows, ph, cols, pw)
        return pixels.permute(1, 3, 2, 4, 0).reshape(rows * cols, -1), (rows, cols)


def _three(values: Sequence[float] | float) -> tuple[float, ...]:
    return (float(values),) * 3 if isinstance(values, (int, float)) else tuple(values)


def stack(items: list[Tensor]) -> Tensor:
    """``[b, 3, height, width]`` of images of one size.

    Raises:
        ValueError: They differ, because the rule keeps the aspect ratio.
    """
    shapes = {tuple(item.shape[-2:]) for item in items}
    if len(shapes) > 1:
        sizes = ", ".join(f"{height}x{width}" for height, width in sorted(shapes)[:3])
        raise ValueError(
            f"images: the model's preprocessing keeps the aspect ratio, so one batch holds {sizes}; pass "
            f"size=(height, width), or encode them with batch_size=1"
        )
    return torch.stack(items)


def as_list(images: Any) -> list[Any]:
    """The images of one argument: a batch array or tensor is split, one image becomes a list of one."""
    if isinstance(images, (Tensor, np.ndarray)):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, (str, os.PathLike)) or not isinstance(images, Iterable):
        return [images]
    return list(images)


def fit_patches(size: Grid, patch_size: Grid, max_patches: int) -> Grid:
    """The largest ``(height, width)``, whole patches and near the image's aspect ratio, of at most ``max_patches``.

    SigLIP 2's rule: both sides are scaled by one factor, found by bisection to 1e-5, and rounded up to whole patches.
    """

    def scaled(factor: float) -> Grid:
        height, width = (max(p, math.ceil(s * factor / p) * p) for s, p in zip(size, patch_size, strict=True))
        return height, width

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        height, width = scaled(middle)
        if (height // patch_size[0]) * (width // patch_size[1]) <= max_patches:
            low = middle
        else:
            high = middle
    return scaled(low)


def _scaled(size: Grid, factor: float) -> Grid:
    return round(size[0] * factor), round(size[1] * factor)


def _pad_patches(items: list[tuple[Tensor, Grid]], length: int) -> dict[str, Tensor]:
    values = torch.zeros(len(items), length, items[0][0].shape[-1])
    mask = torch.zeros(len(items), length, dtype=torch.int64)
    for i, (patches, _) in enumerate(items):
        values[i, : len(patches)] = patches
        mask[i, : len(patches)] = 1
    shapes = torch.tensor([grid for _, grid in items])
    return {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": shapes}
