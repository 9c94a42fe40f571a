"""``latemax info``: versions, devices, and which backends work here and why the others do not."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

BASE = ("torch", "triton", "numpy")
OPTIONAL = (
    "transformers",
    "timm",
    "open_clip_torch",
    "torchvision",
    "pillow",
    "safetensors",
    "matplotlib",
    "scikit-image",
    "scikit-learn",
)


def collect() -> dict[str, Any]:
    """Collects what ``latemax info`` shows.

    Optional packages are looked up in the installed metadata; none is imported.

    Returns:
        Plain data that json can write: ``latemax`` {version, location}, ``python`` {version, platform}, ``packages``
        {name: version, or None if not installed}, ``cpu`` {model, capability, cores, torch_threads}, ``cuda`` {build,
        devices, reason}, ``backends`` {name: {usable, reason}}.
    """
    from latemax import __version__

    return {
        "latemax": {"version": __version__, "location": str(Path(__file__).parents[1])},
        "python": {"version": platform.python_version(), "platform": platform.platform()},
        "packages": {name: _version(name) for name in (*BASE, *OPTIONAL)},
        "cpu": _cpu(),
        "cuda": _cuda(),
        "backends": _backends(),
    }


def _backends() -> dict[str, dict[str, Any]]:
    # the only place of the command line that reads latemax.ops
    from latemax.ops.dispatch import backend_status

    return {name: {"usable": usable, "reason": reason} for name, (usable, reason) in backend_status().items()}


def render(info: dict[str, Any]) -> str:
    """Formats what `collect` returned as the text of ``latemax info``."""
    python, cpu, cuda = info["python"], info["cpu"], info["cuda"]
    lines = [
        f"latemax {info['latemax']['version']}  {info['latemax']['location']}",
        f"python {python['version']}  {python['platform']}",
        "",
        "packages",
        *_table((name, version or "not installed") for name, version in info["packages"].items()),
        "",
        "cpu",
        f"  {cpu['model']}, {cpu['capability']}: {cpu['cores']} usable cores, {cpu['torch_threads']} torch threads",
        "",
        f"gpu (torch built for CUDA: {cuda['build'] or 'no'})",
        *(
            f"  {number}  {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB, "
            f"{gpu['multiprocessors']} multiprocessors"
            for number, gpu in enumerate(cuda["devices"])
        ),
        *([f"  none: {cuda['reason']}"] if cuda["reason"] else []),
        "",
        "backends",
        *_table(
            (name, "works" if status["usable"] else "no", status["reason"]) for name, status in info["backends"].items()
        ),
    ]
    return "\n".join(lines)


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in table]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    import torch

    return {
        "model": _cpu_model(Path("/proc/cpuinfo")),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def _cpu_model(cpuinfo: Path) -> str:
    # x86 Linux lists a "model name"; most Arm machines and other systems only report the architecture.
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _cuda() -> dict[str, Any]:
    import torch

    build, reason = torch.version.cuda, ""
    devices: list[dict[str, Any]] = []
    if build is None:
        reason = f"torch {torch.__version__} is built without CUDA"
    elif not torch.cuda.is_available():
        reason = f"torch is built for CUDA {build} but sees no usable device: check the driver and CUDA_VISIBLE_DEVICES"
    else:
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "name": gpu.name,
                    "capability": f"{gpu.major}.{gpu.minor}",
                    "memory_gib": round(gpu.total_memory / 2**30, 1),
                    "multiprocessors": gpu.multi_processor_count,
                }
            )
    return {"build": build, "devices": devices, "reason": reason}
