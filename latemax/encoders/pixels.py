"""Images of any kind to a model's pixel values, with Pillow; no torchvision, no processor class of any library "
"version."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .adapters.base import Adapter, Grid, pair
from .images import load_image

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# Pillow's numbers, which transformers' configurations use as well.
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5, "random": 3}
# 100 megapixels: what a 1x10000 image would grow to before its crop is refused rather than allocated.
MAX_PIXELS = 100_000_000


@dataclass(frozen=True)
class Preprocess:
    """How a model wants its images.

    Args:
        size: (height, width) of the pixel values.
        mean, std: per channel, for values in [0, 1].
        shortest_edge: resize the shorter side to this, then crop the centre to `size`; None squashes to `resize_to`.
        resize_to: (height, width) to squash to before the centre crop; None is `size` itself.
        resample: Pillow's filter number (2 bilinear, 3 bicubic).
        rescale: multiplies the 0..255 values.
        round_crop: an odd margin around the centre crop is rounded (torchvision, timm, open_clip) instead of cut down
            (transformers).
        patch_size, max_patches: set for NaFlex models: the image keeps its aspect ratio, is cut into at most
            `max_patches` patches and padded.
    """

    size: Grid
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shortest_edge: int | None = None
    resize_to: Grid | None = None
    resample: int = 3
    rescale: float = 1 / 255
    round_crop: bool = False
    patch_size: Grid | None = None
    max_patches: int | None = None

    def __post_init__(self):
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3:
                raise ValueError(f"{name} must be three numbers, got {values}")
        if 0 in self.std:
            raise ValueError(f"std must not hold a 0, got {self.std}")

    def __call__(self, images, *, size: int | Grid | None = None) -> Tensor | Mapping[str, Tensor]:
        """float32 [b, 3, height, width]; or the NaFlex mapping (pixel_values [b, n, patch*patch*3],
        pixel_attention_mask [b, n], spatial_shapes [b, 2]). `size` as in `PatchEncoder.preprocess`."""
        images = as_list(images)
        if not images:
            raise ValueError("images must hold at least one image, got an empty list")
        rule = self if size is None else self._resized(size)
        loaded = (load_image(image, f"images[{i}]") for i, image in enumerate(images))
        if rule.max_patches is not None:
            return _pad_patches([rule._patches(image) for image in loaded], rule.max_patches)
        return torch.stack([rule._normalise(rule._fit(image)) for image in loaded])

    def _resized(self, size) -> Preprocess:
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            if self.max_patches is not None:
                raise ValueError(f"size must be (height, width) or None for a model of free aspect ratio, got {size}")
            scale = size / min(self.size)
            edge = None if self.shortest_edge is None else round(self.shortest_edge * scale)
            squash = None if self.resize_to is None else tuple(round(s * scale) for s in self.resize_to)
            return replace(self, size=(size, size), shortest_edge=edge, resize_to=squash)
        if not isinstance(size, (tuple, list)) or len(size) != 2 or not all(isinstance(s, int) and s > 0 for s in size):
            raise ValueError(f"size must be None, an int > 0 or (height, width), got {size!r}")
        if self.max_patches is not None:
            if any(s % p for s, p in zip(size, self.patch_size, strict=True)):
                raise ValueError(f"size must be a multiple of the patch {self.patch_size}, got {tuple(size)}")
            n = math.prod(s // p for s, p in zip(size, self.patch_size, strict=True))
            return replace(self, size=tuple(size), resize_to=tuple(size), max_patches=n)
        return replace(self, size=tuple(size), shortest_edge=None, resize_to=None)

    def _fit(self, image):
        """A Pillow RGB image resized and cropped to `size`."""
        if self.shortest_edge is None:
            height, width = self.resize_to or self.size
        else:
            short, long = sorted(image.size)
            other = int(self.shortest_edge * long / short)
            width, height = (self.shortest_edge, other) if image.width <= image.height else (other, self.shortest_edge)
        if height * width > MAX_PIXELS:
            raise ValueError(
                f"images: a {image.width}x{image.height} image would be resized to {width}x{height} before its centre "
                f"crop; pass size=(height, width) to squash it, or crop it first"
            )
        if (width, height) != image.size:
            image = image.resize((width, height), self.resample)
        if (height, width) == self.size:
            return image
        margins = (height - self.size[0], width - self.size[1])
        top, left = (round(m / 2) if self.round_crop else m // 2 for m in margins)
        # Where the crop is larger than the image, Pillow fills with black, as the processors do.
        return image.crop((left, top, left + self.size[1], top + self.size[0]))

    def _normalise(self, image) -> Tensor:
        values = np.asarray(image, dtype=np.float32) * np.float32(self.rescale)
        values = (values - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))

    def _patches(self, image) -> tuple[Tensor, Grid]:
        """([rows*cols, patch*patch*3], (rows, cols)) of one image, its aspect ratio kept."""
        (ph, pw), size = self.patch_size, self.resize_to
        if size is None:
            size = fit_patches((image.height, image.width), self.patch_size, self.max_patches)
        if (size[1], size[0]) != image.size:
            image = image.resize((size[1], size[0]), self.resample)
        rows, cols = size[0] // ph, size[1] // pw
        pixels = self._normalise(image).reshape(3, rows, ph, cols, pw)
        return pixels.permute(1, 3, 2, 4, 0).reshape(rows * cols, -1), (rows, cols)


def fit_patches(size: Grid, patch_size: Grid, max_patches: int) -> Grid:
    """The largest (height, width), whole patches and near the image's aspect ratio, of at most `max_patches` patches.

    SigLIP 2's rule: both sides are scaled by one factor, found by bisection to 1e-5, and rounded up to whole patches.
    """

    def scaled(factor):
        return tuple(max(p, math.ceil(s * factor / p) * p) for s, p in zip(size, patch_size, strict=True))

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        height, width = scaled(middle)
        if (height // patch_size[0]) * (width // patch_size[1]) <= max_patches:
            low = middle
        else:
            high = middle
    return scaled(low)


def _pad_patches(items: list[tuple[Tensor, Grid]], length: int) -> dict[str, Tensor]:
    values = torch.zeros(len(items), length, items[0][0].shape[-1])
    mask = torch.zeros(len(items), length, dtype=torch.int64)
    for i, (patches, _) in enumerate(items):
        values[i, : len(patches)] = patches
        mask[i, : len(patches)] = 1
    shapes = torch.tensor([grid for _, grid in items])
    return {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def as_list(images) -> list:
    """One image or any iterable of images as a list; a batched tensor or array is split along its first dimension."""
    if isinstance(images, (Tensor, np.ndarray)):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, (str, os.PathLike)) or not isinstance(images, Iterable):
        return [images]
    return list(images)


def from_processor_config(config: Mapping) -> Preprocess:
    """The `Preprocess` that a transformers `preprocessor_config.json` describes."""
    mean, std = tuple(config.get("image_mean", HALF[0])), tuple(config.get("image_std", HALF[1]))
    if not config.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    rescale = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    resample = config.get("resample")
    # A file without the entry means its processor's own default: bilinear for ViT's, bicubic for the others.
    if resample is None:
        resample = 2 if str(config.get("image_processor_type", "")).startswith("ViT") else 3
    common = {"mean": mean, "std": std, "rescale": rescale, "resample": int(resample)}
    if "max_num_patches" in config:
        patch = pair(config["patch_size"])
        return Preprocess(patch, patch_size=patch, max_patches=config["max_num_patches"], **common)
    resize = _config_size(config.get("size", 224))
    crop = _config_size(config.get("crop_size", resize)) if config.get("do_center_crop") else None
    if isinstance(resize, int):
        # Old configurations write a bare number: the shorter side where a crop follows, a square where none does.
        return Preprocess(pair(crop or resize), shortest_edge=resize if crop else None, **common)
    return Preprocess(pair(crop or resize), resize_to=resize if crop else None, **common)


def _config_size(value) -> int | Grid:
    if isinstance(value, Mapping):
        return int(value["shortest_edge"]) if "shortest_edge" in value else (int(value["height"]), int(value["width"]))
    return int(value) if isinstance(value, (int, float)) else pair(value)


def preprocess_of(adapter: Adapter) -> Preprocess:
    """The preprocessing a bare model tells of itself; ValueError where it tells nothing."""
    tower = adapter.tower
    found = None
    visual = getattr(adapter, "visual", None)
    if visual is not None and hasattr(visual, "image_size"):
        found = _from_open_clip(visual)
    elif getattr(tower, "pretrained_cfg", None):
        found = _from_timm(tower)
    elif hasattr(tower, "conv_proj"):
        # The transforms of torchvision's ViT weights: 256 to 224, bilinear.
        size = pair(tower.image_size)
        found = Preprocess(size, *IMAGENET, shortest_edge=round(min(size) * 256 / 224), resample=2, round_crop=True)
    elif hasattr(tower, "config"):
        found = _from_model_type(tower.config, getattr(adapter, "is_naflex", False))
    if found is None:
        raise ValueError(
            f"preprocess: a {adapter.family} does not tell its image size, mean and std; build the encoder with "
            "PatchEncoder(model, preprocess=Preprocess(size=(224, 224), mean=..., std=...)) or from_pretrained(...)"
        )
    return found


def from_torchvision_transforms(transforms) -> Preprocess:
    """The `Preprocess` of torchvision's `weights.transforms()`."""
    return Preprocess(
        pair(transforms.crop_size * 2 if len(transforms.crop_size) == 1 else transforms.crop_size),
        tuple(transforms.mean),
        tuple(transforms.std),
        shortest_edge=transforms.resize_size[0],
        resample=RESAMPLE[transforms.interpolation.value],
        round_crop=True,
    )


