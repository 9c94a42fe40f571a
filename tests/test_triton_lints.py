"""What the Triton kernels become on sm_90, from their TTGIR and SASS: copies that overlap products, and nothing that
costs more than the products themselves.

The builds are compiled now, in 10 s, with the installed triton. LATEMAX_OTHER_TRITON names a folder with another one
(``pip install --no-deps --target FOLDER triton==3.6.0``, which torch 2.11 comes with) for which the same must hold.
"""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("triton", reason="the kernels need triton")
from common import run_program

from benchmarks import sass

OTHER_TRITON = os.environ.get("LATEMAX_OTHER_TRITON", "")
FORWARD = ["l_q 32", "l_q 32 l_d 300", "l_q 32 argmax", "l_q 128", "l_q 128 argmax"]
KERNELS = [*FORWARD, "grad_d", "grad_q"]


class Compiled(NamedTuple):
    version: str
    log: str  # of ptxas
    ttgir: dict[str, str]  # by KERNELS
    sass: dict[str, str]
    usage: dict[str, dict[str, int]]  # registers, bytes of shared memory


@pytest.fixture(scope="module", params=["installed", *(["other"] if OTHER_TRITON else [])])
def compiled(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "other":
            patch.setenv("PYTHONPATH", OTHER_TRITON)
        version, log = run_program("compile_kernels", str(folder)).split("\n", 1)
    files = {name_of(path): path for path in folder.glob("*/*/*.ttgir")}
    assert sorted(files) == sorted(KERNELS)
    return Compiled(
        version, log, {name: path.read_text() for name, path in files.items()},
        {name: sass.disassembly(path.with_suffix(".cubin")) for name, path in files.items()},
        {name: usage_of(path) for name, path in files.items()},
    )  # fmt: skip


def usage_of(ttgir: Path) -> dict[str, int]:
    registers = re.search(r"REG:(\d+)", sass.resource_usage(ttgir.with_suffix(".cubin")))
    return dict(registers=int(registers[1]), shared=json.loads(ttgir.with_suffix(".json").read_text())["shared"])


def name_of(ttgir: Path) -> str:
    kernel = ttgir.stem.removesuffix("_kernel")
    return ttgir.parts[-3] if kernel == "forward" else kernel


def loops(ttgir: str) -> list[list[str]]:
    """The bodies of all loops. MLIR is printed with its nesting as indentation."""
    lines, found = ttgir.splitlines(), []
    for n, line in enumerate(lines):
        if re.search(r"scf\.(for|while)", line):
            close = line[: len(line) - len(line.lstrip())] + "}"
            body = lines[n + 1 :]
            found.append(body[: next(m for m, inner in enumerate(body) if inner.startswith(close))])
    return found


def products(lines: list[str]) -> int:
    return sum(bool(re.search(r"(warp_group_dot|tt\.dot) %", line)) for line in lines)


def waits(lines: list[str]) -> list[int]:
    """How many groups of copies may still be under way after each wait for one."""
    return [int(found[1]) for line in lines if (found := re.search(r"async_wait .*num = (\d+)", line))]


def loaded_tiles(lines: list[str]) -> list[str]:
    """Loads of 2-D tiles that go through registers and are waited for where they are."""
    return [line.strip() for line in lines if re.search(r"tt\.load .*: tensor<\d+x\d+x", line)]


@pytest.mark.parametrize("kernel", [*FORWARD, "grad_d"])
def test_copies_overlap_the_products_of_a_loop(compiled, kernel):
    found = [body for body in loops(compiled.ttgir[kernel]) if products(body)]
    for body in found:
        # Only innermost loops are pipelined: one around them starts each anew. The loop over query tokens inside the
        # one over queries had one trip at l_q <= 32, and nothing overlapped.
        assert not any("scf.for" in line or "scf.while" in line for line in body)
        assert not loaded_tiles(body)
    # The second loop of grad_d has the guard and runs only if a sum is NaN. Its rows wait for the argmax (num = 0).
    assert len(found) == (2 if kernel == "grad_d" else 1)
    # All copies of the next tile are under way at a wait for this one. With fewer, they start when the product is done:
    # 1150 clocks a block of grad_d instead of 235 issue slots.
    copies = sum("async_copy_global_to_local" in line for line in found[0])
    assert copies and waits(found[0]) and min(waits(found[0])) >= copies


@pytest.mark.parametrize("kernel", [*FORWARD, "grad_d"])
def test_few_products_are_peeled_off_a_loop(compiled, kernel):
    """A product outside a loop waits for its own tiles: in the forward the last tile of long documents, if not full."""
    ttgir = compiled.ttgir[kernel]
    outside = products(ttgir.splitlines()) - sum(products(body) for body in loops(ttgir))
    assert outside == (0 if kernel in ("grad_d", "l_q 32 l_d 300") else 1)


def test_four_programs_of_short_documents_share_a_multiprocessor(compiled):
    """Each has two tiles of 16 KB on the way, together 128 KB; 37 KB hide a latency of 1000 clocks at 4.8 TB/s."""
    usage = compiled.usage["l_q 32 l_d 300"]
    assert 4 * (usage["shared"] + 1024) <= 233472 and 4 * 128 * usage["registers"] <= 65536
    # all of the query tile is under way before the first part of it is waited for, and so are two document tiles
    code = compiled.sass["l_q 32 l_d 300"]
    order = [name for name in sass.opcodes(code.splitlines()) if name in ("LDG", "STS", "LDGSTS", "HGMMA")]
    first = order.index("HGMMA")
    assert order[:first] == ["LDG"] * 4 + ["STS"] * 4 + ["LDGSTS"] * 16


def test_grad_q_gathers_rows_of_three_documents_at_a_time(compiled):
    """Rows are loaded where the argmax says: two latencies in a row, 900 clocks a document if nothing overlaps."""
    (body,) = [body for body in loops(compiled.ttgir["grad_q"]) if "async_copy" in "".join(body)]
    assert not any(re.search(r"tt\.load .*: tensor<", line) for line in body)
    copies = sum("async_copy_global_to_local" in line for line in body)
    # two documents are under way while the oldest is added, then the third starts
    assert copies == 3 and min(waits(body)) >= 2 * copies


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_spills(compiled, kernel):
    assert sass.spills(compiled.sass[kernel]) == 0


def test_ptxas_does_not_warn(compiled):
    """C7510 and its kind: wgmma is serialized, since ptxas cannot keep accumulators in registers around it."""
    if compiled.version < "3.6":
        pytest.skip(f"triton {compiled.version} does not show ptxas's log")
    assert compiled.log.count("Compiling entry function") == len(KERNELS)
    assert not re.findall(r".*(?:warning|C75\d\d).*", compiled.log)


# tokens of a tile x dims of a tile / (64 x 16), in the loop and in the tail, or in the loop and with the guard
WGMMAS = {"l_q 32": 32, "l_q 32 l_d 300": 8, "l_q 32 argmax": 32, "l_q 128": 16, "l_q 128 argmax": 16, "grad_d": 4}


@pytest.mark.parametrize("kernel", WGMMAS)
def test_products_are_wgmma(compiled, kernel):
    assert sass.count("HGMMA", compiled.sass[kernel]) == WGMMAS[kernel]
    assert sass.count("HMMA", compiled.sass[kernel]) == 0


def wgmma_clocks(n: int) -> float:
    """m64 n k16 of half precision: 4096 FLOP a clock, and its operands, both in shared memory, 128 bytes a clock."""
    return max(2 * 64 * n * 16 / 4096, 2 * 16 * (64 + n) / 128)


@pytest.mark.parametrize("kernel", FORWARD)
def test_maxima_take_less_time_than_products(compiled, kernel):
    """Of 4 warps each has a quarter of the multiprocessor. One block takes maxima while another multiplies."""
    loop = sass.hottest_loop(compiled.sass[kernel])
    sizes = [int(found[1]) for line in loop if (found := re.search(r"HGMMA\.64x(\d+)x16", line))]
    assert len(sizes) == (8 if kernel == "l_q 32 l_d 300" else WGMMAS[kernel] / 2)
    tensor = sum(wgmma_clocks(n) for n in sizes)
    # of 4 warps each has a quarter of the multiprocessor, and an instruction takes 2 clocks
    alu = 2 * sass.alu(loop)
    # Without argmax one maximum an element and the addresses of copies: 41 % of the tensor clocks. With bounds in every
    # tile 184 clocks of 192, where 64 document tokens take 790 to arrive at 4.8 TB/s.
    assert alu <= tensor * (0.5 if kernel in ("l_q 32", "l_q 128") else 1), (alu, tensor)


def test_the_loop_of_grad_d_stays_short(compiled):
    """It is bound by issue slots: 128 tensor clocks, 252 instructions (triton 3.9; 249 with 3.6)."""
    assert len(sass.hottest_loop(compiled.sass["grad_d"])) <= 260
