"""The one registry of what is measured: shapes, their work and their traffic."""

from __future__ import annotations

from typing import NamedTuple

import torch

# lengths of masked documents are drawn from U[l_d / SHORTEST, l_d]
SHORTEST = 32


def unit(*shape: int, generator: torch.Generator, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Random unit tokens."""
    x = torch.empty(shape, device=device, dtype=dtype).normal_(generator=generator)
    return torch.nn.functional.normalize(x, dim=-1)


class Shape(NamedTuple):
    """Dense queries and documents."""

    n_q: int
    n_d: int  # candidates of each query if ``own``
    l_q: int
    l_d: int
    dim: int = 128
    dtype: str = "bfloat16"
    own: bool = False
    masked: bool = False  # document lengths are random and given as a mask
    normalize: bool = False
    argmax: bool = False  # latemax returns it too; the others have no such output

    @property
    def name(self) -> str:
        flags = [name for name in ("own", "masked", "normalize", "argmax") if getattr(self, name)]
        return " ".join([f"({self.n_q},{self.n_d},{self.l_q},{self.l_d})", str(self.dim), self.dtype, *flags])

    @property
    def documents(self) -> int:
        return self.n_d * (self.n_q if self.own else 1)

    @property
    def flops(self) -> int:
        """Of the similarities, forward. Padding counts: every contender without ragged support computes it."""
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
        """Unit tokens q and d; d_mask if ``masked``, else None."""
        generator = torch.Generator(device).manual_seed(0)
        options = dict(generator=generator, device=device, dtype=getattr(torch, self.dtype))
        q = unit(self.n_q, self.l_q, self.dim, **options)
        d = unit(*((self.n_q,) if self.own else ()), self.n_d, self.l_d, self.dim, **options)
        if not self.masked:
            return q, d, None
        shortest = max(1, self.l_d // SHORTEST)
        lengths = torch.randint(shortest, self.l_d + 1, d.shape[:-2], device=device, generator=generator)
        return q, d, torch.arange(self.l_d, device=device) < lengths.unsqueeze(-1)


class Ragged(NamedTuple):
    """Dense queries against documents of random lengths."""

    n_q: int
    n_d: int
    shortest: int
    longest: int
    l_q: int = 32
    dim: int = 128

    def tiny(self) -> Ragged:
        return self._replace(n_q=min(self.n_q, 3), n_d=min(self.n_d, 5))


class Rerank(NamedTuple):
    """One query against k candidates scattered over a corpus of equally long documents."""

    documents: int
    k: int
    l_d: int = 196
    l_q: int = 32
    dim: int = 128

    def tiny(self) -> Rerank:
        return self._replace(documents=50, k=10)


# suites.maxsim and the pytest-benchmark cases; in the order of what matters most, should time run out
CORE = (
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
    # short enough that the host's time shows
    Shape(1, 100, 32, 196),
)
VARIANTS = (
    Shape(1, 1000, 32, 1024, masked=True),
    Shape(128, 128, 32, 300, masked=True),
    Shape(1, 1000, 1024, 1024, normalize=True),
    Shape(1, 10_000, 32, 1024, normalize=True),
    Shape(128, 128, 32, 300, normalize=True),
    Shape(1, 1000, 1024, 1024, argmax=True),
    Shape(128, 128, 32, 300, argmax=True),
    *(Shape(128, 128, 32, 300, dim) for dim in (64, 96, 256, 768)),
    *(Shape(128, 128, 32, 300, dtype=dtype) for dtype in ("float16", "float32")),
)
# forward and backward
TRAIN = (
    Shape(32, 32, 32, 300),
    Shape(256, 256, 32, 300),
    Shape(256, 16, 32, 1030, own=True),
    Shape(64, 64, 1030, 1030),
)
CPU = (
    *(Shape(1, 1000, l_q, 512, dtype="float32") for l_q in (8, 32)),
    Shape(1, 200, 128, 1024, dtype="float32"),
    Shape(1, 1000, 32, 196, dtype="bfloat16"),
    Shape(1, 200, 32, 512, dtype="float32", masked=True),
    Shape(8, 100, 32, 196, dtype="float32", normalize=True),
)
CPU_TRAIN = (Shape(16, 16, 32, 196, dtype="float32"),)
# torch.compile(mode="max-autotune") is timed at these: its tuning takes up to a minute for each
COMPILED = (CORE[0], CORE[4], CORE[5], CORE[6])


# suites.cpu: one query
SCAN = tuple(
    Shape(1, n_d, l_q, l_d, dtype="float32")
    for l_q, n_d, l_d in ((32, 1000, 512), (32, 1000, 196), (128, 200, 1024), (1024, 20, 1024))
)
# forward and backward
SCAN_TRAIN = (Shape(1, 200, 32, 196, dtype="float32"), Shape(1, 100, 32, 512, dtype="float32"))
ONE_DOCUMENT = tuple(Shape(1, 1, l_q, l_d, dtype="float32") for l_q, l_d in ((32, 196), (8, 196), (32, 1030)))
SCAN_RAGGED = tuple(Ragged(1, 1000, *lengths) for lengths in ((16, 512), (196, 1030), (1, 2000)))
SWEEP = tuple(
    Shape(1, n_d, l_q, l_d, dim, "float32")
    for l_q in (8, 32, 128, 1024)
    for l_d in (196, 512, 1024)
    for dim in (64, 128, 768)
    for n_d in (100, 1000, 10_000)
    # 1 GB of documents, 20 GFLOP
    if n_d * l_d * dim <= 1 << 28 and l_q * n_d * l_d * dim <= 10**10
)

# suites.ragged, by device: (shape, train)
RAGGED = {
    "cuda": (
        (Ragged(1, 10_000, 32, 1024), False),
        (Ragged(64, 1000, 32, 1024), False),
        (Ragged(64, 1000, 32, 1024), True),
    ),
    "cpu": ((Ragged(1, 500, 32, 1024), False), (Ragged(8, 100, 32, 1024), False), (Ragged(8, 100, 32, 1024), True)),
}
RERANK = {"cuda": Rerank(100_000, 1000), "cpu": Rerank(5000, 1000)}

# suites.host: small, so that the host is all there is
HOST = Shape(1, 4, 32, 16)
# suites.corpus: one query against a store
CORPUS, CORPUS_K = Shape(1, 4000, 32, 196, dtype="float16"), 10
# suites.encoder
IMAGE_SIZE, IMAGE_BATCHES = 224, (1, 4)


# document tokens of builds that say nothing else, and of those for short documents
LONG, SHORT = 1024, 300


class Build(NamedTuple):
    """Arguments of ``latemax.warmup`` whose kernels static.aot takes apart, by kind of product (see tiles.Row), and the
    length of documents. Layout "smooth" is for ``smooth_maxsim``."""

    kind: str
    dim: int
    l_q: int = 32
    n_q: int = 1
    layout: str = "dense"
    l_d: int = LONG
    d_masked: bool = False
    normalize: bool = False
    return_argmax: bool = False
    train: bool = False
    q_kind: str | None = None
    d_kind: str | None = None
    bounds: str = ""  # "exact" or "coarse": of maxsim_bounds


# kind of product -> dtype and float32 matmul precision that take it
KINDS = {
    "half": ("bfloat16", "highest"),
    "tf32": ("float32", "high"),
    "ieee": ("float32", "highest"),
    "double": ("float64", "highest"),
}


def builds() -> list[Build]:
    """Every forward tile without flags, the flags on the tiles used most, codes, and the backward kernels."""
    found = []
    for codes in ("int8", "binary"):
        for l_q, n_q in ((32, 1), (128, 1), (32, 16)):
            plain = Build("half", 128, l_q, n_q, d_kind=codes)
            found += [plain, plain._replace(q_kind=codes)]
            if n_q == 1:
                # float32 query tokens are multiplied as two halves
                found.append(plain._replace(kind="ieee"))
        plain = Build("half", 128, d_kind=codes)
        found += [plain._replace(normalize=True), plain._replace(return_argmax=True), plain._replace(layout="rerank")]
        found += [plain._replace(dim=768), plain._replace(dim=768, q_kind=codes)]
    for kind, bounds in (("half", "exact"), ("ieee", "exact"), ("half", "coarse")):
        # query tokens are rounded to 8 bits only where codes need their norms anyway
        plain = Build(kind, 128, d_kind="int8", normalize=bounds == "coarse", bounds=bounds)
        found += [plain, plain._replace(l_d=SHORT), plain._replace(l_q=128), plain._replace(dim=768)]
        found += [plain._replace(layout="varlen"), plain._replace(d_masked=True)]
        if bounds == "exact":
            found.append(plain._replace(normalize=True))
    for kind in KINDS:
        for dim in (64, 96, 128, 256, 768) if kind == "half" else (128, 768):
            for l_q, n_q in ((16, 1), (32, 1), (64, 1), (128, 1), (1024, 1), (32, 16)):
                plain = Build(kind, dim, l_q, n_q)
                found.append(plain)
                if kind in ("half", "tf32") and l_q <= 64 and n_q == 1 and dim <= 256:
                    short = plain._replace(l_d=SHORT)
                    found.append(short)
                    if dim == 128 and l_q == 32:
                        found += [short._replace(d_masked=masked, return_argmax=True) for masked in (False, True)]
                        found += [short._replace(d_masked=True), short._replace(normalize=True)]
                        found += [short._replace(layout=layout) for layout in ("varlen", "rerank")]
                if dim != 128:
                    continue
                if kind != "half":
                    found.append(plain._replace(return_argmax=True))
                elif l_q == 1024:
                    found.append(plain._replace(normalize=True))
                elif l_q in (32, 128):
                    found += [plain._replace(d_masked=True), plain._replace(normalize=True)]
                    found += [plain._replace(d_masked=masked, return_argmax=True) for masked in (False, True)]
                    if n_q == 1:
                        found += [plain._replace(layout=layout) for layout in ("varlen", "rerank")]
                        found.append(plain._replace(layout="rerank", normalize=True))
        l_qs = (16, 32, 128) if kind == "half" else (32,)
        found += [Build(kind, dim, l_q, layout="smooth", train=True) for dim in (128, 768) for l_q in l_qs]
        if kind == "ieee":
            continue
        for dim in (128, 1030):
            trained = Build(kind, dim, train=True)
            found += [trained, trained._replace(normalize=True)]
            if dim == 128:
                found += [trained._replace(layout="varlen", normalize=norm) for norm in (False, True)]
                found += [trained._replace(layout="rerank", normalize=norm) for norm in (False, True)]
    return found


def tuning(dim: int, q_rows: int, l_d: int, dtype: str) -> Shape:
    """A shape of documents of up to l_d tokens whose query tokens fill the tiles of up to ``q_rows`` rows: one short
    query, or many that share tiles."""
    dim = min(dim, 768)
    if q_rows > 64:
        return Shape(64, 256, 32, 300, dim, dtype)
    return Shape(1, 4000, q_rows, 512, dim, dtype) if l_d > 400 else Shape(1, 10_000, q_rows, 196, dim, dtype)
