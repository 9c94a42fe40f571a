"""The one registry of benchmark shapes: what is timed, its work and its traffic."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Shape(NamedTuple):
    n_q: int
    n_d: int  # candidates of each query where ``own``
    l_q: int
    l_d: int
    dim: int = 128
    dtype: str = "bfloat16"
    own: bool = False
    masked: bool = False  # document lengths drawn from U[l_d / 32, l_d], given as a mask
    normalize: bool = False
    argmax: bool = False  # the winners are returned too, by latemax; the others have no such output

    @property
    def name(self) -> str:
        flags = [name for name in ("own", "masked", "normalize", "argmax") if getattr(self, name)]
        return f"({self.n_q},{self.n_d},{self.l_q},{self.l_d}) {self.dim} {self.dtype} " + " ".join(flags)

    @property
    def documents(self) -> int:
        return self.n_d * (self.n_q if self.own else 1)

    @property
    def flops(self) -> int:
        """Of the similarities, forward: padding counted, as every contender without ragged support computes it."""
        return 2 * self.n_q * self.n_d * self.l_q * self.l_d * self.dim

    @property
    def bytes(self) -> int:
        """Of inputs and scores, each once."""
        size = getattr(torch, self.dtype).itemsize
        return size * self.dim * (self.n_q * self.l_q + self.documents * self.l_d) + 4 * self.n_q * self.n_d

    def tiny(self) -> Shape:
        """The same case at a size that a CPU runs in milliseconds: for rehearsals."""
        return self._replace(
            n_q=min(self.n_q, 3), n_d=min(self.n_d, 4), l_q=min(self.l_q, 40), l_d=min(self.l_d, 70)
        )  # fmt: skip

    def tensors(self, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Unit tokens q and d, and d_mask where ``masked``."""
        generator = torch.Generator(device).manual_seed(0)
        dtype = getattr(torch, self.dtype)

        def unit(*shape):
            x = torch.empty(shape, device=device, dtype=dtype).normal_(generator=generator)
            return torch.nn.functional.normalize(x, dim=-1)

        q = unit(self.n_q, self.l_q, self.dim)
        d = unit(*((self.n_q,) if self.own else ()), self.n_d, self.l_d, self.dim)
        if not self.masked:
            return q, d, None
        shortest = max(1, self.l_d // 32)
        lengths = torch.randint(shortest, self.l_d + 1, d.shape[:-2], device=device, generator=generator)
        return q, d, torch.arange(self.l_d, device=device) < lengths.unsqueeze(-1)


CORE = [
    Shape(1, 1000, 32, 300),
    Shape(1, 1000, 32, 1024),
    Shape(1, 10_000, 32, 1024),
    Shape(1, 100_000, 32, 196),
    Shape(1, 1000, 1024, 1024),
    Shape(32, 32, 32, 300),
    Shape(128, 128, 32, 300),
    Shape(16, 16, 1030, 1030),
    Shape(64, 64, 768, 512),
    Shape(256, 256, 32, 300),
    Shape(256, 16, 32, 1030, own=True),
]
VARIANTS = [
    # ragged: lengths U[32, 1024]
    Shape(1, 1000, 32, 1024, masked=True),
    Shape(128, 128, 32, 300, masked=True),
    Shape(1, 1000, 1024, 1024, normalize=True),
    Shape(1, 10_000, 32, 1024, normalize=True),
    Shape(128, 128, 32, 300, normalize=True),
    Shape(1, 1000, 1024, 1024, argmax=True),
    Shape(128, 128, 32, 300, argmax=True),
    *(Shape(128, 128, 32, 300, dim) for dim in (64, 96, 256, 768)),
    *(Shape(128, 128, 32, 300, dtype=dtype) for dtype in ("float16", "float32")),
]
# forward and backward
TRAIN = [
    Shape(32, 32, 32, 300),
    Shape(256, 256, 32, 300),
    Shape(256, 16, 32, 1030, own=True),
    Shape(64, 64, 1030, 1030),
]
CPU = [
    *(Shape(1, 1000, l_q, 512, dtype="float32") for l_q in (8, 32)),
    Shape(1, 200, 128, 1024, dtype="float32"),
    Shape(1, 1000, 32, 196, dtype="bfloat16"),
    Shape(1, 200, 32, 512, dtype="float32", masked=True),
    Shape(8, 100, 32, 196, dtype="float32", normalize=True),
]
CPU_TRAIN = [Shape(16, 16, 32, 196, dtype="float32")]
