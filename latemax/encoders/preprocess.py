"""Where a model says how it wants its images: processor files, timm's, open_clip's and torchvision's settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from .adapters.base import Adapter, Grid, pair
from .pixels import Preprocess

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# Pillow's numbers, which transformers' configurations use as well.
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5, "random": 3}


class Defaults(NamedTuple):
    """What a processor class of transformers takes where its file says nothing."""

    size: Mapping[str, int]
    crop: int | None
    resample: int
    scale: tuple[tuple[float, ...], tuple[float, ...]]
    # What a bare number means in ``size``: a square, or the shorter side.
    square: bool = True


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


# The defaults of transformers 5.24, by the name of the class without ImageProcessor, FeatureExtractor, Fast and Pil.
DEFAULTS = {
    "ViT": Defaults(_square(224), None, 2, HALF),
    "DeiT": Defaults(_square(256), 224, 3, HALF),
    "Beit": Defaults(_square(224), None, 3, HALF),
    "CLIP": Defaults({"shortest_edge": 224}, 224, 3, OPENAI, square=False),
    "ChineseCLIP": Defaults({"shortest_edge": 224}, 224, 3, OPENAI, square=False),
    "Bit": Defaults({"shortest_edge": 224}, 224, 3, OPENAI, square=False),
    "Blip": Defaults(_square(384), None, 3, OPENAI),
    "Siglip": Defaults(_square(224), None, 3, HALF, square=False),
    "Siglip2": Defaults({}, None, 2, HALF),
    "DINOv3ViT": Defaults(_square(224), None, 2, IMAGENET),
}
# The class that transformers takes for a model_type where the file names none.
CLASSES = {
    "vit": "ViT",
    "ijepa": "ViT",
    "deit": "DeiT",
    "beit": "Beit",
    "data2vec-vision": "Beit",
    "clip": "CLIP",
    "clip_vision_model": "CLIP",
    "metaclip_2": "CLIP",
    "chinese_clip": "ChineseCLIP",
    "dinov2": "Bit",
    "dinov2_with_registers": "Bit",
    "dinov3_vit": "DINOv3ViT",
    "blip": "Blip",
    "siglip": "Siglip",
    "siglip_vision_model": "Siglip",
    "siglip2": "Siglip2",
    "siglip2_vision_model": "Siglip2",
}
ADVICE = "; pass preprocess=<the processor itself>, or Preprocess(size=(224, 224), mean=..., std=...)"
# Switches that change pixels in a way ``Preprocess`` does not follow.
UNKNOWN_RULES = ("do_pad", "do_flip_channel_order", "do_color_quantize", "do_image_splitting", "keep_aspect_ratio")


def from_processor_config(config: Mapping[str, Any], model_type: str | None = None) -> Preprocess:
    """The ``Preprocess`` that a transformers ``preprocessor_config.json`` describes.

    Args:
        config: The file's object.
        model_type: Of the model's ``config.json``: decides the defaults where the file names no processor class.

    Raises:
        ValueError: A processor class or a rule that is not followed here, by name.
    """
    known = _class_defaults(config, model_type)
    for name in UNKNOWN_RULES:
        if config.get(name):
            raise ValueError(f"preprocess: the rule {name} of a processor file is not followed here{ADVICE}")
    mean, std = (_or(config, "image_mean", known.scale[0]), _or(config, "image_std", known.scale[1]))
    if not _or(config, "do_normalize", True):
        mean, std = 0.0, 1.0
    rescale = _or(config, "rescale_factor", 1 / 255) if _or(config, "do_rescale", True) else 1.0
    common: dict[str, Any] = {"mean": mean, "std": std, "rescale": rescale}
    common["resample"] = int(_or(config, "resample", known.resample))
    if "max_num_patches" in config:
        patch = pair(_or(config, "patch_size", 16))
        return Preprocess(patch, patch_size=patch, max_patches=config["max_num_patches"], **common)
    crop = None
    if _or(config, "do_center_crop", known.crop is not None):
        crop = _crop_size(_or(config, "crop_size", known.crop or 224))
    if not _or(config, "do_resize", True):
        return Preprocess(crop, resize=False, **common)
    size = _size(_or(config, "size", known.size), known.square)
    if "height" in size:
        whole = (size["height"], size["width"])
        return Preprocess(crop or whole, resize_to=whole if crop else None, **common)
    return Preprocess(crop, shortest_edge=size.get("shortest_edge"), longest_edge=size.get("longest_edge"), **common)


def _class_defaults(config: Mapping[str, Any], model_type: str | None) -> Defaults:
    name = config.get("image_processor_type") or config.get("feature_extractor_type") or CLASSES.get(model_type or "")
    if name is None:
        # Neither says a class: a bare number is the shorter side where a crop follows, else a square.
        return Defaults(_square(224), None, 3, HALF, square=not config.get("do_center_crop"))
    short = str(name)
    for ending in ("Pil", "Fast", "ImageProcessor", "FeatureExtractor"):
        short = short.removesuffix(ending)
    if short not in DEFAULTS:
        raise ValueError(f"preprocess: the rules of {name} are not followed here{ADVICE}")
    return DEFAULTS[short]


def _or(config: Mapping[str, Any], name: str, default: Any) -> Any:
    """An entry of null means the default, as in transformers."""
    value = config.get(name)
    return default if value is None else value


def _crop_size(value: Any) -> Grid:
    if isinstance(value, Mapping):
        return (value["shortest_edge"],) * 2 if "shortest_edge" in value else (value["height"], value["width"])
    return pair(value)


def _size(value: Any, square: bool) -> Mapping[str, int]:
    if isinstance(value, Mapping):
        size = {key: int(edge) for key, edge in value.items() if edge is not None}
        if not ({"height", "width"} <= size.keys() or {"shortest_edge", "longest_edge"} & size.keys()):
            raise ValueError(f"preprocess: size {dict(value)} of a processor file is not followed here{ADVICE}")
        return size
    if isinstance(value, (int, float)):
        return _square(int(value)) if square else {"shortest_edge": int(value)}
    height, width = pair(value)
    return {"height": height, "width": width}


def rule_of(adapter: Adapter) -> Preprocess | None:
    """The rule of a bare model of torchvision or transformers by its family; None where it has none."""
    tower: Any = adapter.tower
    if hasattr(tower, "conv_proj"):
        # The transforms of torchvision's ViT weights: 256 to 224, bilinear.
        size = pair(tower.image_size)
        return Preprocess(size, *IMAGENET, shortest_edge=round(min(size) * 256 / 224), resample=2, round_crop=True)
    if hasattr(tower, "config"):
        return from_model_type(tower.config, getattr(adapter, "is_naflex", False))
    return None


def from_torchvision_transforms(transforms: Any) -> Preprocess:
    """The ``Preprocess`` of torchvision's ``weights.transforms()``."""
    return Preprocess(
        pair(transforms.crop_size * 2 if len(transforms.crop_size) == 1 else transforms.crop_size),
        tuple(transforms.mean),
        tuple(transforms.std),
        shortest_edge=transforms.resize_size[0],
        resample=RESAMPLE[transforms.interpolation.value],
        round_crop=True,
    )


