"""Imports go one way: checked on the syntax trees of latemax/ and kernels/, and by importing in fresh processes."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from common import run_program

ROOT = Path(__file__).parents[1]

# A module may import what is on an earlier line, never its own line's other entries or a later line.
STACK = (
    ("latemax.kernels",),
    ("latemax.ops.backends.native", "latemax.ops.backends.decode"),
    ("latemax.ops.backends.gather", "latemax.ops.backends.triton_operands"),
    ("latemax.ops.backends.blocks", "latemax.ops.backends.reference", "latemax.ops.backends.triton_launch"),
    ("latemax.ops.backends.triton_bounds", "latemax.ops.backends.smooth_triton"),
    ("latemax.ops.backends.triton",),
    ("latemax.ops.backends.smooth", "latemax.ops.backends.bounds"),
    ("latemax.ops.backends.cuda",),
    ("latemax.ops.dispatch",),
    ("latemax.ops.operator",),
    ("latemax.ops.smooth", "latemax.ops.bounds"),
    ("latemax.arguments",),
    ("latemax.arguments.rows",),
    ("latemax.api", "latemax.warm"),
    ("latemax.module", "latemax.bounds"),
    ("latemax.search",),
    ("latemax.distributed",),
    ("latemax",),
)
# Import nothing of the project but themselves and earlier leaves; the stack may import them (encoders: only `latemax`).
LEAVES = (
    "latemax._progress",
    "latemax.reference",
    "latemax.arguments.arrays",
    "latemax.quantized",
    "latemax.ops",
    "latemax.ops.tiles",
    "latemax.ops.problem",
    "latemax.ops.backends",
    "latemax.ops.backends.base",
    "latemax.ops.backends.pointers",
    "latemax.store",
    "latemax.encoders",
)
# Imported only by those named; each may import the stack and the leaves (compat: only `latemax`, the store,
# arrays and rows).
# One may name another's types under TYPE_CHECKING, which imports nothing; below the tops that counts as an import too.
TOPS = {
    "latemax.analysis": ("latemax.demo", "latemax.cli"),
    "latemax.viz": ("latemax.demo", "latemax.cli"),
    "latemax.compat": (),
    "latemax.demo": ("latemax.cli",),
    "latemax.cli": ("latemax.ray",),
    "latemax.ray": (),
}
LEVEL = {name: level for level, names in enumerate(STACK) for name in names}
LAYERS = {*LEVEL, *LEAVES, *TOPS}
PACKAGES = ("latemax", "latemax.ops", "latemax.ops.backends")

OPTIONAL = {
    "PIL",
    "colpali_engine",
    "faiss",
    "fastembed",
    "ir_measures",
    "lancedb",
    "matplotlib",
    "mteb",
    "onnx",
    "open_clip",
    "pyarrow",
    "pylate",
    "pypdfium2",
    "qdrant_client",
    "ray",
    "safetensors",
    "sentence_transformers",
    "skimage",
    "sklearn",
    "timm",
    "torchvision",
    "tqdm",
    "transformers",
    "vllm",
}


class Import(NamedTuple):
    """One imported name: what it resolves to, where, and when: with the "file", in a "call", only for "typing"."""

    target: str
    line: int
    when: str


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of latemax/ and of kernels/ under the name it is installed by."""
    found = {}
    for folder, name in ((root / "latemax", "latemax"), (root / "kernels", "latemax.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if name == "latemax" and parts[0] == "kernels":
                continue
            found[".".join((name, *parts)).removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> Iterator[Import]:
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    nodes = [(ast.parse(path.read_text(), str(path)), "file")]
    while nodes:
        node, when = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, when) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield Import(inner if inner in known else source, node.lineno, when)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            nodes += [(child, "typing") for child in node.body] + [(child, when) for child in node.orelse]
        else:
            called = when == "file" and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            nodes += [(child, "call" if called else when) for child in ast.iter_child_nodes(node)]


def layer_of(name: str) -> str | None:
    """The longest listed prefix; `latemax`, `latemax.ops` and `latemax.ops.backends` mean only their __init__.py."""
    if name in LAYERS:
        return name
    parts = name.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
    return next((p for p in prefixes if p in LAYERS and p not in PACKAGES), None)


def may_import(source: str, target: str, when: str) -> bool:
    """May the layer `source` import the layer `target`?"""
    if source == target:
        return True
    if target in TOPS:
        # The package hands its own tops out on demand.
        by_type = source in TOPS and when == "typing"
        return source in TOPS[target] or by_type or (source == "latemax" and when != "file")
    if source in LEAVES and target in LEAVES:
        # arrays are taken wherever tensors are, and a store keeps codes
        if target == "latemax.arguments.arrays" or (source, target) == ("latemax.store", "latemax.quantized"):
            return True
        in_ops = source.startswith("latemax.ops") and target.startswith("latemax.ops")
        return in_ops and LEAVES.index(target) < LEAVES.index(source)
    if source in LEAVES or source == "latemax.kernels":
        return False
    if target == "latemax.kernels":
        return source in ("latemax.ops.backends.triton_launch", "latemax.ops.backends.smooth_triton")
    if source == "latemax.compat":
        return target in ("latemax", "latemax.store", "latemax.arguments.arrays", "latemax.arguments.rows")
    if target == "latemax.encoders":
        return source in TOPS or (source == "latemax" and when != "file")
    return source in TOPS or target in LEAVES or LEVEL[target] < LEVEL[source]


def violations(root: Path) -> list[str]:
    files = modules(root)
    found, graph = [], {}
    for name, path in sorted(files.items()):
        source = layer_of(name)
        if source is None:
            found.append(f"{name} has no layer: give it one in tests/test_layers.py")
        for target, line, when in imports(name, path, set(files)):
            at, top = f"{path.relative_to(root)}:{line}", target.split(".")[0]
            if top == "kernels":
                found.append(f"{at} imports {target}: it is called latemax.kernels")
            elif source == "latemax.kernels" and top not in ("triton", "latemax", "typing", "__future__"):
                found.append(f"{at} imports {target}: kernels import only triton and latemax.kernels")
            elif top in OPTIONAL and when == "file":
                found.append(f"{at} imports {target} with the file: import it in the function that needs it")
            if top != "latemax":
                continue
            if when == "file" and target != name:
                graph.setdefault(name, set()).add(target)
            layer = layer_of(target)
            if source is not None and layer is not None and not may_import(source, layer, when):
                found.append(f"{at} imports {target}: {source} may not import {layer}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"import cycle: {' <- '.join(error.args[1])}")
    return list(dict.fromkeys(found))


def test_the_project_keeps_its_layers():
    found = violations(ROOT)
    assert not found, "\n".join(found)


def test_the_project_is_checked():
    files = modules(ROOT)
    assert {"latemax", "latemax.api", "latemax.ops.backends.triton_launch", "latemax.kernels.forward"} <= set(files)
    drawn = {
        (layer_of(name), layer_of(target))
        for name, path in files.items()
        for target, _, _ in imports(name, path, set(files))
    }
    assert ("latemax.ops.backends.triton_launch", "latemax.kernels") in drawn


GOOD = {
    "kernels/common.py": "import triton",
    "kernels/forward.py": "import triton.language as tl\nfrom latemax.kernels.common import triton",
    "latemax/__init__.py": "from latemax.api import maxsim\ndef __getattr__(name):\n    from latemax import encoders",
    "latemax/reference.py": "import torch",
    "latemax/ops/__init__.py": "",
    "latemax/ops/problem.py": "import torch",
    "latemax/ops/tiles.py": "",
    "latemax/ops/backends/__init__.py": "",
    "latemax/ops/backends/base.py": "from latemax.ops.problem import x",
    "latemax/ops/backends/triton_launch.py": "from latemax.kernels import forward\nfrom latemax.ops.tiles import fits",
    "latemax/ops/backends/triton.py": "def f():\n    from latemax.ops.backends import triton_launch",
    "latemax/ops/dispatch.py": "from latemax.ops.backends import triton",
    "latemax/ops/operator.py": "from . import dispatch",
    "latemax/arguments/__init__.py": "",
    "latemax/arguments/check.py": "from latemax.ops.problem import x",
    "latemax/api.py": "from latemax.arguments.check import x\nfrom latemax.ops.operator import y",
    "latemax/module.py": "from latemax.api import maxsim",
    "latemax/encoders/__init__.py": "from .hf import x",
    "latemax/encoders/hf.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import timm",
    "latemax/analysis/__init__.py": "from latemax import maxsim",
    "latemax/compat/__init__.py": "from latemax import maxsim",
    "latemax/viz/__init__.py": "if TYPE_CHECKING:\n    import latemax.analysis\ndef plot():\n    import matplotlib",
    "latemax/demo/__init__.py": "import latemax.analysis\nfrom latemax import viz",
    "latemax/cli/__init__.py": "def demo():\n    from latemax.demo import run",
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "latemax" / "kernels").symlink_to("../kernels")
    return root


def test_a_good_tree_passes(tmp_path):
    assert violations(plant(tmp_path, GOOD)) == []


# In the good tree, this file says this instead.
BAD = {
    "backwards": ("latemax/ops/dispatch.py", "from latemax.api import maxsim", "dispatch may not import latemax.api"),
    "relative": ("latemax/ops/dispatch.py", "from .operator import x", "dispatch may not import latemax.ops.operator"),
    "in-a-function": (
        "latemax/ops/backends/triton_launch.py",
        "def f():\n    from latemax.ops import dispatch",
        "triton_launch may not import latemax.ops.dispatch",
    ),
    "typing-only": (
        "latemax/ops/dispatch.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from latemax.module import MaxSim",
        "dispatch may not import latemax.module",
    ),
    "backend-to-backend": (
        "latemax/ops/backends/native.py",
        "from latemax.ops.backends import triton",
        "native may not import latemax.ops.backends.triton",
    ),
    "past-the-backend": ("latemax/api.py", "import latemax.kernels.forward", "api may not import latemax.kernels"),
    "the-root": ("latemax/ops/operator.py", "from latemax import maxsim", "operator may not import latemax"),
    "leaf": ("latemax/reference.py", "from .arguments import check", "reference may not import latemax.arguments"),
    "encoders-to-ops": (
        "latemax/encoders/hf.py",
        "def f():\n    from latemax.ops import tiles",
        "encoders may not import latemax.ops.tiles",
    ),
    "compat-to-ops": ("latemax/compat/__init__.py", "import latemax.api", "compat may not import latemax.api"),
    "encoders-at-import": ("latemax/__init__.py", "from .encoders import x", "latemax may not import latemax.encoders"),
    "top-imported": ("latemax/api.py", "def f():\n    import latemax.viz.x", "api may not import latemax.viz"),
    "top-to-top": ("latemax/viz/__init__.py", "from latemax import analysis", "viz may not import latemax.analysis"),
    "top-in-a-call": (
        "latemax/viz/__init__.py",
        "def plot():\n    import latemax.analysis",
        "viz may not import latemax.analysis",
    ),
    "cli-imported": ("latemax/demo/__init__.py", "from latemax import cli", "demo may not import latemax.cli"),
    "kernel-torch": (
        "kernels/forward.py",
        "import torch",
        "kernels/forward.py:1 imports torch: kernels import only triton",
    ),
    "kernel-up": (
        "kernels/forward.py",
        "from latemax.ops import tiles",
        "latemax.kernels may not import latemax.ops.tiles",
    ),
    "kernels-name": ("latemax/ops/backends/triton_launch.py", "import kernels.forward", "it is called latemax.kernels"),
    "optional": ("latemax/viz/__init__.py", "import matplotlib.pyplot", "imports matplotlib.pyplot with the file"),
    "optional-tried": (
        "latemax/encoders/hf.py",
        "try:\n    from transformers import X\nexcept ImportError:\n    X = None",
        "hf.py:2 imports transformers with the file",
    ),
    "optional-in-class": ("latemax/module.py", "class A:\n    import PIL", "imports PIL with the file"),
    "optional-untyped": (
        "latemax/viz/__init__.py",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import tqdm",
        "imports tqdm with the file",
    ),
    "cycle": ("latemax/encoders/hf.py", "from latemax.encoders import y", "import cycle: latemax.encoders"),
    "unlisted": ("latemax/ops/extra.py", "", "latemax.ops.extra has no layer"),
}


@pytest.mark.parametrize(("name", "text", "message"), BAD.values(), ids=BAD)
def test_a_bad_tree_fails(name, text, message, tmp_path):
    found = violations(plant(tmp_path, {**GOOD, name: text}))
    assert any(message in violation for violation in found), found


def test_importing_asks_no_gpu_and_loads_nothing_optional():
    run_program("import_latemax", *sorted(OPTIONAL))


def test_the_cpu_needs_no_triton():
    run_program("without_triton")
