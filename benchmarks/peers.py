"""What latemax is timed against, each behind one signature: (q, d, d_mask, normalize) -> scores [n_q, n_d]."""
# The forward calls of late-interaction-kernels 0.4.5 and flash-maxsim 0.3.0 ran in Triton's interpreter on small shapes
# (tests/test_benchmarks.py); their backward refuses CPU tensors.

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from latemax.ops.backends.cuda import status as cuda_status

import latemax
from benchmarks.shapes import Shape

# shapes that torch.compile(mode="max-autotune") is timed at: tuning takes it up to a minute each
COMPILED = {(1, 1000, 32, 300), (1, 1000, 1024, 1024), (32, 32, 32, 300), (128, 128, 32, 300)}
# largest [n_q, n_d, l_q, l_d] float32 that the eager contenders may write, in bytes
EAGER_LIMIT = 8 << 30


def ours(q, d, d_mask, normalize):
    return latemax.maxsim(q, d, None, d_mask, normalize=normalize)


def ours_with_winners(q, d, d_mask, normalize):
    return latemax.maxsim(q, d, None, d_mask, normalize=normalize, return_argmax=True)[0]


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
    runs: dict[str, Callable] = {"latemax": ours_with_winners if shape.argmax else ours, "torch chunked": chunked}
    absent: dict[str, str] = {}
    similarities = 4 * shape.n_q * shape.n_d * shape.l_q * shape.l_d
    if similarities <= EAGER_LIMIT:
        runs["torch eager"] = eager
        if device != "cuda":
            absent["torch.compile"] = "timed on CUDA only"
        elif tuple(shape[:4]) in COMPILED and not train and not shape.own and shape == Shape(*shape[:4]):
            torch._dynamo.reset()
            runs["torch.compile"] = torch.compile(eager, mode="max-autotune", dynamic=False)
        else:
            absent["torch.compile"] = "its tuning takes too long for every shape"
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


def late_interaction_kernels(shape: Shape, train: bool):
    from late_interaction_kernels import maxsim

    return lambda q, d, d_mask, normalize: maxsim(q, d, d_mask=d_mask, normalize=normalize)


def flash_maxsim(shape: Shape, train: bool, **options):
    if shape.normalize:
        return "has no normalisation"
    if shape.dtype == "float32":
        return "takes half precision only"
    import flash_maxsim as package

    def run(q, d, d_mask, normalize):
        lengths = None if d_mask is None else d_mask.sum(-1, dtype=torch.int32).flatten()
        if train:
            return package.flash_maxsim_batched_train(q, d, doc_lengths=lengths, shared_docs=d.dim() == 3)
        if d.dim() == 3 and len(q) == 1:
            return package.flash_maxsim(q[0], d, lengths, **options).unsqueeze(0)
        return package.flash_maxsim_batched(q, d, doc_lengths=lengths, shared_docs=d.dim() == 3, **options)

    return run


def flash_maxsim_whole(shape: Shape, train: bool):
    if train or shape.l_q <= 128:
        return "the same as flash-maxsim here: only longer queries are cut, and only without gradients"
    return flash_maxsim(shape, train, query_chunk_size=None)