def timm_size(model: Any, config: Mapping[str, Any]) -> Grid:
    """``(height, width)`` that a timm model takes: its own, which may differ from its pretrained configuration's."""
    embeds = getattr(model, "patch_embed", None)
    return pair(getattr(embeds, "img_size", None) or tuple(config["input_size"])[-2:])


def from_timm(model: Any, cfg: Mapping[str, Any]) -> Preprocess | None:
    """The ``Preprocess`` of a timm model's settings; None for its rules that crop other than the center of a square."""
    size = timm_size(model, cfg)
    pct = cfg.get("crop_pct") or 0.875
    common: dict[str, Any] = {
        "round_crop": True,
        "mean": tuple(cfg["mean"]),
        "std": tuple(cfg["std"]),
        "resample": RESAMPLE[cfg.get("interpolation", "bicubic")],
    }
    mode = cfg.get("crop_mode") or "center"
    if mode == "squash":
        return Preprocess(size, resize_to=(math.floor(size[0] / pct), math.floor(size[1] / pct)), **common)
    if mode != "center" or size[0] != size[1]:
        return None
    return Preprocess(size, shortest_edge=math.floor(size[0] / pct), **common)


def from_open_clip(visual: Any) -> Preprocess | None:
    """The ``Preprocess`` of an open_clip tower; None for its rules that pad, or keep the ratio of an oblong size."""
    cfg = getattr(visual, "preprocess_cfg", None) or {}
    size = pair(cfg.get("size", visual.image_size))
    mean = tuple(cfg.get("mean") or getattr(visual, "image_mean", None) or OPENAI[0])
    std = tuple(cfg.get("std") or getattr(visual, "image_std", None) or OPENAI[1])
    mode = cfg.get("resize_mode") or "shortest"
    if mode == "longest" or (mode == "shortest" and size[0] != size[1]):
        return None
    edge = None if mode == "squash" else size[0]
    resample = RESAMPLE[cfg.get("interpolation", "bicubic")]
    return Preprocess(size, mean, std, shortest_edge=edge, resample=resample, round_crop=True)


def from_model_type(config: Any, is_naflex: bool) -> Preprocess | None:
    """The default processor of a transformers family, for a model built without its preprocessor file."""
    kind = config.model_type.removesuffix("_vision_model")
    if kind == "siglip2" and is_naflex:
        patch = pair(config.patch_size)
        return Preprocess(patch, *HALF, patch_size=patch, max_patches=config.num_patches, resample=2)
    # (mean and std, side of the resize over the crop, whether that side is the shorter one, Pillow filter)
    rules = {
        "vit": (HALF, 1.0, False, 2),
        "deit": (HALF, 256 / 224, False, 3),
        "beit": (HALF, 1.0, False, 2),
        "clip": (OPENAI, 1.0, True, 3),
        "siglip": (HALF, 1.0, False, 3),
        "dinov2": (IMAGENET, 256 / 224, True, 3),
        "dinov2_with_registers": (IMAGENET, 256 / 224, True, 3),
        "dinov3_vit": (IMAGENET, 1.0, False, 2),
    }
    if kind not in rules:
        return None
    scale, ratio, keeps_ratio, resample = rules[kind]
    size = pair(config.image_size)
    # DINOv2 keeps position embeddings for 518 pixels but is fed 224 by its own processor.
    if kind.startswith("dinov2") and size == (518, 518):
        size = (224, 224)
    if keeps_ratio:
        return Preprocess(size, *scale, shortest_edge=round(min(size) * ratio), resample=resample)
    whole = (round(size[0] * ratio), round(size[1] * ratio))
    return Preprocess(size, *scale, resize_to=None if whole == size else whole, resample=resample)
