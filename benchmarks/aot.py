"""What the Triton kernels become on GPUs that need not be here: compiles every row of the tile table ahead of time.

    python -m benchmarks.aot [--arch 80 90 100] [--json FILE]

Prints, for each kernel × architecture × tile: registers, spill instructions, shared memory, matrix instructions and the
length of the innermost loop that holds one. Needs triton (it carries ptxas, cuobjdump and nvdisasm) and no GPU.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import tempfile

import torch

from latemax.ops import tiles

TL = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


def variants(arch: int):
    """(kernel, label, dtype, constexprs, options): each forward tile plain, and its flags on the most used tile."""
    dense = dict(Q_RAGGED=False, D_RAGGED=False, CANDIDATES=False)
    flags = dict(Q_MASKED=False, D_MASKED=False, NORM=0, ARGMAX=False) | dense
    varlen, rerank = dict(Q_RAGGED=True, D_RAGGED=True), dict(D_RAGGED=True, CANDIDATES=True)
    for dtype, precision, kind in (
        (torch.bfloat16, "ieee", "half"),
        (torch.float32, "tf32", "tf32"),
        (torch.float32, "ieee", "ieee"),
        (torch.float64, "ieee", "double"),
    ):
        for dim in (64, 96, 128, 256, 768) if kind == "half" else (128, 768):
            seen = set()
            for l_q, n_q in ((16, 1), (32, 1), (64, 1), (128, 1), (1024, 1), (32, 16)):
                rows = l_q * n_q
                tile, _ = tiles.pick(kind, dim, rows, dtype.itemsize, arch)
                argmax_tile, _ = tiles.pick(kind, dim, rows, dtype.itemsize, arch, argmax=True)
                pack = 1 if l_q >= tile.block_q else min(n_q, tile.block_q // l_q)
                if (tile, pack) in seen:
                    continue
                seen.add((tile, pack))
                sets = [{}]
                if dim == 128 and kind != "half":
                    sets.append(dict(ARGMAX=True))
                if dim == 128 and kind == "half" and l_q in (32, 128):
                    sets += [dict(D_MASKED=True), dict(NORM=1 if l_q == n_q * 32 else 2), dict(ARGMAX=True)]
                    sets += [dict(D_MASKED=True, ARGMAX=True)]
                    if n_q == 1:
                        sets += [varlen, rerank, rerank | dict(NORM=1)]
                for extra in sets:
                    use = argmax_tile if "ARGMAX" in extra else tile
                    constants = dict(
                        DIM=dim, BLOCK_Q=use.block_q, BLOCK_D=use.block_d, BLOCK_K=use.block_k, PACK=pack,
                        SWAP=use.swap, ALIGN=16 // dtype.itemsize, COMPUTE=TL[dtype],
                        ACC="fp64" if kind == "double" else "fp32", PRECISION=precision, **(flags | extra),
                    )  # fmt: skip
                    label = f"{kind} dim {dim} l_q {l_q}" + (f" x{pack}" if pack > 1 else "")
                    label += "".join(f" {name.lower()}={value}" for name, value in extra.items())
                    yield (
                        "forward_kernel", label, dtype, constants,
                        dict(num_warps=use.num_warps, num_stages=use.num_stages),
                    )  # fmt: skip
    for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float64, "ieee")):
        acc = "fp64" if dtype == torch.float64 else "fp32"
        align = 16 // dtype.itemsize
        for dim in (128, 1030):
            columns = tiles.padded_dim(dim)
            rows = max(1, 4096 // columns)
            label = f"{TL[dtype]} dim {dim}"
            yield (
                "inverse_norm_kernel",
                label,
                dtype,
                dict(
                    DIM=dim,
                    BLOCK_R=max(1, 4096 // min(columns, 1024)),
                    BLOCK_K=min(columns, 1024),
                    ALIGN=align,
                    ACC=acc,
                ),
                {},
            )
            yield "through_norm_kernel", label, dtype, dict(DIM=dim, BLOCK_R=rows, BLOCK_K=columns, ACC=acc), {}
            if dim == 128:
                yield "sum_slots_kernel", TL[dtype], dtype, dict(BLOCK_Q=32, BLOCK=256, ACC=acc), {}
                for extra in (varlen, rerank):
                    constants = dict(DIM=dim, BLOCK_R=rows, BLOCK_K=columns, NORM=False, ALIGN=align, ACC=acc)
                    case = label + "".join(f" {name.lower()}" for name in extra)
                    yield "grad_q_kernel", case, dtype, constants | dense | extra, {}
            for norm in (False, True):
                case = label + (" norm" if norm else "")
                yield (
                    "grad_q_kernel",
                    case,
                    dtype,
                    dict(DIM=dim, BLOCK_R=rows, BLOCK_K=columns, NORM=norm, ALIGN=align, ACC=acc, **dense),
                    {},
                )
                compute = acc if norm else TL[dtype]
                tile = tiles.backward_tile(dim, 32, max(dtype.itemsize, 4 if norm else 0))
                constants = dict(
                    DIM=dim,
                    BLOCK_D=tile.block_d,
                    BLOCK_R=tile.block_r,
                    BLOCK_K=tile.block_k,
                    OWN=False,
                    NORM=norm,
                    PROJECT=norm and dim <= tile.block_k,
                    ALIGN=align,
                    ACC=acc,
                    COMPUTE=compute,
                    PRECISION="tf32" if norm and dtype.itemsize == 2 else precision,
                )
                for ragged in (False, True) if dim == 128 else (False,):
                    last = constants | dict(Q_RAGGED=ragged, D_RAGGED=ragged)
                    label_d = case + (" varlen" if ragged else "")
                    options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
                    yield "grad_d_kernel", label_d, dtype, last, options


def compile_one(job) -> dict:
    arch, (kernel_name, label, dtype, constants, options) = job
    import triton.language as tl
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from latemax.kernels import backward, forward

    kernel = getattr(forward, kernel_name, None) or getattr(backward, kernel_name)
    types = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32, "fp64": tl.float64}
    constants = {k: types.get(v, v) if k in ("COMPUTE", "ACC") else v for k, v in constants.items()}
    acc = "fp64" if constants["ACC"] == tl.float64 else "fp32"
    half = TL[dtype]
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            plain = {
                "q_ptr": half,
                "d_ptr": half,
                "x_ptr": half,
                "argmax_ptr": "i32",
                "q_mask_ptr": "i1",
                "d_mask_ptr": "i1",
                # where none is given, argmax stands in
                "q_offsets_ptr": "i64" if constants.get("Q_RAGGED", True) else "i32",
                "owner_ptr": "i64" if constants.get("Q_RAGGED") else "i32",
                "d_offsets_ptr": "i64" if constants.get("D_RAGGED") else "i32",
                "candidates_ptr": "i64" if constants.get("CANDIDATES") else "i32",
            }
            grads = {"out_ptr": half if kernel_name in ("grad_d_kernel", "through_norm_kernel") else acc}
            signature[name] = "*" + (plain | grads).get(name, acc)
            attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp64" if name == "empty_score" else "i32"
    positions = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=positions, attrs=attrs)
    built = triton_compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    row = dict(arch=arch, kernel=kernel_name, case=label, **options, **inspect(built))
    if kernel_name == "forward_kernel":
        sizes = [constants[name] for name in ("BLOCK_Q", "BLOCK_D", "BLOCK_K", "SWAP")]
        tile = tiles.TileConfig(*sizes, options["num_warps"], options["num_stages"])
        row.update(tile=[*tile], dim=constants["DIM"])
        row["estimate"] = tiles.shared_bytes(tile, constants["DIM"], dtype.itemsize)
    return row


def inspect(built) -> dict:
    """Registers, spills, shared memory and the hottest loop of a compiled kernel."""
    import triton

    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    loop = hottest_loop(sass)
    names = collections.Counter(
        m[1].split(".")[0] for line in loop if (m := re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", line))
    )
    return dict(
        registers=registers, spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)), shared=built.metadata.shared,
        wgmma=len(re.findall(r"\bHGMMA", sass)), mma=len(re.findall(r"\b[HD]MMA", sass)),
        utcmma=len(re.findall(r"\bUTC\w*MMA", sass)),
        loop=len(loop), loop_mma=sum(n for name, n in names.items() if "MMA" in name),
        vector_loads=len(re.findall(r"LDG\S*\.128|LDGSTS\S*\.128", sass)),
    )  # fmt: skip


def hottest_loop(sass: str) -> list[str]:
    """The shortest backward-branch body that holds a matrix instruction (or, without any, a load)."""
    labels: dict[str, int] = {}
    body: list[str] = []
    for line in sass.splitlines():
        if m := re.match(r"\s*(\.L_x_\d+):", line):
            labels[m[1]] = len(body)
        if re.search(r"/\*[0-9a-f]{4,5}\*/", line):
            body.append(line)
    loops = []
    for n, line in enumerate(body):
        m = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if m and labels.get(m[1], n) < n:
            loops.append(body[labels[m[1]] : n + 1])
    with_mma = [loop for loop in loops if any("MMA" in line for line in loop)]
    return min(with_mma or [loop for loop in loops if any("LDG" in line for line in loop)] or [[]], key=len)


def table(arches) -> list[dict]:
    # one process a core, each with a fresh import of triton: the interpreter must be off to compile
    environment = os.environ.pop("TRITON_INTERPRET", None)
    try:
        jobs = [(arch, variant) for arch in arches for variant in variants(arch)]
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
            return list(pool.map(compile_one, jobs, chunksize=1))
    finally:
        if environment is not None:
            os.environ["TRITON_INTERPRET"] = environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--json", help="also write the rows there")
    options = parser.parse_args()
    rows = table(options.arch)
    names = (
        "arch",
        "kernel",
        "case",
        "registers",
        "spills",
        "shared",
        "wgmma",
        "mma",
        "utcmma",
        "loop",
        "vector_loads",
    )
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(str(row[name]) for name in names) + " |")
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
