"""Packages of latemax; all metadata is in pyproject.toml.

`kernels/` is installed as `latemax.kernels`: the top-level name `kernels` belongs to another package.

LATEMAX_BUILD_CPU: unset = the native CPU kernels are built if there is a C++ compiler, 1 = built or the build fails,
0 = not built. LATEMAX_BUILD_CUDA: the same for the CUDA kernels and nvcc (12.5 or later; a C++ compiler too). Neither
needs torch. Without both the wheel is pure Python.
"""

import concurrent.futures
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

COMMON = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra"]
# GCC 12 warns about its own headers (-Wmaybe-uninitialized) and about vector arguments of inlined functions (-Wpsabi)
COMMON += ["-Wno-psabi", "-Wno-maybe-uninitialized"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
AMX = [*AVX512, "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
# each level is compiled for its own instructions and chosen at run time; all other files run on any processor
LEVELS = {
    "level_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "level_avx512": AVX512,
    "level_avx512_bf16": [*AVX512, "-mavx512bf16"],
    "codes_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "codes_avx512": AVX512,
    "codes_avx512_vnni": [*AVX512, "-mavx512vnni", "-mavx512vpopcntdq"],
    "codes_amx_int8": AMX,
    "level_amx_bf16": AMX,
}


# Each file is compiled for the chips of its kernels: only sm_90a has wgmma. Chips without a file of their own run the
# sm_80 kernel, later ones from its PTX.
SM80 = ["arch=compute_80,code=sm_80", "arch=compute_80,code=compute_80"]
SM90 = ["arch=compute_90,code=sm_90"]
CUDA_TARGETS = {
    "sm80": SM80,
    "sm90": ["arch=compute_90a,code=sm_90a"],
    "shared": [*SM80, *SM90],
    "backward": [*SM80, *SM90],
    "forward": SM80[:1],
}
CUDA = ["-std=c++17", "-O3", "--threads=1", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Icsrc/cuda/device"]


def wanted(name: str) -> str:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0, 1 or unset; got {value!r}")
    return value


def no_compiler() -> str:
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    if not shutil.which(compiler[0]):
        return f"there is no C++ compiler ({compiler[0]})"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python.h is not there (package python3-dev or the like)"
    return ""


def why_not_cpu() -> str:
    """Why the native CPU kernels are not built; empty if they are."""
    asked = wanted("LATEMAX_BUILD_CPU")
    if asked:
        return "LATEMAX_BUILD_CPU=0" if asked == "0" else ""
    if sys.platform not in ("linux", "darwin"):
        return f"they are not built on {sys.platform}"
    return no_compiler()


def toolkit() -> Path | None:
    """The CUDA toolkit's folder: CUDA_HOME, or the one of the nvcc on PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return Path(home) if (Path(home) / "bin" / "nvcc").exists() else None
    found = shutil.which("nvcc")
    if not found:
        return None
    # nvcc on PATH may be a script: its dry run prints the toolkit's folder
    printed = subprocess.run([found, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", printed.stderr, re.MULTILINE)
    return Path(top[1]).resolve() if top else Path(found).resolve().parents[1]


def why_not_cuda() -> str:
    """Why the CUDA kernels are not built; empty if they are."""
    asked = wanted("LATEMAX_BUILD_CUDA")
    if asked == "0":
        return "LATEMAX_BUILD_CUDA=0"
    reason = "" if sys.platform == "linux" else f"they are not built on {sys.platform}"
    home = None if reason else toolkit()
    if not reason and home is None:
        reason = "there is no CUDA toolkit (nvcc on PATH, or CUDA_HOME)"
    if not reason:
        printed = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
        version = re.search(r"release (\d+)\.(\d+)", printed)
        if version and (int(version[1]), int(version[2])) < (12, 5):
            reason = f"nvcc {version[1]}.{version[2]} is older than 12.5"
    if not reason and not cudart(home):
        reason = f"there is no libcudart_static.a in {home}"
    reason = reason or no_compiler()
    if reason and asked == "1":
        raise SystemExit(f"LATEMAX_BUILD_CUDA=1: {reason}")
    return reason


def cudart(home: Path) -> Path | None:
    folders = (home / "lib64", home / "lib", *home.glob("targets/*/lib"))
    return next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)


class Build(build):
    def run(self):
        super().run()
        built = {ext.name for ext in self.distribution.ext_modules or () if not getattr(ext, "failed", False)}
        reasons = {"_cpu": why_not_cpu(), "_cuda": why_not_cuda()}
        lost = [name for name in reasons if f"latemax.ops.{name}" not in built]
        said = {name: reasons[name] or "the compiler failed, see above" for name in lost}
        if len(lost) == 2:
            print(
                "latemax: pure Python wheel, without the native CPU kernels and the CUDA kernels: "
                f"{said['_cpu']}; {said['_cuda']}; torch serves the CPU, Triton the GPU"
            )
        elif lost:
            kind, server = {"_cpu": ("native CPU", "torch"), "_cuda": ("CUDA", "Triton")}[lost[0]]
            print(f"latemax: wheel without the {kind} kernels: {said[lost[0]]}; {server} serves")


class BuildExt(build_ext):
    def build_extension(self, ext):
        try:
            if ext.name.endswith("_cuda"):
                self.compile_cuda(ext)
            self.compile_cpu(ext)
        except Exception as error:
            if not ext.optional:
                raise
            ext.failed = True
            print(f"latemax: {ext.name} could not be built: {error}")

    def compile_cpu(self, ext):
        one = self.compiler._compile

        def compile_with_flags(obj, src, suffix, cc_args, postargs, pp_opts):
            extra = LEVELS.get(Path(src).stem, []) if platform.machine() in ("x86_64", "AMD64") else []
            try:
                return one(obj, src, suffix, cc_args, [*postargs, *extra], pp_opts)
            except CompileError:
                # GCC before 11 lacks the flags: compiled without them, these files are empty
                if extra != AMX:
                    raise
                return one(obj, src, suffix, cc_args, postargs, pp_opts)

        self.compiler._compile = compile_with_flags
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = one

    def compile_cuda(self, ext):
        """Compiles the .cu files, one per core at a time. Links the static runtime, so that the library loads without a
        toolkit or a driver."""
        home, folder = toolkit(), Path(self.build_temp) / "csrc" / "cuda"
        folder.mkdir(parents=True, exist_ok=True)

        def compile_one(name: str) -> str:
            out = folder / f"{name}.o"
            targets = [part for target in CUDA_TARGETS[name] for part in ("-gencode", target)]
            command = [str(home / "bin" / "nvcc"), *CUDA, *targets, "-c", f"csrc/cuda/{name}.cu", "-o", str(out)]
            print(" ".join(command))
            subprocess.run(command, check=True)
            return str(out)

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects = list(pool.map(compile_one, CUDA_TARGETS))
        ext.library_dirs = [str(cudart(home))]


def extensions() -> list[Extension]:
    macros = [("Py_LIMITED_API", "0x030A0000")]
    shared = ["csrc/maxsim.h", "csrc/binding.h"]
    found = []
    if not why_not_cpu():
        found.append(
            Extension(
                "latemax.ops._cpu",
                sources=["csrc/binding_cpu.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))],
                depends=[
                    *shared,
                    "csrc/binding_items.h",
                    *sorted(str(path) for path in Path("csrc/cpu").glob("*.h")),
                ],
                define_macros=macros,
                extra_compile_args=COMMON,
                language="c++",
                py_limited_api=True,
                # if the compiler fails, torch serves the CPU, unless the build was requested
                optional=wanted("LATEMAX_BUILD_CPU") != "1",
            )
        )
    if not why_not_cuda():
        found.append(
            Extension(
                "latemax.ops._cuda",
                sources=["csrc/binding_cuda.cpp"],
                depends=[
                    *shared,
                    *sorted(str(path) for path in Path("csrc/cuda").rglob("*.*")),
                ],
                define_macros=macros,
                extra_compile_args=COMMON,
                libraries=["cudart_static", "pthread", "dl", "rt"],
                language="c++",
                py_limited_api=True,
                optional=wanted("LATEMAX_BUILD_CUDA") != "1",
            )
        )
    return found


native = extensions()
setup(
    packages=[*find_packages(include=["latemax", "latemax.*"]), "latemax.kernels"],
    package_dir={"latemax.kernels": "kernels"},
    # the tile table
    package_data={"": ["*.json", "*.css", "*.js"]},
    cmdclass={"build": Build, "build_ext": BuildExt},
    ext_modules=native,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if native else {},
)
