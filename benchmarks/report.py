"""Renders the tables of README.md and docs/ from benchmarks/results/*.json, so that no number is typed by hand.

    python -m benchmarks.report           rewrite every table
    python -m benchmarks.report --check   fail where a table is stale

A table stands between ``<!-- table:NAME -->`` and ``<!-- /table -->``.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
MARKER = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /table -->)", re.DOTALL)


def result(name: str):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def markdown(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def cpu() -> str:
    data = result("cpu")
    machine = data["machine"]
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in data["rows"]))
    names = list(dict.fromkeys(row["name"] for row in data["rows"]))
    cells = {(tuple(row["shape"]), row["name"]): row for row in data["rows"]}
    rows = []
    for name in names:
        line = [f"**{name}**" if name.startswith("latemax") else name]
        for shape in shapes:
            row = cells[shape, name]
            error = f", error {row['max_error']:.2g}" if "approximate" in name or "bfloat16" in name else ""
            line.append(f"{row['ms_p50']:.1f} ms ({row['vs_latemax']:.2f}×{error})")
        rows.append(line)
    head = ["(l_q, n_d, l_d, dim)", *(str(shape) for shape in shapes)]
    peers = ", ".join(f"{name} {version}" for name, version in machine["peers"].items())
    return markdown(head, rows) + (
        f"\nMedian of interleaved rounds; in brackets the time as a multiple of latemax float32. {machine['cpu']} "
        f"({machine['capability']}), {machine['threads']} threads, torch {machine['torch']}, {peers}, commit "
        f"{machine['commit']}, {machine['date']}.\n"
    )


def aot() -> str:
    """The sm_90 builds that most calls run: half precision at dim 128. The others are in the JSON."""
    head = ["kernel", "case", "registers", "spills", "shared bytes", "wgmma", "inner loop"]
    keys = ["kernel", "case", "registers", "spills", "shared", "wgmma", "loop"]
    kept = [
        row
        for row in result("aot")
        if row["arch"] == 90 and re.match(r"half dim 128 |bf16 dim 128", row["case"]) and row["loop"]
    ]
    spilled = sum(row["spills"] > 0 for row in result("aot"))
    return markdown(head, [[row[key] for key in keys] for row in kept]) + (
        f"\n{len(kept)} of {len(result('aot'))} builds, {spilled} of which spill; the others (sm_80, sm_100, other "
        "dims and dtypes) are in benchmarks/results/aot.json.\n"
    )


def predicted() -> str:
    from benchmarks import predict

    return predict.table()


def on_gpu() -> str:
    if not (ROOT / "benchmarks" / "results" / "bench-gpu.json").exists():
        return "No GPU has run the suite yet; benchmarks/GPU_PENDING.md says how it is to be done.\n"
    return suite("bench-gpu")


def cuda_aot() -> str:
    data = result("cuda-aot")
    built = data["build"]
    head = [
        "arch",
        "kernel",
        "query columns",
        "winners",
        "registers",
        "spills",
        "HGMMA",
        "HMMA",
        "instructions",
        "loop",
    ]
    rows = []
    for row in data["rows"]:
        # float16 and bfloat16 compile alike; a row that differed would stand beside
        line = [row["arch"], row["kernel"], row["columns"] or "", "yes" if row["argmax"] else "",
                *(row[key] for key in ("registers", "spills", "hgmma", "hmma", "instructions", "loop"))]  # fmt: skip
        if line not in rows:
            rows.append(line)
    return markdown(head, rows) + (
        f"\nnvcc {built['nvcc']}; `{built['wheel']}`, {built['wheel_bytes'] / 1e6:.2f} MB, built in "
        f"{built['seconds']:.0f} s on {built['cores']} cores, the native CPU kernels included; commit "
        f"{built['commit']}, {built['date']}.\n"
    )


def host() -> str:
    data = result("host")
    machine = data["machine"]
    rows = [
        [row["step"].replace("  ", "– "), f"{row['microseconds']:.1f}", f"{row['adds']:.1f}"]
        for row in data["rows"]
        if "adds" in row
    ]
    first = ", ".join(f"{row['step']} {row['seconds']:.2f} s" for row in data["rows"] if "seconds" in row)
    return markdown(["step", "µs", "of torch.add"], rows) + (
        f"\nMedian of interleaved rounds, processor time; the last column survives a slow machine. "
        f"Compiled with an empty cache, in processor time with ptxas: {first}. "
        f"{machine['cpu']}, torch {machine['torch']}, triton {machine['triton']}, commit {machine['commit']}.\n"
    )


GPU_COLUMNS = ["on the GPU, cold ms (other)", "warm ms", "peak MB (other)", "first call ms (other)"]


def gpu_cells(mine: dict, best: dict) -> list[str]:
    """Time of a graph replay with L2 overwritten and as left, memory beyond the inputs, first call."""
    return [
        f"{mine['cold']['p50']:.3f} ({best['cold']['p50']:.3f})", f"{mine['warm']['p50']:.3f}",
        f"{mine['peak_mb']:.1f} ({best['peak_mb']:.1f})", f"{mine['first_call_ms']:.0f} ({best['first_call_ms']:.0f})",
    ]  # fmt: skip


def suite(name: str) -> str:
    """latemax beside the fastest other contender and the binding limit, a row a shape."""
    data = result(name)
    limit, machine = data["limits"], data["machine"]
    cases: dict[tuple, list] = {}
    for row in data["rows"]:
        cases.setdefault((row["label"].strip(), row["train"]), []).append(row)
    lines = []
    on_gpu = "gpu" in machine
    for (label, train), rows in cases.items():
        timed = {row["name"]: row for row in rows if "wall" in row and row["name"] != "latemax cuda"}
        if "latemax" not in timed or len(timed) < 2:
            continue
        mine = timed.pop("latemax")
        best = min(timed.values(), key=lambda row: row["wall"]["p50"])
        lines.append(
            [
                label + (" forward+backward" if train else ""), f"{mine['wall']['p50']:.2f}",
                f"{best['name']} {best['wall']['p50']:.2f}", f"{best['wall']['p50'] / mine['wall']['p50']:.2f}×",
                f"{mine['allowed_ms']:.2f} ({mine['binding']})", f"{mine['of_limit']:.0%}",
                *(gpu_cells(mine, best) if on_gpu else []),
            ]
        )  # fmt: skip
    head = ["(n_q,n_d,l_q,l_d) dim", "latemax ms", "fastest other ms", "ratio", "limit ms", "of limit"]
    head += GPU_COLUMNS * on_gpu
    where = machine.get("gpu", machine["cpu"])
    return markdown(head, lines) + (
        f"\n{where}, torch {machine['torch']}, commit {machine['commit']}, {machine['date']}. Wall time, median of "
        f"interleaved rounds. Limits measured in the same run: matmul float32 {limit['matmul_float32_tflops']:.3g} "
        f"TFLOP/s, bfloat16 {limit['matmul_bfloat16_tflops']:.3g}; read {limit['read_gbs']:.3g} GB/s.\n"
    )


def roofline(name: str, path: pathlib.Path) -> None:
    """Attained FLOP/s against FLOPs a byte, under the measured limits; one dot a contender and shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    data = result(name)
    rows = [row for row in data["rows"] if "wall" in row and not row["train"]]
    dtypes = list(dict.fromkeys(row["shape"]["dtype"] for row in rows))
    figure, axes = pyplot.subplots(1, len(dtypes), figsize=(5.4 * len(dtypes), 4.2), squeeze=False)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        peak, read = data["limits"][f"matmul_{dtype}_tflops"], data["limits"]["read_gbs"]
        here = [row for row in rows if row["shape"]["dtype"] == dtype]
        intensity = sorted(row["flops"] / row["bytes"] for row in here)
        xs = [intensity[0] / 2, peak * 1e3 / read, intensity[-1] * 2]
        xs.sort()
        axis.plot(xs, [min(peak, x * read / 1e3) for x in xs], color="0.35")
        axis.annotate(f"measured limit: {peak:.2g} TFLOP/s, {read:.3g} GB/s", (xs[0], peak), color="0.35", fontsize=8,
                      xytext=(0, 5), textcoords="offset points")  # fmt: skip
        others = [row for row in here if row["name"] != "latemax"]
        for chosen, colour, label in (
            (others, "#b0b0b0", "others"),
            ([r for r in here if r["name"] == "latemax"], "#d55e00", "latemax"),
        ):
            x = [row["flops"] / row["bytes"] for row in chosen]
            y = [row["flops"] / row.get("cold", row["wall"])["p50"] / 1e9 for row in chosen]
            axis.scatter(x, y, s=34, color=colour, label=label, zorder=3 if label == "latemax" else 2)
        axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte of inputs", ylabel="TFLOP/s attained", title=dtype)
        axis.legend(frameon=False, loc="lower right")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


TABLES = {
    "cpu": cpu, "aot": aot, "cuda-aot": cuda_aot, "host": host, "suite-cpu": lambda: suite("bench-cpu"),
    "suite-gpu": on_gpu, "predicted": predicted,
}  # fmt: skip


def render(text: str) -> str:
    def table(match):
        name = match["name"]
        return match[1] + TABLES[name]() + match[4] if name in TABLES else match[0]

    return MARKER.sub(table, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a table is stale")
    parser.add_argument(
        "--roofline", metavar="NAME", help="draw docs/img/roofline-NAME.png from results/bench-NAME.json"
    )
    options = parser.parse_args()
    check = options.check
    if options.roofline:
        path = ROOT / "docs" / "img" / f"roofline-{options.roofline}.png"
        path.parent.mkdir(exist_ok=True)
        roofline(f"bench-{options.roofline}", path)
        print(f"drawn: {path.relative_to(ROOT)}")
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        before = path.read_text()
        after = render(before)
        if before != after:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(after)
    for name in stale:
        print(("stale: " if check else "rewritten: ") + name)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
