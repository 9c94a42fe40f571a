import sys
import tempfile

import numpy as np
import torch
from hypothesis import strategies as st
from parity.common import (
    FORMS,
    MASKED_NAN,
    TEXTS,
    cases,
    compare,
    compare_gradients,
    compare_training,
    differs,
    mask,
    side,
    tiny_bert,
    tried,
    without_masked_nan,
)
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.multi_vector_encoder import evaluation, losses
from sentence_transformers.multi_vector_encoder import scoring as groups
from sentence_transformers.util import similarity as host

import latemax.compat
from latemax.compat import sentence_transformers as ours

MASKS = ("float", "bool", "int", "numpy", "list", "weights", "empty")


def rows_of(tokens, x):
    """One of x per item of the tokens, also where a single item has no axis for it."""
    return [x] if getattr(tokens, "ndim", 3) == 2 else x


def compare_both(name, a, b, a_mask=None, b_mask=None):
    (clean_a, first), (clean_b, second) = without_masked_nan(a, a_mask), without_masked_nan(b, b_mask)
    differs[MASKED_NAN] += first or second
    masked = (
        None if a_mask is None else torch.stack([torch.as_tensor(m).any() for m in rows_of(a, a_mask)]).logical_not()
    )
    if masked is not None and masked.any() and any(np.isnan(np.asarray(item)).any() for item in rows_of(b, clean_b)):
        scores = getattr(ours, name)(a, b, a_mask, b_mask)
        assert not scores[masked].isnan().any()
        differs["a query whose tokens are all masked and a document with NaN: 0; the host's score is NaN"] += 1
        return
    for padding in ("exact", "host"):
        compare(
            name, lambda: getattr(host, name)(clean_a, clean_b, a_mask, b_mask),
            lambda: getattr(ours, name)(a, b, a_mask, b_mask, padding=padding),
        )  # fmt: skip


def masks_of(data, a, b):
    """Masks that fit: a single item has a mask [l]."""
    return [
        found[0] if isinstance(x, torch.Tensor) and x.dim() == 2 and found is not None else found
        for (x, lengths), found in (
            (s, data.draw(mask(s[1], MASKS, weights=weights))) for s, weights in ((a, True), (b, False))
        )
    ]


@cases(data=st.data(), a=side(), b=side(longest=9), name=st.sampled_from(["maxsim", "mean_maxsim"]))
def check_maxsim(data, a, b, name):
    compare_both(name, a[0], b[0], *masks_of(data, a, b))


@cases(data=st.data(), n=st.integers(1, 5), name=st.sampled_from(["maxsim_pairwise", "mean_maxsim_pairwise"]))
def check_pairwise(data, n, name):
    a, b = (data.draw(side(n=n, forms=FORMS[:7])) for _ in "ab")
    compare_both(name, a[0], b[0], *masks_of(data, a, b))


def check_empty():
    for a, b in (
        ([], [torch.ones(1, 8)]),
        ([torch.ones(1, 8)], []),
        ([], []),
        ([torch.ones(0, 8)], [torch.ones(0, 8)]),
    ):
        compare_both("maxsim", a, b)
        compare_both("maxsim_pairwise", a, b)


@cases(
    seed=st.integers(0, 2**16),
    masked=st.booleans(),
    n=st.integers(1, 3),
    name=st.sampled_from([name for name in groups.__all__ if "xtr" not in name.lower()]),
)
def check_loss_scores(seed, masked, n, name):
    torch.manual_seed(seed)
    q, d = torch.randn(3, 4, 8), torch.randn(3, n, 5, 8)
    masks = (torch.rand(3, 4), (torch.rand(3, n, 5) < 0.7).float()) if masked else (None, None)
    if "pairwise" in name:
        d, masks = d[:, 0], (masks[0], None if masks[1] is None else masks[1][:, 0])
    theirs, own = getattr(groups, name), getattr(ours, name)
    compare(name, lambda: theirs(q, d, *masks), lambda: own(q, d, *masks))
    compare_gradients(f"{name}, gradients", lambda q, d: theirs(q, d, *masks), lambda q, d: own(q, d, *masks), q, d)


def check_training_and_evaluators():
    folder = tempfile.TemporaryDirectory()
    model = MultiVectorEncoder(tiny_bert(folder.name), device="cpu")

    def features(texts, task):
        return {**model.preprocess(list(texts)), "task": task}

    columns = [features(TEXTS[0], "query"), features(TEXTS[1], "document"), features(TEXTS[0][::-1], "document")]
    margins, teacher = (
        torch.tensor([1.0, -1.0, 0.5, 2.0]),
        torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, 1.0]]),
    )
    makes = (
        (losses.MultiVectorMultipleNegativesRankingLoss, ours.colbert_scores, None),
        (losses.CachedMultiVectorMultipleNegativesRankingLoss, ours.colbert_scores, None),
        (losses.MultiVectorDistillKLDivLoss, ours.colbert_kd_scores, teacher),
        (losses.MultiVectorMarginMSELoss, ours.colbert_scores_pairwise, margins),
    )
    for make, function, labels in makes:
        theirs, own = make(model), make(model, similarity_fct=function)
        compare_training(
            make.__name__, model, lambda: theirs(columns, labels), lambda: own(columns, labels)
        )  # fmt: skip

        def patched():
            with latemax.compat.patch("sentence_transformers"):
                return make(model)(columns, labels)

        compare_training(f"{make.__name__}, patched", model, lambda: theirs(columns, labels), patched)
    compare_evaluators(model)
    folder.cleanup()


def compare_evaluators(model):
    queries, corpus = dict(enumerate(TEXTS[0])), dict(enumerate(TEXTS[1] + TEXTS[0]))
    relevant = {i: {i, i + 4} for i in queries}
    samples = [{"query": q, "positive": [TEXTS[1][i]], "negative": list(TEXTS[0])} for i, q in queries.items()]
    retrieval, reranking = (
        evaluation.MultiVectorInformationRetrievalEvaluator, evaluation.MultiVectorRerankingEvaluator,
    )  # fmt: skip

    def both():
        return {**retrieval(queries, corpus, relevant)(model), **reranking(samples)(model)}

    wanted = both()
    own = {
        **retrieval(queries, corpus, relevant, score_functions={"maxsim": ours.maxsim})(model),
        **reranking(samples, similarity_fct=ours.maxsim)(model),
    }
    with latemax.compat.patch("sentence_transformers"):
        model.similarity_fn_name = "maxsim"  # a model keeps the function that it looked up before
        assert model._similarity is host.maxsim
        assert both() == wanted
    model.similarity_fn_name = "maxsim"
    model._similarity, model._similarity_pairwise = ours.maxsim, ours.maxsim_pairwise
    assert both() == wanted
    for key, value in own.items():
        assert value == wanted[key], key
    tried["evaluators"] += 3 * len(wanted)


def check_patch():
    original = host.maxsim
    with latemax.compat.patch("sentence_transformers"):
        assert host.maxsim is not original
        assert host.SimilarityFunction.to_similarity_fn("maxsim") is host.maxsim
        bound = [m for name, m in sys.modules.items() if name.startswith("sentence_transformers")]
        assert not any(value is original for m in bound for value in list(vars(m).values()))
    assert host.maxsim is original
    tried["patch"] += 1
