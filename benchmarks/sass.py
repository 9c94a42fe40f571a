"""Counts in the machine code of compiled kernels, by the tools that triton carries."""

from __future__ import annotations

import pathlib
import re
import subprocess
from typing import Any

# 16 lanes a clock in each quarter of a multiprocessor, so that a warp's instruction takes 2 clocks; integer and
# floating-point multiplication and addition (IMAD, FFMA) and uniform instructions (UIADD3) have units of their own
ALU = {"FMNMX", "FSETP", "FSEL", "ISETP", "SEL", "IADD3", "VIADD", "LEA", "LOP3", "PLOP3", "SHF", "PRMT", "P2R", "MOV"}


def tool(name: str, *arguments: str | pathlib.Path, **options: Any) -> str:
    """What triton's cuobjdump or nvdisasm prints."""
    import triton

    path = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True, **options).stdout


def resource_usage(binary: str | pathlib.Path) -> str:
    return tool("cuobjdump", "--dump-resource-usage", binary)


def disassembly(cubin: str | pathlib.Path) -> str:
    return tool("nvdisasm", "-c", cubin)


def count(instruction: str, sass: str) -> int:
    """Instructions whose name matches a pattern."""
    return len(re.findall(rf"\b{instruction}", sass))


def opcodes(lines: list[str]) -> list[str]:
    """The instruction of each line, without predicate and modifiers."""
    found = (re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", line) for line in lines)
    return [match[1] for match in found if match]


def alu(lines: list[str]) -> int:
    """Instructions for the pipe that takes maxima and selections."""
    return sum(name in ALU for name in opcodes(lines))


def spills(sass: str) -> int:
    return count(r"(?:STL|LDL)\b", sass)


def hottest_loop(sass: str) -> list[str]:
    """The shortest loop body that holds a matrix instruction (or, without any, a load)."""
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
