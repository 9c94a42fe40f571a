"""Compares latemax.compat.<host> with the host's own functions on random inputs, then through ``patch``.

Exits with 77 if the host cannot be imported, after printing why.
"""

import importlib
import importlib.util
import math
import random
import sys
from pathlib import Path

import numpy as np
import torch

import latemax.compat

CASES = 60


def same(ours, host, tolerance=2e-4):
    assert ours.shape == host.shape, (ours.shape, host.shape)
    assert ours.device == host.device
    torch.testing.assert_close(ours.double(), host.double(), atol=tolerance, rtol=tolerance, equal_nan=True)


def tokens(n, length, dim, *, nan=False):
    x = torch.randn(n, length, dim)
    if nan:
        x[-1, 0, 0] = math.nan
    return x


def ragged(n, longest, dim):
    return [torch.randn(random.randint(1, longest), dim) for _ in range(n)]


def gradients(function, *inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    scores = function(*leaves)
    return torch.autograd.grad((scores * torch.linspace(1, 2, scores.numel()).view_as(scores)).sum(), leaves)


def retrieval(host_function, ours, dtypes):
    for case in range(CASES):
        dim, dtype = random.choice([1, 8, 33]), random.choice(dtypes)
        q, d = ragged(random.randint(1, 5), 6, dim), ragged(random.randint(1, 7), 9, dim)
        if case % 3 == 0:
            q, d = torch.randn(3, 4, dim), tokens(4, 5, dim, nan=case % 2 == 0)
        q, d = ([x.to(dtype) for x in s] if isinstance(s, list) else s.to(dtype) for s in (q, d))
        size = random.choice([1, 2, 128])
        wanted = host_function(q, d, batch_size=size)
        got = ours(q, d, batch_size=size, padding="host")
        assert got.dtype == wanted.dtype
        same(got, wanted, 2e-4 if dtype == torch.float32 else 6e-2)
        # without padding both rules agree: documents one by one
        single = torch.cat([host_function(q, d[i : i + 1], batch_size=1) for i in range(len(d))], dim=1)
        same(ours(q, d), single, 2e-4 if dtype == torch.float32 else 6e-2)


def colpali_engine():
    from colpali_engine.utils import maxsim as host
    from colpali_engine.utils.processing_utils import BaseVisualRetrieverProcessor as Processor

    from latemax.compat import colpali_engine as ours

    original = Processor.score_multi_vector
    retrieval(original, ours.score_multi_vector, [torch.float32, torch.bfloat16])
    for _ in range(CASES):
        q, d = tokens(3, 4, 8), tokens(5, 6, 8)
        d[0, 3:] = 0
        own = tokens(3, 10, 8).view(3, 2, 5, 8)
        same(ours.maxsim_inbatch(q, d, padding="host"), host._torch_maxsim(q, d))
        same(ours.maxsim_kd(q, own, padding="host"), host._torch_maxsim_kd(q, own))
        for a, b in zip(gradients(ours.maxsim_inbatch, q, d[1:]), gradients(host._torch_maxsim, q, d[1:]), strict=True):
            same(a, b)
    loss = importlib.import_module("colpali_engine.loss.late_interaction_losses")
    q, d = (torch.nn.functional.normalize(tokens(4, n, 16), dim=-1) for n in (5, 7))
    before = gradients(lambda q, d: loss.ColbertLoss()(q, d), q, d)
    with latemax.compat.patch("colpali_engine") as handle:
        assert loss.maxsim_inbatch is host.maxsim_inbatch and Processor.score_multi_vector is not original
        for a, b in zip(gradients(lambda q, d: loss.ColbertLoss()(q, d), q, d), before, strict=True):
            same(a, b)
        same(Processor.score_multi_vector(list(q), list(d)), original(list(q), list(d)))
    assert Processor.score_multi_vector is original, handle


def transformers():
    from transformers.models.colpali.processing_colpali import ColPaliProcessor as Processor

    from latemax.compat import transformers as ours

    original = Processor.score_retrieval
    retrieval(lambda *a, **k: original(None, *a, **k), ours.score_retrieval, [torch.float32, torch.bfloat16])
    processor = object.__new__(Processor)
    q, d = tokens(2, 3, 8), tokens(4, 5, 8)
    with latemax.compat.patch("transformers"):
        assert Processor.score_retrieval is not original
        same(processor.score_retrieval(q, d), original(None, q, d))
    assert Processor.score_retrieval is original


def sentence_transformers():
    from sentence_transformers.multi_vector_encoder import scoring as groups
    from sentence_transformers.util import similarity as host

    from latemax.compat import sentence_transformers as ours

    for case in range(4 * CASES):
        dim, pairs = random.choice([1, 8, 33]), case % 2 == 1
        n = random.randint(1, 5)
        sides, masks = [], []
        for side in range(2):
            count = n if pairs else random.randint(1, 5)
            kind = random.choice(["tensor", "list", "numpy", "int", "zeros", "one", "arrays"])
            x = ragged(count, 6, dim) if kind in ("list", "arrays") else tokens(count, 6, dim)
            if kind == "zeros":
                x[torch.rand(count, 6) < 0.4] = 0
            width = max(len(item) for item in x)
            mask = (torch.rand(count, width) < 0.7).float() if random.random() < 0.6 else None
            if mask is not None and isinstance(x, list):
                for i, item in enumerate(x):
                    mask[i, len(item) :] = 0
            if mask is not None and side == 0 and random.random() < 0.5:
                mask = mask * torch.rand(mask.shape)
            form = random.choice(["as it is", "bool", "numpy", "list", "broadcast"]) if mask is not None else None
            if form == "bool" and side:
                mask = mask.bool()
            elif form == "numpy":
                mask = mask.numpy()
            elif form == "list":
                mask = list(mask)
            elif form == "broadcast" and not pairs and not isinstance(x, list):
                mask = mask[:1]
            if kind == "int":
                x = (x * 5).to(torch.int8)
            elif kind == "numpy":
                x = x.numpy()
            elif kind == "arrays":
                x = [item.numpy() for item in x]
            elif kind == "one" and count == 1 and not isinstance(mask, list):
                x, mask = x[0], None if mask is None else mask[0]
            sides.append(x)
            masks.append(mask)
        name = "maxsim_pairwise" if pairs else "maxsim"
        name = f"mean_{name}" if case % 3 == 0 else name
        for padding in ("exact", "host"):
            got = getattr(ours, name)(*sides, *masks, padding=padding)
            wanted = getattr(host, name)(*sides, *masks)
            assert got.dtype == wanted.dtype == torch.float32
            same(got, wanted)
    for name in groups.__all__:
        if "xtr" in name.lower():
            continue
        for _ in range(10):
            q, d = tokens(3, 4, 8), tokens(6, 5, 8).view(3, 2, 5, 8)
            masks = torch.rand(3, 4), (torch.rand(3, 2, 5) < 0.7).float()
            d = d[:, 0] if "pairwise" in name else d
            masks = masks if "pairwise" not in name else (masks[0], masks[1][:, 0])
            same(getattr(ours, name)(q, d, *masks), getattr(groups, name)(q, d, *masks))
            for a, b in zip(
                gradients(lambda q, d, name=name: getattr(ours, name)(q, d), q, d),
                gradients(lambda q, d, name=name: getattr(groups, name)(q, d), q, d),
                strict=True,
            ):
                same(a, b)
    original = host.maxsim
    with latemax.compat.patch("sentence_transformers"):
        assert host.maxsim is not original
        assert host.SimilarityFunction.to_similarity_fn("maxsim") is host.maxsim
        bound = [m for name, m in sys.modules.items() if name.startswith("sentence_transformers")]
        assert not any(value is original for m in bound for value in list(vars(m).values()))
    assert host.maxsim is original


def pylate():
    from pylate import rank, scores

    from latemax.compat import pylate as ours

    for case in range(2 * CASES):
        dim = random.choice([1, 8, 33])
        q, d = tokens(3, 4, dim), tokens(6, 5, dim, nan=case % 5 == 0)
        own = d.view(3, 2, 5, dim)
        q_mask = random.choice([None, (torch.rand(3, 4) < 0.7).float(), torch.rand(3, 4)])
        d_mask = random.choice([None, (torch.rand(6, 5) < 0.7).float()])
        own_mask = None if d_mask is None else d_mask.view(3, 2, 5)
        if case % 3 == 0:
            q, d = random.choice([lambda x: x.numpy(), lambda x: x.tolist()])(q), d.numpy()
        # exact masks differ from the host's on purpose: a masked token with NaN has no influence
        nan_masked = q_mask is not None and case % 5 == 0
        for padding in ("host", "exact") if d_mask is None and not nan_masked else ("host",):
            same(
                ours.colbert_scores(q, d, q_mask, d_mask, padding=padding), scores.colbert_scores(q, d, q_mask, d_mask)
            )
            same(
                ours.colbert_kd_scores(q, own, q_mask, own_mask, padding=padding),
                scores.colbert_kd_scores(q, own, q_mask, own_mask),
            )
            same(
                ours.ColBERTScores(padding=padding)(q, own, q_mask, own_mask),
                scores.ColBERTScores()(q, own, q_mask, own_mask),
            )
        a, b = ragged(4, 5, dim), ragged(4, 7, dim)
        same(ours.colbert_scores_pairwise(a, b), scores.colbert_scores_pairwise(a, b))
        documents = [[x.numpy() for x in ragged(5, 6, dim)] for _ in a]
        ids = [list(range(5))] * 4
        got, wanted = ours.rerank(ids, a, documents, padding="host"), rank.rerank(ids, a, documents)
        same(
            torch.tensor([[r["score"] for r in row] for row in got]),
            torch.tensor([[r["score"] for r in row] for row in wanted]),
        )
    original = scores.colbert_scores
    with latemax.compat.patch("pylate"):
        assert rank.rank.colbert_scores is scores.colbert_scores is not original
    assert rank.rank.colbert_scores is scores.colbert_scores is original


def without_init(*names):
    """Packages whose __init__ does not run: PyLate's import training libraries that its scores do not use."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ImportError(f"no {name}")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])


if __name__ == "__main__":
    host = sys.argv[1]
    sys.path.append(str(Path(__file__).parents[1]))
    import torchvision_shim

    torchvision_shim.install()
    try:
        if host == "pylate":
            without_init("pylate", "pylate.utils")
            tensor = importlib.import_module("pylate.utils.tensor")
            sys.modules["pylate.utils"].convert_to_tensor = tensor.convert_to_tensor
        importlib.import_module(host)
    except ImportError as error:
        print(f"{host} cannot be imported: {error}")
        sys.exit(77)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    globals()[host]()