def _from_timm(model) -> Preprocess:
    cfg = model.pretrained_cfg
    embeds = getattr(model, "patch_embed", None)
    size = getattr(embeds, "img_size", None) or tuple(cfg["input_size"])[-2:]
    pct = cfg.get("crop_pct") or 0.875
    common = {
        "round_crop": True,
        "mean": tuple(cfg["mean"]),
        "std": tuple(cfg["std"]),
        "resample": RESAMPLE[cfg.get("interpolation", "bicubic")],
    }
    if cfg.get("crop_mode", "center") == "squash":
        squash = tuple(math.floor(s / pct) for s in size)
        return Preprocess(tuple(size), resize_to=squash, **common)
    return Preprocess(tuple(size), shortest_edge=math.floor(min(size) / pct), **common)


def _from_open_clip(visual) -> Preprocess:
    cfg = getattr(visual, "preprocess_cfg", None) or {}
    size = pair(cfg.get("size", visual.image_size))
    mean = tuple(cfg.get("mean") or getattr(visual, "image_mean", None) or OPENAI[0])
    std = tuple(cfg.get("std") or getattr(visual, "image_std", None) or OPENAI[1])
    squash = cfg.get("resize_mode", "shortest") == "squash"
    resample = RESAMPLE[cfg.get("interpolation", "bicubic")]
    edge = None if squash else min(size)
    return Preprocess(size, mean, std, shortest_edge=edge, resample=resample, round_crop=True)


