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


def by_shape(rows: list[dict]) -> dict[tuple, list[dict]]:
    found: dict[tuple, list] = {}
    for row in rows:
        found.setdefault(tuple(row["shape"]), []).append(row)
    return found


def cpu(name: str = "cpu") -> str:
    data = result(name)
    machine, limit = data["machine"], data.get("limits")
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in data["rows"]))
    names = list(dict.fromkeys(row["name"] for row in data["rows"]))
    cells = {(tuple(row["shape"]), row["name"]): row for row in data["rows"]}
    rows = []
    for name in names:
        line = [f"**{name}**" if name.startswith("latemax") else name]
        for shape in shapes:
            row = cells.get((shape, name))
            if row is None:
                line.append("")
                continue
            error = f", error {row['max_error']:.2g}" if "approximate" in name or "bfloat16" in name else ""
            share = f", {row['of_limit']:.0%} of limit" if limit and name.startswith("latemax") else ""
            line.append(f"{row['ms_p50']:.1f} ms ({row['vs_latemax']:.2f}×{error}{share})")
        rows.append(line)
    head = ["(l_q, n_d, l_d, dim)", *(str(shape) for shape in shapes)]
    peers = ", ".join(f"{name} {version}" for name, version in machine["peers"].items())
    return markdown(head, rows) + (
        f"\nMedian of interleaved rounds; in brackets the time as a multiple of latemax float32. {machine['cpu']} "
        f"({machine['capability']}), {machine['threads']} threads, torch {machine['torch']}, {peers}, commit "
        f"{machine['commit']}, {machine['date']}.{measured_limits(limit)}\n"
    )


def measured_limits(limit: dict | None) -> str:
    if not limit:
        return ""
    return (
        f" Limits measured in the same run: matmul float32 {limit['matmul_float32_tflops']:.3g} TFLOP/s, bfloat16 "
        f"{limit['matmul_bfloat16_tflops']:.3g}; read {limit['read_gbs']:.3g} GB/s."
    )


