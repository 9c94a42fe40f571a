"""A model's own preprocessing: transformers' image processors, the transforms of timm, open_clip and torchvision.

They are used as their users call them, on the images that ``load_image`` made upright and RGB. ``Preprocess`` follows
the same rules in Pillow: for ``size=``, for crop boxes, and where a library is missing or does not import.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import hub
from .adapters.base import Adapter
from .pixels import Box, ImageTransform, Pixels, Preprocess, Size, stack
from .preprocess import from_open_clip, from_processor_config, from_timm, rule_of, timm_size

if TYPE_CHECKING:
    from PIL.Image import Image

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# What a NaFlex processor of transformers returns, and its model takes.
PADDED = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


@dataclass(frozen=True)
class OwnProcessor(ImageTransform):
    """A library's processor.

    Attributes:
        name: What it is called in errors and reprs.
        run: Maps RGB images to pixel values.
        rule: The same rule in our code; None where it has none.
    """

    name: str
    run: Callable[[list[Image]], Pixels]
    rule: Preprocess | None

    def pixels(self, images: list[Image], size: Size = None) -> Pixels:
        if size is None:
            if self.rule is not None:
                # the libraries would try: 5,040,000 x 56 pixels for 90,000 x 1
                for image in images:
                    self.rule.check_resize(image)
            return self.run(images)
        if self.rule is None:
            raise ValueError(
                f"size cannot be set: the rules of {self.name} are not followed here; pass "
                f"preprocess=Preprocess(size={size!r}, mean=..., std=...) to the encoder"
            )
        return self.rule.pixels(images, size)

    def crop_box(self, image: Image, size: Size = None) -> Box | None:
        return None if self.rule is None else self.rule.crop_box(image, size)


def as_transform(preprocess: Any) -> ImageTransform | None:
    """The argument ``preprocess=`` of an encoder as an ``ImageTransform``.

    Raises:
        TypeError: Neither a ``Preprocess``, a processor of transformers, nor a callable.
    """
    if preprocess is None or isinstance(preprocess, ImageTransform):
        return preprocess
    if hasattr(preprocess, "image_processor"):
        # transformers' processors of two modalities hold the one for images.
        preprocess = preprocess.image_processor
    if hasattr(preprocess, "model_input_names") and hasattr(preprocess, "to_dict"):
        return from_transformers(preprocess)
    if callable(preprocess):
        return per_image(preprocess, type(preprocess).__name__, None)
    raise TypeError(
        "preprocess must be a Preprocess, an image processor of transformers, or a callable from a Pillow image to a "
        f"tensor [3, height, width], got {type(preprocess).__name__}"
    )


def from_transformers(processor: Any) -> OwnProcessor:
    """An image processor of transformers."""
    run = functools.partial(_run_transformers, processor)
    return OwnProcessor(type(processor).__name__, run, _rule_or_none(processor.to_dict()))


def _run_transformers(processor: Any, images: list[Image]) -> Pixels:
    found = processor(images=images, return_tensors="pt")
    if set(found) == {"pixel_values"}:
        return found["pixel_values"]
    if set(found) == set(PADDED):
        return {key: found[key] for key in PADDED}
    raise ValueError(
        f"preprocess: {type(processor).__name__} returns {sorted(found)}, where a patch encoder takes pixel_values, or "
        f"{PADDED}; pass preprocess=Preprocess(size=(224, 224), mean=..., std=...)"
    )


def per_image(transform: Callable[[Image], Tensor], name: str, rule: Preprocess | None) -> OwnProcessor:
    """A transform of torchvision's kind: one Pillow image to ``[3, height, width]``."""
    return OwnProcessor(name, functools.partial(_run_each, transform, name), rule)


def _run_each(transform: Callable[[Image], Tensor], name: str, images: list[Image]) -> Tensor:
    return stack([_checked(transform(image), name) for image in images])


def _checked(pixels: Any, name: str) -> Tensor:
    if not isinstance(pixels, Tensor) or pixels.ndim != 3 or not torch.is_floating_point(pixels):
        got = f"{tuple(pixels.shape)} {pixels.dtype}" if isinstance(pixels, Tensor) else type(pixels).__name__
        raise ValueError(f"preprocess: {name} must return a float tensor [3, height, width], got {got}")
    return pixels


def _rule_or_none(config: Mapping[str, Any]) -> Preprocess | None:
    try:
        return from_processor_config(config)
    except ValueError:
        return None


