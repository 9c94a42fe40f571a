"""A Triton driver that compiles for a GPU which is not here and launches nothing.

With it the whole host path of a call can be run, timed and inspected on any machine: argument checks, choice of tile,
compilation, the launch itself up to the driver call, and the arguments of that call.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Built(NamedTuple):
    """A kernel as it was loaded."""

    name: str
    cubin: bytes
    num_warps: int
    num_stages: int
    shared: int  # bytes


class NullDriver:
    """Installs itself as triton's active driver.

    ``launches`` counts, ``last`` holds (kernel name, grid, arguments), ``given`` the stream and the hooks of the last
    launch; ``stream`` is the current one; ``built`` lists the kernels loaded so far.
    """

    def __init__(self, arch: int = 90) -> None:
        self.arch, self.launches, self.last, self.given, self.stream = arch, 0, None, None, 0
        self.built: list[Built] = []
        self.metadata: Any = None
        self.utils = types.SimpleNamespace(
            load_binary=self.load_binary,
            unload_module=lambda _: None,
            get_device_properties=lambda _: dict(
                max_shared_mem=232448, multiprocessor_count=132, warpSize=32, max_num_regs=65536
            ),
        )
        driver.set_active(self)

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple:
        # triton asks for the launcher of a kernel first, then loads it
        self.built.append(Built(name, cubin, self.metadata.num_warps, self.metadata.num_stages, shared))
        return object(), name, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        self.metadata = metadata

        def run(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            self.launches += 1
            self.last, self.given = (function, (x, y, z), arguments), (stream, enter, leave)

        return run

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")
