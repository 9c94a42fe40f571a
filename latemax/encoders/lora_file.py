"""Adapter files: the factors of a LoRA, what of its encoder was trained with them, and the settings to rebuild both."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The first format held the factors only, and nothing about the encoder.
FORMAT, READABLE = "latemax-lora-2", ("latemax-lora-1", "latemax-lora-2")


def write(path: str | os.PathLike[str], config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Writes a file in one step: safetensors where that is installed, else ``torch.save``."""
    path = Path(path)
    tensors = {key: value.contiguous().cpu() for key, value in state.items()}
    config = {"format": FORMAT, **config}
    # In the target's folder, because a rename is atomic only within one file system.
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            from safetensors.torch import save_file
        except ImportError:
            torch.save({"config": config, "state": tensors}, scratch)
        else:
            save_file(tensors, scratch, metadata={"latemax": json.dumps(config)})
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``(config, state)`` of a file; ``config["encoder"]`` is None where the file says nothing about an encoder.

    Raises:
        FileNotFoundError: No such file.
        ImportError: It needs safetensors.
        ValueError: Not an adapter file of this library.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: no such file: {path}")
    with open(path, "rb") as file:
        # A zip archive is torch.save's; anything else is read as safetensors.
        is_zip = file.read(4) == b"PK\x03\x04"
    config, state = _read_torch(path) if is_zip else _read_safetensors(path)
    if config.get("format") not in READABLE:
        raise ValueError(
            f"{path}: not a LoRA file of this library (format {config.get('format')!r}, expected {FORMAT!r})"
        )
    return {"encoder": None, **config}, state


def _read_torch(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    return content.get("config", {}), content.get("state", {})


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f'reading {path} needs safetensors: pip install "latemax[encoders]"') from error
    try:
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {}).get("latemax", "{}"))
            return config, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable LoRA file: {error}") from error