def cpu_more() -> str:
    """Forward and backward, ragged documents, and the sweep in one line."""
    data = result("cpu")
    rows = []
    for shape, here in by_shape(data["train"]).items():
        mine, best = here[0], min(here[1:], key=lambda row: row["ms_p50"])
        rows.append([f"forward and backward {shape}", f"{mine['ms_p50']:.1f} ms",
                     f"{best['name']} by autograd {best['ms_p50']:.1f} ms: {best['vs_latemax']:.2f}×"])  # fmt: skip
    for shape, here in by_shape(data["one"]).items():
        mine, best = here[0], min(here[1:], key=lambda row: row["us"])
        rows.append([f"a call with one document {shape}", f"{mine['us']:.1f} µs",
                     f"{best['name']} {best['us']:.1f} µs: {best['vs_latemax']:.2f}×; its products alone at the "
                     f"matmul rate {mine['allowed_us']:.1f} µs"])  # fmt: skip
    for row in data["ragged"]:
        rows.append([f"1000 documents of {row['lengths']} tokens, end to end", f"{row['ms']['ragged']:.1f} ms",
                     f"a token costs {row['per_token_vs_dense']:.2f}× that of equally long documents"])  # fmt: skip
    ratios = []
    peers = [row for row in data["sweep"] if "float16" not in row["name"] and row["name"] != "latemax"]
    for shape, here in by_shape(peers).items():
        ratios.append((min(row["vs_latemax"] for row in here), shape))
    if ratios:
        ratios.sort()
        middle = ratios[len(ratios) // 2][0]
        rows.append([f"sweep of {len(ratios)} shapes, float32", f"best exact peer {middle:.2f}× (median)",
                     f"least {ratios[0][0]:.2f}× at {ratios[0][1]}"])  # fmt: skip
    return markdown(["what", "latemax", "beside it"], rows)


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


def corpus() -> str:
    """A store searched within a bound of memory, beside what the machine reads."""
    data = result("corpus")
    machine, shape = data["machine"], data["shape"]
    rows = [
        ["plain read of the files, page cache dropped", f"{data['disk_gbs']:.2f}", ""],
        ["plain read of the files again", f"{data['cached_read_gbs']:.2f}", ""],
        ["sum of an array in memory", f"{data['memory_gbs']:.2f}", ""],
        ["`topk` of documents in memory", f"{data['scoring_gbs']:.2f}", ""],
        *(
            [f"**`topk` of the store**, {what}", f"{data[key]['gbs']:.2f}", f"{data[key]['peak_bytes'] / 1e6:.0f}"]
            for key, what in (("cold", "page cache dropped"), ("cached", "again"))
        ),
    ]
    one = data["cold"]
    return markdown(["what", "GB/s", "peak resident MB"], rows) + (
        f"\n{data['gb']:g} GB of {shape['dtype']} tokens, {data['documents']:,} documents of {shape['l_d']} x "
        f"{shape['dim']}, one query of {shape['l_q']} tokens, k {shape['k']}; memory={one['memory'] / 1e6:.0f} MB, "
        f"{one['before_bytes'] / 1e6:.0f} MB resident before the search, and the address space held to "
        f"{one['address_space_added'] / 1e9:g} GB more (RLIMIT_AS). Scores within {one['error']:.1g} of brute force. "
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, commit "
        f"{machine['commit']}, {machine['date']}.\n"
    )


def scale() -> str:
    """Seconds to score every page of a billion, by GPUs; inputs marked measured or spec."""
    shape = result("corpus")["shape"]
    page = shape["l_d"] * shape["dim"] * 2
    total, rows = page * 1e9, []
    for name, gbs, source in (
        ("PCIe 5.0 x16, a direction", 64.0, "spec"),
        ("HBM3 of one H100 SXM", 3350.0, "spec"),
        ("disk of the CPU machine above", result("corpus")["disk_gbs"], "measured"),
        ("topk of the CPU machine above", result("corpus")["cold"]["gbs"], "measured"),
    ):
        seconds = [total / gbs / 1e9 / n for n in (1, 8, 64, 512)]
        rows.append([name, f"{gbs:.3g}", source, *(f"{s:,.3g}" for s in seconds)])
    head = ["what feeds the scoring", "GB/s each", "input is", "1", "8", "64", "512"]
    return markdown(head, rows) + (
        f"\nSeconds to pass 10⁹ pages of {shape['l_d']} float16 tokens of dim {shape['dim']} ({page:,} bytes a page, "
        f"{total / 1e12:.1f} TB) once through N devices, at the whole rate of the link named.\n"
    )


def ragged() -> str:
    """Tokens end to end beside padded ones, and candidates in place beside the same documents side by side."""
    data = result("ragged")
    machine, lines = data["machine"], []
    for row in data["rows"]:
        for name, ms in row["ms"].items():
            if row["case"] == "ragged":
                what = f"{row['n_q']} x {row['n_d']}" + (", forward and backward" if row["train"] else "")
                note = f"{row['per_token']:.2f}× of padded by real tokens" if name == "end to end" else ""
            else:
                what = f"{row['k']} of {row['documents']} documents"
                note = f"{row['of_side_by_side']:.2f}× of side by side" if name == "rerank" else ""
            lines.append([what, name, f"{ms:.1f}", note])
    return markdown(["what", "how", "ms", ""], lines) + (
        f"\nDocuments of 32 to 1024 tokens of dim 128 (reranked: 196), queries of 32, {data['rows'][0]['dtype']}; "
        f"median of interleaved rounds. {machine.get('gpu') or machine['cpu']}, {machine['threads']} threads, torch "
        f"{machine['torch']}, commit {machine['commit']}, {machine['date']}.\n"
    )


def kill_writer() -> str:
    data = result("kill_writer")
    return markdown(
        [
            "writers killed",
            "stores unreadable",
            "kills that lost a commit",
            "kills that left a file to clear",
            "documents at the end",
        ],
        [[data["kills"], data["unreadable"], data["lost"], data["left_behind"], f"{data['documents']:,}"]],
    )


TABLES = {
    "corpus": corpus, "scale": scale, "kill-writer": kill_writer,
    "ragged": ragged,
    "cpu": cpu, "cpu-more": cpu_more, "cpu-avx512": lambda: cpu("cpu-avx512"), "aot": aot, "cuda-aot": cuda_aot,
    "host": host, "suite-cpu": lambda: suite("bench-cpu"), "suite-gpu": on_gpu, "predicted": predicted,
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
