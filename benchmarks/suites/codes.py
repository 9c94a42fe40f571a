"""Documents of codes on the native CPU kernels, compared with floats and with what else scores 8 bits, interleaved.

    python -m benchmarks.suites.codes [--tiny] [--json FILE]

Every score is checked before it is timed. Peers are optional: ``pip install fast-maxsim==0.2.0 numkong==7.8.6
lateweave==0.2.0``. numkong screens in 8 bits and is approximate; its packing is not timed. lateweave keeps int8 codes
in stores only, and decodes them to float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

import latemax
from benchmarks import harness, internals, peers_cpu
from benchmarks.shapes import unit
from benchmarks.tables import Table, markdown

SHAPE, TINY = (32, 1000, 512, 128), (32, 40, 100, 128)
ROUNDS = 15
LEVELS = ("avx2", "avx512", "avx512_vnni")
FLOAT, HALF = "float32 × float32", "bfloat16 × bfloat16"
Runs = dict[str, Callable[[], Any]]


def contenders(q: torch.Tensor, d: torch.Tensor, codes: dict[str, Any], level: str | None) -> Runs:
    """name -> function returning scores [1, n_d], or bounds."""
    int8, bits = codes["int8"], codes["binary"]
    few, some = latemax.quantize(q, "int8"), latemax.quantize(q, "binary")
    half_q, half_d = q.bfloat16(), d.bfloat16()
    score = functools.partial(internals.native_scores, level=level)
    bounds = functools.partial(internals.native_bounds, level=level)
    return {
        FLOAT: lambda: score(q, d),
        HALF: lambda: score(half_q, half_d),
        "float32 × int8": lambda: score(q, int8),
        "int8 × int8": lambda: score(few, int8),
        "bounds, float32 × int8": lambda: bounds(q, int8, coarse=False),
        "bounds, query rounded to 8 bits × int8": lambda: bounds(q, int8, coarse=True),
        "float32 × one bit": lambda: score(q, bits),
        "one bit × one bit": lambda: score(some, bits),
    }


def int_mm(q: Any, d: Any) -> torch.Tensor:
    """torch's int8 matmul and the maximum of its scaled products."""
    n, length, dim = d.shape
    products = torch._int_mm(d.codes.view(-1, dim), q.codes[0].t().contiguous()).view(n, length, -1)
    return (products * d.scale.unsqueeze(-1)).amax(1).mul_(q.scale[0]).sum(-1)


def measure(tiny: bool = False) -> dict[str, Any]:
    l_q, n_d, l_d, dim = TINY if tiny else SHAPE
    generator = torch.Generator().manual_seed(0)
    q, d = unit(1, l_q, dim, generator=generator), unit(n_d, l_d, dim, generator=generator)
    codes = {kind: latemax.quantize(d, kind) for kind in ("int8", "binary")}
    result: dict[str, Any] = dict(
        machine=harness.machine(packages=peers_cpu.PEERS), shape=(l_q, n_d, l_d, dim), levels={}
    )
    truth = latemax.maxsim(q, d)
    few = latemax.quantize(q, "int8")
    # None is the best, with the peers
    for level in (None, *(name for name in LEVELS if name in internals.native_levels()[:-1])):
        runs = contenders(q, d, codes, level)
        for name, run in runs.items():
            out = run()
            if "bounds" in name:
                harness.check(f"{name}, lower", (out[0] - truth).clamp(min=0), torch.zeros_like(truth), 1e-4)
                harness.check(f"{name}, upper", (truth - out[1]).clamp(min=0), torch.zeros_like(truth), 1e-4)
            elif "bit" not in name:
                harness.check(name, out, truth, 0.02 * l_q)
        if level is None:
            runs["torch._int_mm and amax, int8 × int8"] = lambda: int_mm(few, codes["int8"])
            harness.check("torch._int_mm", int_mm(few, codes["int8"]), latemax.maxsim(few, codes["int8"])[0], 1e-3)
            others = peers_cpu.lateweave(q[0], d)
            for name, run in others.items():
                harness.check(name, run(), truth[0], 0.02 * l_q)
            runs |= peers_cpu.fast_maxsim(q[0], d) | peers_cpu.numkong(q[0], d) | others
        harness.interleaved(runs, 1)
        seconds = harness.interleaved(runs, 3 if tiny else ROUNDS)
        result["levels"][level or internals.native_levels()[-1]] = {
            name: harness.fifths(times) for name, times in seconds.items()
        }
    return result


def table(result: dict[str, Any]) -> str:
    levels = result["levels"]
    names = next(iter(levels.values()))

    def cell(level: dict[str, Any], name: str) -> str:
        if name not in level:
            return ""
        ms, plain = level[name]["p50"], level[FLOAT]["p50"]
        return f"{ms:.3g} ms, {plain / ms:.2f}×"

    rows = [[name, *(cell(level, name) for level in levels.values())] for name in names]
    head = ["q × d", *(f"`{name}`" for name in levels)]
    l_q, n_d, l_d, dim = result["shape"]
    machine = result["machine"]
    return markdown(head, rows) + (
        f"\n{l_q} query tokens, {n_d:,} documents of {l_d} tokens, {dim} dims; {machine['threads']} threads, "
        f"{machine['cpu']}. Median, and how many times faster than float32 of the same column.\n"
    )


ABSENT = "(not measured yet: `python -m benchmarks.suites.codes`)\n"
TABLES = {
    "codes-cpu": Table("codes-avx512", table, absent=ABSENT),
    "codes-cpu-avx2": Table("codes-avx2", table, absent=ABSENT),
}


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    harness.finish(measure(options.tiny), table, options.json)


if __name__ == "__main__":
    main()
