"""A Triton driver that compiles for a GPU which is not here and launches nothing.

With it the whole host path of a call can be run, timed and inspected on any machine: argument checks, choice of tile,
compilation, the launch itself up to the driver call, and the arguments that call would have got.
"""

from __future__ import annotations

import types

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class NullDriver:
    """Installs itself as triton's active driver; ``launches`` counts, ``last`` holds (kernel name, grid, arguments),
    ``given`` the stream and the hooks of the last launch; ``stream`` is the current one."""

    def __init__(self, arch: int = 90):
        self.arch, self.launches, self.last, self.given, self.stream = arch, 0, None, None, 0
        self.utils = types.SimpleNamespace(
            load_binary=lambda name, *_: (object(), name, 0, 0, 1024),
            unload_module=lambda _: None,
            get_device_properties=lambda _: dict(
                max_shared_mem=232448, multiprocessor_count=132, warpSize=32, max_num_regs=65536
            ),
        )
        driver.set_active(self)

    def launcher_cls(self, source, metadata):
        def run(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            self.launches += 1
            self.last, self.given = (function, (x, y, z), arguments), (stream, enter, leave)

        return run

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return self.stream

    def get_device_capability(self, device):
        return divmod(self.arch, 10)

    def get_active_torch_device(self):
        return torch.device("cpu")
