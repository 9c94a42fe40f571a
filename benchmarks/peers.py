"""What latemax is compared with, each as ``(q, d, d_mask, normalize) -> scores [n_q, n_d]``."""
# The forward calls of late-interaction-kernels 0.4.5 and flash-maxsim 0.3.0 ran in Triton's interpreter on small shapes
# (tests/test_benchmarks.py); their backward refuses CPU tensors.

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

import latemax
from benchmarks.internals import cuda_status
from benchmarks.shapes import COMPILED, Shape

Contender = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None", bool], torch.Tensor]

# largest [n_q, n_d, l_q, l_d] float32 that the eager contenders may write, in bytes
EAGER_LIMIT = 8 << 30


def ours(q: torch.Tensor, d: torch.Tensor, d_mask: torch.Tensor | None, normalize: bool) -> torch.Tensor:
    return latemax.maxsim(q, d, None, d_mask, normalize=normalize)


def ours_with_argmax(q: torch.Tensor, d: torch.Tensor, d_mask: torch.Tensor | None, normalize: bool) -> torch.Tensor:
    return latemax.maxsim(q, d, None, d_mask, normalize=normalize, return_argmax=True)[0]


def ours_cuda(q: torch.Tensor, d: torch.Tensor, d_mask: torch.Tensor | None, normalize: bool) -> torch.Tensor:
    return latemax.maxsim(q, d, None, d_mask, normalize=normalize, backend="cuda")


def eager(q: torch.Tensor, d: torch.Tensor, d_mask: torch.Tensor | None, normalize: bool) -> torch.Tensor:
    """einsum in the input's dtype, the maxima summed in float32."""
    if normalize:
        q, d = F.normalize(q, dim=-1), F.normalize(d, dim=-1)
    sims = torch.einsum("qic,qkjc->qkij" if d.dim() == 4 else "qic,kjc->qkij", q, d)
    if d_mask is not None:
        sims = sims.masked_fill(~(d_mask if d.dim() == 4 else d_mask.unsqueeze(0)).unsqueeze(2), -math.inf)
    return sims.amax(-1).sum(-1, dtype=torch.float32)


def chunked(q: torch.Tensor, d: torch.Tensor, d_mask: torch.Tensor | None, normalize: bool) -> torch.Tensor:
    """eager over as many documents at a time as hold 256 MB of similarities on a GPU, 2 MB on a CPU."""
    budget = (256 << 20) if q.is_cuda else (2 << 20)
    step = max(1, budget // (q.shape[0] * q.shape[1] * d.shape[-2] * q.element_size()))
    axis = d.dim() - 3
    masks = [None] * -(-d.shape[axis] // step) if d_mask is None else d_mask.split(step, axis)
    return torch.cat(
        [eager(q, part, mask, normalize) for part, mask in zip(d.split(step, axis), masks, strict=True)], 1
    )


def contenders(shape: Shape, device: str, train: bool) -> tuple[dict[str, Contender], dict[str, str]]:
    """(name -> contender, name -> why it is left out) for one shape."""
    runs: dict[str, Contender] = {"latemax": ours_with_argmax if shape.argmax else ours, "torch chunked": chunked}
    absent: dict[str, str] = {}
    similarities = 4 * shape.n_q * shape.n_d * shape.l_q * shape.l_d
    if similarities > EAGER_LIMIT:
        absent["torch eager"] = absent["torch.compile"] = f"would write {similarities / 2**30:.0f} GiB"
    else:
        runs["torch eager"] = eager
        if device != "cuda":
            absent["torch.compile"] = "timed on CUDA only"
        elif shape in COMPILED and not train:
            torch._dynamo.reset()
            runs["torch.compile"] = torch.compile(eager, mode="max-autotune", dynamic=False)
        else:
            absent["torch.compile"] = "its tuning takes too long for every shape"
    # in addition to the choice of auto, so that one run gives what the table of faster CUDA kernels needs
    usable, reason = cuda_status()
    if device != "cuda":
        absent["latemax cuda"] = "runs on CUDA only"
    elif not usable:
        absent["latemax cuda"] = reason
    elif shape.dtype == "float32" or shape.dim % 8:
        absent["latemax cuda"] = "takes half precision and a dim that is a multiple of 8"
    else:
        runs["latemax cuda"] = ours_cuda
    for name, module, build in (
        ("late-interaction-kernels", "late_interaction_kernels", late_interaction_kernels),
        ("flash-maxsim", "flash_maxsim", flash_maxsim),
        ("flash-maxsim, query whole", "flash_maxsim", flash_maxsim_whole),
    ):
        if device != "cuda":
            absent[name] = "runs on CUDA only"
        elif importlib.util.find_spec(module) is None:
            absent[name] = "not installed"
        else:
            run = build(shape, train)
            if callable(run):
                forget_tuning(module)
                runs[name] = run
            else:
                absent[name] = run
    return runs, absent


def forget_tuning(package: str) -> None:
    """Lets a peer tune for the measured shape: its keys leave n_q, n_d and l_d out, so that the first shape of a kind
    would decide for all."""
    from triton.runtime.autotuner import Autotuner

    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == package:
            for value in vars(module).values():
                if isinstance(value, Autotuner):
                    value.cache.clear()


def late_interaction_kernels(shape: Shape, train: bool) -> Contender | str:
    """The contender, or why it cannot run."""
    from late_interaction_kernels import maxsim

    return lambda q, d, d_mask, normalize: maxsim(q, d, d_mask=d_mask, normalize=normalize)


def flash_maxsim(shape: Shape, train: bool, **options: object) -> Contender | str:
    """The contender, or why it cannot run."""
    if shape.normalize:
        return "has no normalisation"
    if shape.dtype == "float32":
        return "takes half precision only"
    import flash_maxsim as package

    def run(q: torch.Tensor, d: torch.Tensor, d_mask: torch.Tensor | None, normalize: bool) -> torch.Tensor:
        lengths = None if d_mask is None else d_mask.sum(-1, dtype=torch.int32).flatten()
        if train:
            return package.flash_maxsim_batched_train(q, d, doc_lengths=lengths, shared_docs=d.dim() == 3)
        if d.dim() == 3 and len(q) == 1:
            return package.flash_maxsim(q[0], d, lengths, **options).unsqueeze(0)
        return package.flash_maxsim_batched(q, d, doc_lengths=lengths, shared_docs=d.dim() == 3, **options)

    return run


def flash_maxsim_whole(shape: Shape, train: bool) -> Contender | str:
    """flash-maxsim without cutting long queries, or why it cannot run."""
    if train or shape.l_q <= 128:
        return "the same as flash-maxsim here: it cuts only longer queries, and only without gradients"
    return flash_maxsim(shape, train, query_chunk_size=None)
