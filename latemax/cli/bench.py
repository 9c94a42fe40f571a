"""``latemax bench``, and the timing helpers that it shares with the repository's benchmark suites."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from latemax.api import explain, maxsim


def sync(device: str) -> None:
    """Waits for the device's queue; does nothing on the CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def fifths(seconds: list[float]) -> dict[str, float]:
    """Returns p20, p50 and p80 of ``seconds``, in milliseconds."""
    cuts = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else seconds * 4
    return dict(p20=1e3 * cuts[0], p50=1e3 * statistics.median(seconds), p80=1e3 * cuts[3])


def interleaved(runs: Mapping[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, list[float]]:
    """Times several functions in turn, so that a change of clock affects all of them.

    Args:
        runs: name -> function. Every round runs each of them once.
        device: ``"cpu"`` or ``"cuda"``.
        rounds: number of rounds.

    Returns:
        name -> wall seconds of each round.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            sync(device)
            start = time.perf_counter()
            run()
            sync(device)
            times[name].append(time.perf_counter() - start)
    return times


def matmuls(device: str, dtype: torch.dtype) -> dict[int, Callable[[], Tensor]]:
    """Returns size -> a product of two square matrices of that size, for the best rate of torch's matmul."""
    found: dict[int, Callable[[], Tensor]] = {}
    for size in (4096, 8192) if device == "cuda" else (512, 1024, 1536):
        a = torch.randn(size, size, device=device).to(dtype)
        found[size] = partial(torch.mm, a, a)
    return found


def reads(x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Returns name -> a reduction that reads x [..., dim] once; which of them is fastest depends on the processor."""
    rows = x.reshape(-1, x.shape[-1])
    return {
        "sum": x.sum,
        "amax": x.amax,
        "mv": partial(torch.mv, rows, torch.ones(rows.shape[1], dtype=x.dtype, device=x.device)),
    }


def limits(device: str, rounds: int = 20) -> dict[str, float]:
    """Measures what torch reaches on this machine now, each the best of several shapes or reductions and all rounds.

    Returns:
        ``matmul_{float32,bfloat16,float16}_tflops``, ``read_gbs`` and ``copy_gbs``.
    """
    found: dict[str, float] = {}
    for name in ("float32", "bfloat16", "float16"):
        rate = 0.0
        for size, run in matmuls(device, getattr(torch, name)).items():
            seconds = interleaved({"": run}, device, 2)[""]
            # torch's half-precision matmul takes 2 s at 1024 on processors without instructions for it
            if min(seconds) < 0.2:
                seconds = interleaved({"": run}, device, rounds)[""]
            rate = max(rate, 2 * size**3 / min(seconds) / 1e12)
        # half precision can always be converted to float32 first
        found[f"matmul_{name}_tflops"] = max(rate, found.get("matmul_float32_tflops", 0)) if device == "cpu" else rate
    # more than the last-level cache of a processor, which 32 MB is not
    size = (1 << 30) if device == "cuda" else (1 << 28)
    x = torch.ones(size // 4 // 256, 256, device=device)
    y = torch.empty_like(x)
    times = interleaved({**reads(x), "copy": partial(y.copy_, x)}, device, rounds)
    found["copy_gbs"] = 2 * size / min(times.pop("copy")) / 1e9
    found["read_gbs"] = size / min(map(min, times.values())) / 1e9
    return found


def eager(q: Tensor, d: Tensor) -> Tensor:
    """Scores [n_q, n_d] in plain torch."""
    return torch.einsum("qic,kjc->qkij", q, d).amax(-1).sum(-1, dtype=torch.float32)


def quick(rounds: int = 10) -> list[dict[str, Any]]:
    """Times latemax, eager torch and torch's own matmul and read rates in turn, after checking that the scores agree.

    The rates are a reference and not a bound: the best that torch reached in the same rounds, for matmul over several
    sizes and all shapes, for reading over several reductions of the same documents (which a large cache may hold).

    Returns:
        One dict per shape: ``label``, ``latemax_ms``, ``eager_ms``, ``error`` (largest difference of the two),
        ``reference_ms`` (the time of the work at these rates), ``binding`` (``"matmul"`` or ``"read"``, whichever takes
        longer), ``backend``.

    Raises:
        RuntimeError: the scores differ.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = "bfloat16" if device == "cuda" else "float32"
    dtype = getattr(torch, name)
    products = {f"matmul {size}": run for size, run in matmuls(device, dtype).items()}
    flops = {f"matmul {size}": 2 * size**3 for size in matmuls(device, dtype)}
    shapes = [(1, 1000, 32, 196), (1, 200, 128, 1024), (32, 32, 32, 196)]
    rows, work, matmul = [], [], 0.0
    for n_q, n_d, l_q, l_d in shapes:
        generator = torch.Generator(device).manual_seed(0)
        q, d = (
            torch.nn.functional.normalize(torch.randn(*shape, 128, generator=generator, device=device), dim=-1).to(
                dtype
            )
            for shape in ((n_q, l_q), (n_d, l_d))
        )
        error = (maxsim(q, d) - eager(q.float(), d.float())).abs().max().item()
        if not error < 1e-3 * l_q:
            raise RuntimeError(f"latemax differs from torch by {error:.3g} at {(n_q, n_d, l_q, l_d)}: not timed")
        readers = reads(d)
        scoring: dict[str, Callable[[], Any]] = {"latemax": partial(maxsim, q, d), "eager": partial(eager, q, d)}
        runs = {**scoring, **products, **readers}
        interleaved(runs, device, 1)
        times = interleaved(runs, device, rounds)
        matmul = max(matmul, *(flops[key] / min(times[key]) for key in products))
        read = d.numel() * d.element_size() / min(min(times[key]) for key in readers)
        work.append((2 * n_q * n_d * l_q * l_d * 128, (q.numel() + d.numel()) * q.element_size() / read))
        rows.append(
            {
                "label": f"{n_q} x {n_d} documents, {l_q} x {l_d} tokens, dim 128, {name}",
                "latemax_ms": fifths(times["latemax"])["p50"],
                "eager_ms": fifths(times["eager"])["p50"],
                "error": error,
                "backend": explain(q, d).backend,
            }
        )
    for row, (operations, reading) in zip(rows, work, strict=True):
        compute = operations / matmul
        row["reference_ms"] = 1e3 * max(compute, reading)
        row["binding"] = "matmul" if compute > reading else "read"
    return rows


def render(rows: list[dict[str, Any]]) -> str:
    """Formats what `quick` returned as the text of ``latemax bench``."""
    lines = [f"{'':58} {'latemax':>10} {'torch':>10} {'ratio':>7} {'reference':>10} {'of it':>7}"]
    for row in rows:
        lines.append(
            f"{row['label']:58} {row['latemax_ms']:7.2f} ms {row['eager_ms']:7.2f} ms "
            f"{row['eager_ms'] / row['latemax_ms']:6.2f}x {row['reference_ms']:7.2f} ms "
            f"{row['reference_ms'] / row['latemax_ms']:6.0%}  {row['binding']}, backend {row['backend']}"
        )
    lines.append("latemax, torch: medians. reference: the same work at the best matmul or read rate of torch here")
    return "\n".join(lines)