def _from_model_type(config, is_naflex: bool) -> Preprocess | None:
    """The default processor of a transformers family, for a model built without its preprocessor_config.json."""
    kind = config.model_type.removesuffix("_vision_model")
    if kind == "siglip2" and is_naflex:
        patch = pair(config.patch_size)
        return Preprocess(patch, *HALF, patch_size=patch, max_patches=config.num_patches, resample=2)
    # (mean and std, shorter side over crop or None to squash, Pillow filter)
    rules = {
        "vit": (HALF, None, 2),
        "deit": (IMAGENET, 256 / 224, 3),
        "beit": (HALF, None, 2),
        "clip": (OPENAI, 1.0, 3),
        "siglip": (HALF, None, 3),
        "dinov2": (IMAGENET, 256 / 224, 3),
        "dinov2_with_registers": (IMAGENET, 256 / 224, 3),
        "dinov3_vit": (IMAGENET, None, 2),
    }
    if kind not in rules:
        return None
    (mean, std), ratio, resample = rules[kind]
    # DINOv2 keeps position embeddings for 518 pixels but is fed 224 by its own processor.
    size = (
        (224, 224) if kind.startswith("dinov2") and pair(config.image_size) == (518, 518) else pair(config.image_size)
    )
    edge = None if ratio is None else round(min(size) * ratio)
    return Preprocess(size, mean, std, shortest_edge=edge, resample=resample)
