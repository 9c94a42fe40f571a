import functools
import tempfile

import torch
from hypothesis import strategies as st
from parity.common import (
    MASKED_NAN,
    TEXTS,
    TOLERANCE,
    cases,
    cast,
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
from pylate import losses, models, rank, scores
from pylate.losses import contrastive

import latemax.compat
from latemax.compat import pylate as ours

FORMS = ("tensor", "numpy", "nested", "zeros")
MASKS = ("float", "numpy", "weights")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def groups_of(d, n):
    return [d[i : i + 2] for i in range(0, 2 * n, 2)] if isinstance(d, list) else d.reshape(n, 2, *d.shape[1:])


@cases(data=st.data(), n=st.integers(1, 3), dtype=DTYPES)
def check_scores(data, n, dtype):
    (q, q_lengths), (d, d_lengths) = (data.draw(side(n=k, forms=FORMS)) for k in (n, 2 * n))
    q, d = cast(q, dtype), cast(d, dtype)
    if not torch.is_tensor(q) or not torch.is_tensor(d):  # PyLate refuses two dtypes
        q, d = cast(q, torch.float32), cast(d, torch.float32)
    q_mask, d_mask = (data.draw(mask(x, MASKS, weights=True)) for x in (q_lengths, d_lengths))
    q_mask, d_mask = (None if m is None else torch.as_tensor(m) for m in (q_mask, d_mask))
    compare_masked("colbert_scores", scores.colbert_scores, ours.colbert_scores, q, d, q_mask, d_mask)
    own, own_mask = groups_of(d, n), None if d_mask is None else groups_of(d_mask, n)
    compare_masked("colbert_kd_scores", scores.colbert_kd_scores, ours.colbert_kd_scores, q, own, q_mask, own_mask)
    compare_masked("ColBERTScores", scores.ColBERTScores(), ours.colbert_group_scores, q, own, q_mask, own_mask)


def compare_masked(name, host, function, q, d, q_mask, d_mask):
    allowed = 2 * TOLERANCE[q.dtype if torch.is_tensor(q) else torch.float32]
    arguments = (q, d, q_mask, d_mask)
    compare(
        name, lambda: host(*arguments), lambda: function(*arguments, padding="host"), tolerance=allowed, dtype=False
    )
    # without a document mask both rules agree, but for a NaN in a masked query token
    clean, different = without_masked_nan(q, q_mask)
    differs[MASKED_NAN] += different
    compare(
        f"{name}, exact", lambda: host(clean, d, q_mask), lambda: function(q, d, q_mask), tolerance=allowed, dtype=False
    )


def check_exact_document_masks():
    """A masked document token is absent: as in a document without it."""
    for _ in range(20):
        q, d = torch.randn(2, 3, 8), torch.randn(4, 5, 8) - 1
        keep = torch.rand(4, 5) < 0.6
        keep[:, 0] = True
        alone = [scores.colbert_scores(q, x[m][None]) for x, m in zip(d, keep, strict=True)]
        torch.testing.assert_close(ours.colbert_scores(q, d, None, keep.float()), torch.cat(alone, dim=1))
        differs["a masked document token: excluded; in PyLate it scores 0 and may win"] += 1


@cases(seed=st.integers(0, 2**16), k=st.integers(1, 30), chunk=st.sampled_from([None, 1, 4]), masked=st.booleans())
def check_xtr(seed, k, chunk, masked):
    torch.manual_seed(seed)
    q, d = torch.randn(3, 4, 8), torch.randn(3, 2, 5, 8)
    masks = ((torch.rand(3, 4) < 0.8).float(), torch.rand(3, 2, 5) < 0.7) if masked else (None, None)
    for name in ("XTRScores", "XTRKDScores"):
        host, exact = getattr(scores, name)(k, chunk), getattr(ours, name)(k, chunk)
        own = getattr(ours, name)(k, chunk, padding="host")
        if chunk and masked and k > masks[1].sum():
            differs[
                "XTR with k above the unmasked tokens, in chunks: PyLate retrieves any of the masked ones; not compared"
            ] += 1
        else:
            compare(name, lambda: host(q, d, *masks), lambda: own(q, d, *masks), tolerance=1e-3)
        compare_gradients(
            f"{name}, gradients",
            lambda q, d: host(q, d, masks[0], None),
            lambda q, d: exact(q, d, masks[0], None),
            q,
            d,
        )
        compare(f"{name}, exact", lambda: host(q, d, masks[0]), lambda: exact(q, d, masks[0]), tolerance=1e-3)


def check_xtr_refuses_large_k():
    compare(
        "XTRScores",
        lambda: scores.XTRScores(9)(*[torch.ones(1, 2, 2, 2)] * 2),
        lambda: ours.XTRScores(9)(torch.ones(1, 2, 2), torch.ones(1, 2, 2, 2)),
    )


@cases(seed=st.integers(0, 2**16), groups=st.booleans())
def check_gradients(seed, groups):
    torch.manual_seed(seed)
    q, d, masks = torch.randn(3, 4, 8), torch.randn(3, 2, 5, 8), (torch.rand(3, 4), None)
    host, own = (
        (scores.ColBERTScores(), ours.ColBERTScores()) if groups else (scores.colbert_kd_scores, ours.colbert_kd_scores)
    )
    compare_gradients("gradients", lambda q, d: host(q, d, *masks), lambda q, d: own(q, d, *masks), q, d)


@cases(data=st.data(), n=st.integers(1, 4), forms=st.sampled_from([("list",), ("arrays",), ("tensor",)]))
def check_pairs_and_rerank(data, n, forms):
    (a, _), (b, _) = (data.draw(side(n=n, forms=forms)) for _ in "ab")
    compare(
        "colbert_scores_pairwise",
        lambda: scores.colbert_scores_pairwise(a, b),
        lambda: ours.colbert_scores_pairwise(a, b),
    )
    documents = [data.draw(side(forms=forms, longest=7))[0] for _ in range(n)]
    ids = [[f"{i} {j}" for j in range(len(x))] for i, x in enumerate(documents)]

    def ranked(function):
        rows = function(ids, a, documents)
        return torch.tensor([row["score"] for group in rows for row in group]), rows

    wanted, rows = ranked(rank.rerank)
    got, own = ranked(lambda *x: ours.rerank(*x, padding="host"))
    compare("rerank", lambda: wanted, lambda: got)
    if not wanted.isnan().any():
        assert [[row["id"] for row in group] for group in own] == [[row["id"] for row in group] for group in rows]


def check_training():
    folder = tempfile.TemporaryDirectory()
    model = models.ColBERT(tiny_bert(folder.name), embedding_size=16, device="cpu", query_length=8, document_length=12)

    def features(texts, query):
        return model.tokenize(list(texts), is_query=query, pad=True)

    query, *documents = (features(texts, i == 0) for i, texts in enumerate((TEXTS[0], TEXTS[1], TEXTS[0][::-1])))
    teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, 1.0]])
    both = features([text for pair in zip(TEXTS[1], TEXTS[0], strict=True) for text in pair], False)
    columns = [query, *documents]
    own_scores = {"score_metric": ours.ColBERTScores(padding="host")}
    xtr = {"score_metric": scores.XTRScores(20)}, {"score_metric": ours.XTRScores(20, padding="host")}
    kd = {"score_metric": lambda *a, **k: ours.colbert_kd_scores(*a, padding="host", **k)}
    # min-max of two scores is 0 and 1: only without it has the distillation a gradient
    distillation = functools.partial(losses.Distillation, model, normalize_scores=False)
    runs = (
        ("Contrastive", functools.partial(losses.Contrastive, model), ({}, own_scores), columns, None),
        ("CachedContrastive", functools.partial(losses.CachedContrastive, model), ({}, own_scores), columns, None),
        ("Contrastive, XTR", functools.partial(losses.Contrastive, model), xtr, columns, None),
        ("Distillation", distillation, ({}, kd), [query, both], teacher),
    )
    for name, make, metrics, inputs, labels in runs:
        theirs, own = (make(**metric) for metric in metrics)

        def step(loss):
            return loss([dict(x) for x in inputs], labels)

        def patched():
            with latemax.compat.patch("pylate", padding="host"):
                return step(make(**metrics[0]))

        compare_training(name, model, lambda: step(theirs), lambda: step(own))
        compare_training(f"{name}, patched", model, lambda: step(theirs), patched)
    folder.cleanup()


def check_patch():
    original, group = scores.colbert_scores, scores.XTRScores._score
    with latemax.compat.patch("pylate"):
        assert rank.rank.colbert_scores is scores.colbert_scores is not original
        assert scores.XTRScores._score is not group
        assert losses.Distillation.__init__.__defaults__[0] is scores.colbert_kd_scores
    assert rank.rank.colbert_scores is scores.colbert_scores is original and scores.XTRScores._score is group
    assert contrastive.ColBERTScores is scores.ColBERTScores
    tried["patch"] += 1
