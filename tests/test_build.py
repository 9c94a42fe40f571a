"""The wheel and the source distribution, made from a clean copy and used outside the checkout."""

import email
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = ROOT / "tests" / "programs"
# Without PYTHONPATH, which may name the checkout or other libraries, and without the caller's toolkit and switches.
CLEAN_ENV = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("PYTHON", "LATEMAX_")) and name not in ("CUDA_HOME", "CUDA_PATH")
}


def run(*command, env=None, timeout=120, **options):
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=CLEAN_ENV | (env or {}),
        timeout=timeout,
        **options,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def build_wheel(source, out):
    """`pip wheel` with an empty PATH (no compiler, no nvcc) and no network; returns the wheel and what pip printed."""
    out.mkdir()
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--verbose", "--wheel-dir", out]
    printed = run(sys.executable, "-m", "pip", "wheel", *options, source, env={"PATH": ""})
    (wheel,) = out.iterdir()
    return wheel, printed


def members(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what a commit of the working tree would hold: tracked files and new ones that git does not ignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to list the project's files")
    copy = tmp_path_factory.mktemp("source") / "latemax"
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    for name in filter(None, names):
        if os.path.lexists(ROOT / name):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    return copy


@pytest.fixture(scope="module")
def kernels(source):
    names = {path.name for path in (source / "kernels").glob("*.py")}
    assert names
    return names


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    """The source distribution, unpacked."""
    out = tmp_path_factory.mktemp("sdist")
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, out, cwd=source)
    (archive,) = out.iterdir()
    shutil.unpack_archive(archive, out)
    return out / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    return build_wheel(source, tmp_path_factory.mktemp("wheel") / "out")


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The python of a fresh virtual environment with the wheel, which finds torch in the running environment."""
    home = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(home, with_pip=False)
    scripts, site = (
        Path(sysconfig.get_path(key, "venv", {"base": str(home), "platbase": str(home)}))
        for key in ("scripts", "purelib")
    )
    # A path named in a .pth file is searched last, and its own .pth files are not read: what makes the checkout
    # importable in the running environment has no effect here.
    here = dict.fromkeys(sysconfig.get_path(key) for key in ("purelib", "platlib"))
    (site / "running.pth").write_text("".join(f"{path}\n" for path in here))
    python = scripts / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", built[0])
    return python


def test_wheel_is_pure(built):
    wheel, _ = built
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not {name for name in members(wheel) if name.endswith((".so", ".pyd"))}


def test_one_line_says_why_the_wheel_is_pure(built):
    _, printed = built
    (line,) = (line for line in printed.splitlines() if line.strip().startswith("latemax: "))
    assert "pure Python wheel" in line


def test_wheel_contains_only_the_package(built, source, kernels):
    names = members(built[0])
    version = built[0].name.split("-")[1]
    assert {name.split("/")[0] for name in names} == {"latemax", f"latemax-{version}.dist-info"}
    package = {str(p.relative_to(source)) for p in (source / "latemax").rglob("*.py")}
    package = {name for name in package if not name.startswith("latemax/kernels/")}
    python = {name for name in names if name.endswith(".py")}
    assert python == package | {f"latemax/kernels/{name}" for name in kernels}
    assert {"latemax/py.typed", "latemax/viz/search_page.css", "latemax/viz/search_page.js"} <= names


def test_wheel_metadata(built):
    with zipfile.ZipFile(built[0]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    base = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in base) == ["numpy", "torch", "triton"]
    assert metadata["License-Expression"] == "Apache-2.0"
    extras = {"encoders", "viz", "demo", "store", "docs", "bench", "dev", "release"}
    assert extras <= set(metadata.get_all("Provides-Extra"))


def test_building_requires_no_torch():
    table = (ROOT / "pyproject.toml").read_text().split("[project]")[0]
    (requires,) = (line for line in table.splitlines() if line.startswith("requires"))
    assert "setuptools" in requires
    assert "torch" not in requires


def test_wheel_works_in_a_fresh_environment(installed, built, kernels, tmp_path):
    found = json.loads(run(installed, "-I", PROGRAMS / "installed.py", cwd=tmp_path))
    home = installed.parents[1]
    assert Path(found["file"]).is_relative_to(home)
    assert Path(found["kernels"]).is_relative_to(home)
    assert {path.name for path in Path(found["kernels"]).glob("*.py")} == kernels
    assert found["version"] == built[0].name.split("-")[1]
    # 1·3 for the first query token, 2·4 for the second
    assert found["score"] == 11.0


def test_command_works_in_a_fresh_environment(installed, tmp_path):
    info = json.loads(run(installed.with_name("latemax"), "info", "--json", cwd=tmp_path))
    assert Path(info["latemax"]["location"]).is_relative_to(installed.parents[1])
    assert info["backends"]["cpu"]["usable"]


def test_sdist_is_complete(sdist, source, kernels):
    for folder in ("csrc", "kernels", "tests", "requirements", "benchmarks", "examples"):
        files = {str(p.relative_to(source)) for p in (source / folder).rglob("*") if p.is_file()}
        assert files == {str(p.relative_to(sdist)) for p in (sdist / folder).rglob("*") if p.is_file()}
    assert {"csrc/maxsim.h", "pyproject.toml", "setup.py", "LICENSE", "Makefile", ".ci/run"} <= {
        str(path.relative_to(sdist)) for path in sdist.rglob("*")
    }
    assert not (sdist / "latemax" / "kernels").exists()


def test_sdist_makes_the_same_wheel(sdist, built, tmp_path):
    wheel, _ = build_wheel(sdist, tmp_path / "out")
    assert members(wheel) == members(built[0])
