"""Packages of latemax; all metadata is in pyproject.toml.

`kernels/` is installed as `latemax.kernels`: the top-level name `kernels` belongs to another package.

LATEMAX_BUILD_CPU: unset = the native CPU kernels are built if a C++ compiler is there, 1 = built or the build fails,
0 = left out. Without them the wheel is pure Python.
"""

import os
import platform
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

WANTED = os.environ.get("LATEMAX_BUILD_CPU", "")
COMMON = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra"]
# GCC 12 warns about its own headers (-Wmaybe-uninitialized) and about vectors as arguments of what is inlined (-Wpsabi)
COMMON += ["-Wno-psabi", "-Wno-maybe-uninitialized"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
# each level is compiled for its own instructions and chosen at run time; everything else for any processor
LEVELS = {
    "level_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "level_avx512": AVX512,
    "level_avx512_bf16": [*AVX512, "-mavx512bf16"],
}


def why_not() -> str:
    """Why the native CPU kernels are not built; empty if they are."""
    if WANTED not in ("", "0", "1"):
        raise SystemExit(f"LATEMAX_BUILD_CPU must be 0, 1 or unset; got {WANTED!r}")
    if WANTED == "0":
        return "LATEMAX_BUILD_CPU=0"
    if WANTED == "1":
        return ""
    if sys.platform not in ("linux", "darwin"):
        return f"they are not built on {sys.platform}"
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    if not shutil.which(compiler[0]):
        return f"there is no C++ compiler ({compiler[0]})"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python.h is not there (package python3-dev or the like)"
    return ""


class Build(build):
    def run(self):
        super().run()
        reason = why_not()
        if reason:
            print(f"latemax: pure Python wheel, without the native CPU kernels: {reason}; torch serves the CPU")


class BuildExt(build_ext):
    def build_extension(self, ext):
        one = self.compiler._compile

        def compile_with_flags(obj, src, suffix, cc_args, postargs, pp_opts):
            extra = LEVELS.get(Path(src).stem, []) if platform.machine() in ("x86_64", "AMD64") else []
            return one(obj, src, suffix, cc_args, [*postargs, *extra], pp_opts)

        self.compiler._compile = compile_with_flags
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = one


def extensions() -> list[Extension]:
    if why_not():
        return []
    return [
        Extension(
            "latemax.ops._cpu",
            sources=["csrc/binding_cpu.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))],
            depends=["csrc/maxsim.h", *sorted(str(path) for path in Path("csrc/cpu").glob("*.h"))],
            define_macros=[("Py_LIMITED_API", "0x030A0000")],
            extra_compile_args=COMMON,
            language="c++",
            py_limited_api=True,
            # a compiler that cannot build them leaves the torch path, unless they were asked for
            optional=WANTED != "1",
        )
    ]


native = extensions()
setup(
    packages=[*find_packages(include=["latemax", "latemax.*"]), "latemax.kernels"],
    package_dir={"latemax.kernels": "kernels"},
    cmdclass={"build": Build, "build_ext": BuildExt},
    ext_modules=native,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if native else {},
)
