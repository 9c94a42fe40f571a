"""Names and folders to models: `PatchEncoder.from_pretrained`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import nn

from .preprocess import Preprocess, from_processor_config, from_torchvision_transforms
from .weights import dinov2_small

LOCAL_NAMES = {"dinov2-small": dinov2_small}
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def load(name_or_path: str | os.PathLike) -> tuple[nn.Module, Preprocess | None]:
    """(model, preprocessing or None where the model tells it itself); names as in `PatchEncoder.from_pretrained`."""
    name = os.fspath(name_or_path)
    library, _, rest = name.partition(":")
    if rest and library in LOADERS:
        loaded = LOADERS[library](rest)
        return loaded if isinstance(loaded, tuple) else (loaded, None)
    if name in LOCAL_NAMES and not os.path.exists(name):
        name = os.fspath(LOCAL_NAMES[name]())
    return _transformers(name)


def _transformers(name: str) -> tuple[nn.Module, Preprocess | None]:
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ImportError(f'loading {name} needs transformers: pip install "latemax[encoders]"') from error
    if _is_path(name) and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(
            f"name_or_path: {name} holds no config.json; it must be a folder in transformers format"
        )
    return AutoModel.from_pretrained(name), _processor(name)


def _is_path(name: str) -> bool:
    return os.path.exists(name) or os.path.isabs(name) or name.startswith((".", "~"))


def _processor(name: str) -> Preprocess | None:
    """The `Preprocess` beside the weights, in a folder or on the hub."""
    for file in PROCESSOR_FILES:
        path = _find(name, file)
        if path is not None:
            config = json.loads(Path(path).read_text(encoding="utf-8"))
            config = config.get("image_processor", config)
            if "image_mean" in config:
                return from_processor_config(config)
    return None


def _find(name: str, file: str) -> Path | None:
    if os.path.isdir(name):
        path = Path(name) / file
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError

    try:
        return Path(hf_hub_download(name, file))
    except EntryNotFoundError:
        return None


def _timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"loading timm:{name} needs timm: pip install timm") from error
    return timm.create_model(name, pretrained=True)


def _torchvision(name: str) -> tuple[nn.Module, Preprocess]:
    try:
        from torchvision.models import get_model, get_model_weights
    except ImportError as error:
        raise ImportError(f"loading torchvision:{name} needs torchvision: pip install torchvision") from error
    weights = get_model_weights(name).DEFAULT
    return get_model(name, weights=weights), from_torchvision_transforms(weights.transforms())


def _open_clip(name: str) -> nn.Module:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f"loading open_clip:{name} needs open_clip: pip install open_clip_torch") from error
    model, _, tag = name.partition("/")
    return open_clip.create_model(model, pretrained=tag or None)


LOADERS = {"timm": _timm, "torchvision": _torchvision, "open_clip": _open_clip}
