"""Packages of latemax; all metadata is in pyproject.toml.

`kernels/` is installed as `latemax.kernels`: the top-level name `kernels` belongs to another package.
"""

from setuptools import find_packages, setup
from setuptools.command.build import build


class Build(build):
    def run(self):
        super().run()
        print("latemax: pure Python wheel: csrc/ has no native kernels to build yet; Triton serves CUDA, torch the CPU")


setup(
    packages=[*find_packages(include=["latemax", "latemax.*"]), "latemax.kernels"],
    package_dir={"latemax.kernels": "kernels"},
    cmdclass={"build": Build},
)
