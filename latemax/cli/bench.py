"""``latemax bench``, and the timing helpers that it shares with the repository's benchmark suites."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
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


def interleaved(runs: dict[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, list[float]]:
    """Times several functions in turn, so that a change of clock meets all of them.

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


def limits(device: str, rounds: int = 20) -> dict[str, float]:
    """Measures what this machine reaches now.

    Returns:
        ``matmul_{float32,bfloat16,float16}_tflops``, ``read_gbs`` and ``copy_gbs``.
    """
    size = 8192 if device == "cuda" else 1024
    # bytes; more than the last-level cache of a processor, which 32 MB is not
    elements = (1 << 30) if device == "cuda" else (1 << 28)
    found: dict[str, float] = {}
    for dtype in ("float32", "bfloat16", "float16"):
        a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        run = {"": partial(torch.mm, a, a)}
        seconds = interleaved(run, device, 2)[""]
        # torch's half-precision matmul takes 2 s on processors without instructions for it
        if min(seconds) < 0.2:
            seconds = interleaved(run, device, rounds)[""]
        rate = 2 * size**3 / min(seconds) / 1e12
        # half precision can always be converted to float32 first
        found[f"matmul_{dtype}_tflops"] = max(rate, found.get("matmul_float32_tflops", 0)) if device == "cpu" else rate
    x = torch.ones(elements // 4, device=device)
    y = torch.empty_like(x)
    times = interleaved({"read": lambda: x.sum(), "copy": lambda: y.copy_(x)}, device, rounds)
    found["read_gbs"] = elements / min(times["read"]) / 1e9
    found["copy_gbs"] = 2 * elements / min(times["copy"]) / 1e9
    return found


def eager(q: Tensor, d: Tensor) -> Tensor:
    """Scores [n_q, n_d] in plain torch."""
    return torch.einsum("qic,kjc->qkij", q, d).amax(-1).sum(-1, dtype=torch.float32)


def quick(rounds: int = 10) -> list[dict[str, Any]]:
    """Times latemax next to eager torch on three shapes, after checking that their scores agree.

    Returns:
        One dict per shape: ``label``, ``latemax_ms``, ``eager_ms``, ``error`` (largest difference of the two),
        ``allowed_ms`` (the least time that the measured matmul rate or read bandwidth permits), ``binding``
        (``"matmul"`` or ``"read"``, whichever takes longer), ``backend``.

    Raises:
        RuntimeError: the scores differ.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    limit = limits(device, rounds)
    name = "bfloat16" if device == "cuda" else "float32"
    dtype = getattr(torch, name)
    shapes = [(1, 1000, 32, 196), (1, 200, 128, 1024), (32, 32, 32, 196)]
    rows = []
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
        times = interleaved(dict(latemax=partial(maxsim, q, d), eager=partial(eager, q, d)), device, rounds)
        compute = 2 * n_q * n_d * l_q * l_d * 128 / limit[f"matmul_{name}_tflops"] / 1e9
        read = (q.numel() + d.numel()) * q.element_size() / limit["read_gbs"] / 1e6
        rows.append(
            dict(
                label=f"{n_q} x {n_d} documents, {l_q} x {l_d} tokens, dim 128, {name}",
                latemax_ms=fifths(times["latemax"])["p50"], eager_ms=fifths(times["eager"])["p50"], error=error,
                allowed_ms=max(compute, read), binding="matmul" if compute > read else "read",
                backend=explain(q, d).backend,
            )
        )  # fmt: skip
    return rows


def render(rows: list[dict[str, Any]]) -> str:
    """Formats what `quick` returned as the text of ``latemax bench``."""
    lines = [f"{'':58} {'latemax':>10} {'torch':>10} {'ratio':>7} {'limit':>10} {'of limit':>9}"]
    for row in rows:
        lines.append(
            f"{row['label']:58} {row['latemax_ms']:7.2f} ms {row['eager_ms']:7.2f} ms "
            f"{row['eager_ms'] / row['latemax_ms']:6.2f}x {row['allowed_ms']:7.2f} ms "
            f"{row['allowed_ms'] / row['latemax_ms']:8.0%}  {row['binding']}, backend {row['backend']}"
        )
    return "\n".join(lines)