def of_files(name: str) -> ImageTransform | None:
    """The preprocessing in the files of a model, in a folder or on the hub; None where there is no such file.

    Raises:
        ValueError: transformers cannot load its processor here, and our code does not follow its rules.
        OSError: The hub cannot be reached, and its files are not in the cache.
    """
    for file in PROCESSOR_FILES:
        path = hub.find(name, file)
        if path is None:
            continue
        config = hub.read_json(path)
        config = config.get("image_processor", config)
        if "image_mean" not in config and "image_processor_type" not in config:
            continue
        try:
            return from_transformers(_load(path))
        # It needs torchvision, or remote code, or a newer release; a broken torchvision raises nearly anything.
        except Exception as error:
            try:
                return from_processor_config(config, _model_type(name))
            except ValueError as rule:
                raise ValueError(f"{rule}; transformers could not load it either: {error}") from error
    return None


def _model_type(name: str) -> str | None:
    path = hub.find(name, "config.json")
    return None if path is None else hub.read_json(path).get("model_type")


def _load(path: Path) -> Any:
    from transformers import AutoImageProcessor
    from transformers.utils import is_torchvision_available

    # What transformers chooses by itself, but for the line on the terminal; releases before 5 ignore it.
    backend = {} if is_torchvision_available() else {"backend": "pil"}
    return AutoImageProcessor.from_pretrained(os.fspath(path.parent), trust_remote_code=False, **backend)


def of_model(model: Any, adapter: Adapter) -> ImageTransform:
    """The preprocessing that a bare model carries, names or implies by its family.

    Raises:
        ValueError: It says nothing.
        OSError: It names a model of the hub, which cannot be reached, and whose files are not in the cache.
    """
    tower: Any = adapter.tower
    visual: Any = getattr(adapter, "visual", None)
    found: ImageTransform | None
    if visual is not None and hasattr(visual, "image_size"):
        found = _open_clip(visual) or from_open_clip(visual)
    elif hasattr(tower, "num_prefix_tokens"):
        found = _timm(tower, _timm_config(model, tower))
    else:
        found = _named_files(adapter) or rule_of(adapter)
    if found is None:
        raise ValueError(
            f"preprocess: a {adapter.family} does not tell its image size, mean and std; build the encoder with "
            "PatchEncoder(model, preprocess=Preprocess(size=(224, 224), mean=..., std=...)) or from_pretrained(...)"
        )
    return found


def _named_files(adapter: Adapter) -> ImageTransform | None:
    """By the folder or hub name that a model of transformers was loaded from."""
    name = getattr(getattr(adapter, "model", None), "name_or_path", "")
    if not name:
        return None
    try:
        return of_files(name)
    except hub.UnknownModelError:
        # A folder that was relative to another one, or is gone.
        return None


def _timm_config(model: Any, tower: Any) -> dict[str, Any]:
    """timm's settings: those of transformers' TimmWrapper configuration (the file's) before the architecture's."""
    parts = model.modules() if isinstance(model, nn.Module) else ()
    configs = (getattr(vars(part).get("config"), "pretrained_cfg", None) for part in parts)
    return next(filter(None, configs), None) or getattr(tower, "pretrained_cfg", None) or {}


def _timm(model: Any, config: dict[str, Any]) -> ImageTransform | None:
    if not config:
        return None
    rule = from_timm(model, config)
    data = _imported("timm.data")
    if data is None:
        return rule
    settings = data.resolve_data_config({}, pretrained_cfg=config)
    # A model made for another size keeps the size of its pretrained weights in its configuration.
    settings["input_size"] = (3, *timm_size(model, config))
    return per_image(data.create_transform(**settings, is_training=False), "timm's transform", rule)


def _open_clip(visual: Any) -> OwnProcessor | None:
    transform = _imported("open_clip.transform")
    if transform is None:
        return None
    # A tower built by its class carries no settings; OpenAI's are the library's defaults.
    settings = transform.PreprocessCfg(**(getattr(visual, "preprocess_cfg", None) or {"size": visual.image_size}))
    built = transform.image_transform_v2(settings, is_train=False)
    return per_image(built, "open_clip's transform", from_open_clip(visual))


def _imported(name: str) -> Any:
    """The module, or None where it is missing or broken (a torchvision built for another torch)."""
    try:
        return importlib.import_module(name)
    except Exception:
        return None
