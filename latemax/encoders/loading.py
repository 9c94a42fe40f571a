"""Names and folders to models: ``PatchEncoder.from_pretrained``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from . import hub, processors
from .pixels import ImageTransform
from .preprocess import from_torchvision_transforms
from .quiet import quiet
from .weights import dinov2_small

# The distribution that has MultiVectorEncoder.
ST = "sentence-transformers"
M = TypeVar("M", bound=nn.Module)
Loaded = tuple[nn.Module, ImageTransform | None]
LOCAL_NAMES: dict[str, Callable[[], str | os.PathLike[str]]] = {"dinov2-small": dinov2_small}


def load(name_or_path: str | os.PathLike[str], with_processor: bool = True) -> Loaded:
    """``(model, preprocessing)``; names as in ``PatchEncoder.from_pretrained``.

    Args:
        name_or_path: Name or folder.
        with_processor: False spares looking for the model's preprocessing files.

    Returns:
        The preprocessing is None where the model carries it, or where it was not wanted.
    """
    name = os.fspath(name_or_path)
    library, _, rest = name.partition(":")
    if rest and library in LOADERS and not os.path.exists(name):
        return LOADERS[library](rest)
    if name in LOCAL_NAMES and not os.path.exists(name):
        name = os.fspath(LOCAL_NAMES[name]())
    return _transformers(name, with_processor)


def pretrained(
    cls: type[M], load: Callable[[Any], tuple[Any, Any]], name_or_path: str | os.PathLike[str], options: dict[str, Any]
) -> M:
    """``cls(model, processor, **options)`` of what ``load`` finds under a name, in eval mode."""
    with quiet(loads="transformers"):
        model, processor = load(name_or_path)
    return cls(model, processor, **{"model_id": hub.model_name(name_or_path), **options}).eval()


def load_text(name_or_path: str | os.PathLike[str]) -> tuple[nn.Module, Any]:
    """``(model, tokenizer)``; names as in ``TextEncoder.from_pretrained``."""
    name = os.fspath(name_or_path)
    library, _, rest = name.partition(":")
    if library == "open_clip" and rest and not os.path.exists(name):
        model, _ = _open_clip(rest)
        import open_clip

        return model, open_clip.get_tokenizer(rest.partition("/")[0])
    model, _ = _transformers(name, False, complete=True)
    from transformers import AutoTokenizer

    return model, AutoTokenizer.from_pretrained(os.path.expanduser(name))


def load_retriever(name_or_path: str | os.PathLike[str]) -> tuple[nn.Module, Any]:
    """``(model, processor)``; names as in ``Retriever.from_pretrained``."""
    name = os.fspath(name_or_path)
    if name.startswith("open_clip:") and not os.path.exists(name):
        return load_text(name)
    if hub.is_path(name):
        name = os.path.expanduser(name)
    if hub.find(name, "modules.json") is not None:
        try:
            from sentence_transformers import MultiVectorEncoder
        except ImportError as error:
            raise ImportError(f"loading {name} needs sentence-transformers >= 6: pip install {ST}") from error
        # Once more: it was imported just now.
        with quiet():
            return MultiVectorEncoder(name), None
    config = hub.find(name, "config.json")
    if config is None and hub.find(name, "adapter_config.json") is not None:
        raise ValueError(
            f"name_or_path: {name} holds an adapter of colpali-engine, no model; the models of transformers have names "
            f"that end in -hf, such as vidore/colqwen2-v1.0-hf"
        )
    if config is None:
        raise FileNotFoundError(f"name_or_path: {name} holds no config.json; it must be a model in transformers format")
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f'loading {name} needs transformers: pip install "latemax[encoders]"') from error
    architecture = (hub.read_json(config).get("architectures") or [""])[0]
    if not architecture.endswith("ForRetrieval"):
        model, _ = _transformers(name, False, complete=True)
        return model, transformers.AutoProcessor.from_pretrained(name)
    if not hasattr(transformers, architecture):
        raise ValueError(
            f"name_or_path: {name} is a {architecture}, which transformers {transformers.__version__} lacks"
        )
    model = _complete(getattr(transformers, architecture), name)
    return model, transformers.AutoProcessor.from_pretrained(name)


def _complete(cls: Any, name: str, **options: Any) -> nn.Module:
    """A model with all of its weights: transformers fills in random ones and only logs it.

    Raises:
        ValueError: Weights that the files lack, by name.
    """
    model, report = cls.from_pretrained(name, output_loading_info=True, **options)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"name_or_path: {name} lacks {len(missing)} weights of {type(model).__name__} (first: {missing[0]}), which "
            f"would be random"
        )
    return model


def _transformers(name: str, with_processor: bool, complete: bool = False) -> Loaded:
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ImportError(f'loading {name} needs transformers: pip install "latemax[encoders]"') from error
    options: dict[str, Any] = {}
    if hub.is_path(name):
        name = os.path.expanduser(name)
        if not (Path(name) / "config.json").is_file():
            raise FileNotFoundError(
                f"name_or_path: {name} holds no config.json; it must be a folder in transformers format"
            )
    else:
        options["local_files_only"] = hub.check_name(name, [*LOCAL_NAMES, *(f"{library}:..." for library in LOADERS)])
    model = _complete(AutoModel, name, **options) if complete else AutoModel.from_pretrained(name, **options)
    return model, processors.of_files(name) if with_processor else None


def _timm(name: str) -> Loaded:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"loading timm:{name} needs timm: pip install timm") from error
    return timm.create_model(name, pretrained=True), None


def _torchvision(name: str) -> Loaded:
    try:
        from torchvision.models import get_model, get_model_weights
    except ImportError as error:
        raise ImportError(f"loading torchvision:{name} needs torchvision: pip install torchvision") from error
    weights = get_model_weights(name).DEFAULT
    transforms = weights.transforms()
    own = processors.per_image(transforms, "torchvision's transform", from_torchvision_transforms(transforms))
    return get_model(name, weights=weights), own


def _open_clip(name: str) -> Loaded:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f"loading open_clip:{name} needs open_clip: pip install open_clip_torch") from error
    model, _, tag = name.partition("/")
    return open_clip.create_model(model, pretrained=tag or None), None


LOADERS: dict[str, Callable[[str], Loaded]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "open_clip": _open_clip,
}
