"""What latemax is timed against, each behind one signature: (q, d, d_mask, normalize) -> scores [n_q, n_d]."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

import latemax
from benchmarks.shapes import Shape
from latemax.ops.select import cuda_status

# largest [n_q, n_d, l_q, l_d] float32 that the eager contenders may write, in bytes
EAGER_LIMIT = 8 << 30


def ours(q, d, d_mask, normalize):
    return latemax.maxsim(q, d, None, d_mask, normalize=normalize)


def ours_cuda(q, d, d_mask, normalize):
    return latemax.maxsim(q, d, None, d_mask, normalize=normalize, backend="cuda")


def eager(q, d, d_mask, normalize):
    """einsum in the input's dtype, the maxima summed in float32."""
    if normalize:
        q, d = F.normalize(q, dim=-1), F.normalize(d, dim=-1)
    sims = torch.einsum("qic,qkjc->qkij" if d.dim() == 4 else "qic,kjc->qkij", q, d)
    if d_mask is not None:
        sims = sims.masked_fill(~(d_mask if d.dim() == 4 else d_mask.unsqueeze(0)).unsqueeze(2), -math.inf)
    return sims.amax(-1).sum(-1, dtype=torch.float32)


def chunked(q, d, d_mask, normalize):
    """eager over as many documents at a time as hold 256 MB of similarities on a GPU, 2 MB on a CPU."""
    budget = (256 << 20) if q.is_cuda else (2 << 20)
    step = max(1, budget // (q.shape[0] * q.shape[1] * d.shape[-2] * q.element_size()))
    axis = d.dim() - 3
    masks = [None] * -(-d.shape[axis] // step) if d_mask is None else d_mask.split(step, axis)
    return torch.cat(
        [eager(q, part, mask, normalize) for part, mask in zip(d.split(step, axis), masks, strict=True)], 1
    )


def contenders(shape: Shape, device: str, train: bool) -> tuple[dict[str, Callable], dict[str, str]]:
    """(name -> function, name -> why it is left out) for one shape."""
    runs: dict[str, Callable] = {"latemax": ours, "torch chunked": chunked}
    absent: dict[str, str] = {}
    similarities = 4 * shape.n_q * shape.n_d * shape.l_q * shape.l_d
    if similarities <= EAGER_LIMIT:
        runs["torch eager"] = eager
        if device == "cuda":
            runs["torch.compile"] = torch.compile(eager, mode="max-autotune-no-cudagraphs")
        else:
            absent["torch.compile"] = "timed on CUDA only"
    else:
        absent["torch eager"] = absent["torch.compile"] = f"would write {similarities / 2**30:.0f} GiB"
    # beside the choice of auto, so that the table of what auto chooses can be written from one run
    why_not = "runs on CUDA only" if device != "cuda" else cuda_status()[1] * (not cuda_status()[0])
    if not why_not and (shape.dtype == "float32" or shape.dim % 8):
        why_not = "takes half precision and a dim that is a multiple of 8"
    if why_not:
        absent["latemax cuda"] = why_not
    else:
        runs["latemax cuda"] = ours_cuda
    for name, module, build in (
        ("late-interaction-kernels", "late_interaction_kernels", late_interaction_kernels),
        ("flash-maxsim", "flash_maxsim", flash_maxsim),
    ):
        if device != "cuda":
            absent[name] = "runs on CUDA only"
        elif importlib.util.find_spec(module) is None:
            absent[name] = "not installed"
        else:
            run = build(shape, train)
            if callable(run):
                runs[name] = run
            else:
                absent[name] = run
    return runs, absent


def late_interaction_kernels(shape: Shape, train: bool):
    from late_interaction_kernels import maxsim

    return lambda q, d, d_mask, normalize: maxsim(q, d, d_mask=d_mask, normalize=normalize)


def flash_maxsim(shape: Shape, train: bool):
    if shape.normalize:
        return "has no normalisation"
    if shape.dtype == "float32":
        return "takes half precision only"
    import flash_maxsim as package

    def run(q, d, d_mask, normalize):
        lengths = None if d_mask is None else d_mask.sum(-1, dtype=torch.int32)
        if train:
            return package.flash_maxsim_batched_train(q, d, doc_lengths=lengths, shared_docs=d.dim() == 3)
        if d.dim() == 3 and len(q) == 1:
            return package.flash_maxsim(q[0], d, lengths).unsqueeze(0)
        return package.flash_maxsim_batched(q, d, doc_lengths=lengths, shared_docs=d.dim() == 3)

    return run
