"""latemax.compat for mteb, qdrant-client, LanceDB, vLLM and PyLate's XTR without a host: values worked out by hand."""

import math
import warnings

import ml_dtypes
import numpy as np
import pytest
import torch

from latemax.compat import lancedb, mteb, qdrant_client, vllm
from latemax.compat._inputs import as_items, as_tensor
from latemax.compat.pylate import XTRKDScores, XTRScores

E1, E2 = [1.0, 0.0], [0.0, 1.0]
# against E1: 1, -0.6, and a zero row that must not win over -0.6
GOOD, BAD, ZERO = [1.0, 0.0], [-0.6, 0.0], [0.0, 0.0]


def t(*rows):
    return torch.tensor(rows)


def test_arrays_are_viewed():
    array = np.ones((3, 2), np.float32)
    view = array[:2]
    view.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = as_items([view, array[2:]])
    array[:] = 5
    assert [item.tolist() for item in found] == [[[5.0, 5.0], [5.0, 5.0]], [[5.0, 5.0]]]
    assert as_tensor(array[::-1]).tolist() == array[::-1].tolist()
    half = np.array([E1], ml_dtypes.bfloat16)
    assert as_tensor(half).dtype == torch.bfloat16 and as_tensor(half).tolist() == [E1]
    with pytest.raises(TypeError, match="object"):
        as_tensor(np.array([None]))


def test_mteb_zero_padding():
    query = [t(E1)]
    for documents in ([t(BAD), t(GOOD, GOOD)], torch.stack([t(BAD, ZERO), t(GOOD, GOOD)])):
        assert mteb.max_sim(query, documents).tolist() == [[pytest.approx(-0.6), 1.0]]
        assert mteb.max_sim(query, documents, padding="host").tolist() == [[0.0, 1.0]]
    # 60 documents of one token and one of 1000: mteb groups them, and pads none of the short ones
    documents = [t(BAD)] * 60 + [t(BAD).expand(1000, 2)]
    for padding in ("exact", "host"):
        assert mteb.max_sim(query, documents, padding=padding).max() == pytest.approx(-0.6)
    assert mteb.max_sim(query, [t(BAD), torch.zeros(0, 2)]).tolist() == [[pytest.approx(-0.6), 0.0]]


def test_mteb_forms_and_dtypes():
    q, d = np.array([E1, E2]), np.array([[E1, E2], [BAD, ZERO]])
    assert mteb.max_sim(q, d).tolist() == [[2.0, pytest.approx(-0.6)]]  # one query, zero rows are padding
    assert mteb.max_sim(q, d).dtype == torch.float32  # float64 arrays are, as in mteb
    assert mteb.max_sim(torch.tensor(q), torch.tensor(d)).dtype == torch.float64
    assert mteb.max_sim([E1], [E1, E2]).tolist() == [[1.0]]
    assert mteb.max_sim([], [t(E1)]).shape == (0, 1)
    assert mteb.pairwise_max_sim([t(E1), t(E2, E2)], [t(BAD), t(E2)]).tolist() == [pytest.approx(-0.6), 2.0]
    assert mteb.pairwise_max_sim([], []).shape == (0,)
    with pytest.raises(ValueError, match="as many, to score them as pairs; got 1 and 2"):
        mteb.pairwise_max_sim([t(E1)], [t(E1), t(E1)])
    with pytest.raises(ValueError, match="batch_size must be an int >= 1, got 0"):
        mteb.max_sim(q, d, 0)


def test_qdrant_distances():
    points = [np.array([[2.0, 0.0]], np.float32), np.array([BAD, E2], np.float32), np.array([ZERO], np.float32)]
    query = np.array([[4.0, 0.0]])
    score = qdrant_client.calculate_multi_distance_core
    assert score(query, points, "Cosine").tolist() == [1.0, 0.0, 0.0]
    assert score(query, points, "Dot").tolist() == [8.0, 0.0, 0.0]
    assert points[0].tolist() == [[2.0, 0.0]]  # qdrant-client itself normalizes in place
    assert score(query, points, "Dot").dtype == np.float64 and score(query, [], "Dot").shape == (0,)
    third = np.array([[1 / 3, 0.0]])
    assert score(third, [third], "Dot")[0] != 1 / 9  # float32
    assert score(third, [third], "Dot", padding="host")[0] == 1 / 9
    with pytest.raises(ValueError, match="must not contain NaN"):
        score(np.array([[math.nan, 0.0]]), points, "Dot")
    with pytest.raises(ValueError, match=r"Cosine, Dot, Euclid or Manhattan; got 'Hamming'"):
        score(query, points, "Hamming")


def test_vllm_pairs():
    shared, other = t(E1, E2), t(E2)
    documents = [t(E1), torch.zeros(0, 2), t(BAD), t(E2, E1).double()]
    found = vllm.compute_maxsim_score_batched([shared, shared, other, shared], documents)
    assert [score.item() for score in found] == [1.0, -math.inf, 0.0, 2.0]
    assert all(score.dtype == torch.float32 and score.dim() == 0 for score in found)
    # two views at one address are not one query
    found = vllm.compute_maxsim_score_batched([shared, shared[:1], shared[:0]], [t(E2)] * 3)
    assert [score.item() for score in found] == [1.0, 0.0, 0.0]
    assert vllm.compute_maxsim_score_batched([], []) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([t(E1)], []), "same length, got 1 and 0"),
        (([t(E1)], [torch.zeros(2)]), "pair 0: tokens must be 2-D"),
        (([t(E1)], [torch.zeros(1, 3)]), "one dim, got 2 and 3"),
        (([t(E1)], [t(E1).to("meta")]), "one device, got cpu and meta"),
        (([t(E1)], [t(E1)], 0), "max_batch_size must be greater than 0, got 0"),
        (([t(E1)], [t(E1)], 1, -1), "max_score_matrix_elements must be greater than 0, got -1"),
    ],
)
def test_vllm_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        vllm.compute_maxsim_score_batched(*arguments)


def test_xtr():
    q = t(E1, E2)[None]
    d = torch.stack([t([0.9, 0.1], [0.0, 0.2]), t([0.5, 0.8], [-1.0, -1.0])])[None]
    # similarities with E1: 0.9 0 | 0.5 -1, with E2: 0.1 0.2 | 0.8 -1
    assert XTRScores(k=1)(q, d).tolist() == [[pytest.approx(0.9), pytest.approx(0.8)]]
    assert XTRScores(k=2)(q, d).tolist() == [[pytest.approx((0.9 + 0.2) / 2), pytest.approx((0.5 + 0.8) / 2)]]
    assert torch.equal(XTRScores(k=2, document_chunk_size=1)(q, d), XTRScores(k=2)(q, d))
    # the second document's maxima are negative: 0, unless all of its tokens are retrieved
    far = torch.stack([t([0.9, 0.1], [0.8, 0.2]), t([-0.5, -0.5], [-1.0, -1.0])])[None]
    assert XTRScores(k=3)(q, far)[0, 1] == 0
    assert XTRScores(k=4)(q, far)[0, 1] == pytest.approx(-1.0 / 1e-3)
    with pytest.raises(ValueError, match="k must be from 1 to the 4 document tokens of the batch, got 5"):
        XTRScores(k=5)(q, d)


def test_xtr_masks():
    q, far = t(E1)[None], torch.stack([t(GOOD, GOOD), t([-0.5, 0.0], [5.0, 0.0])])[None]
    mask = torch.tensor([[[1, 1], [1, 0]]])
    # exact: the masked token is absent, so all of the second document's tokens are retrieved
    assert XTRScores(k=3)(q, far, None, mask).tolist() == [[1.0, pytest.approx(-0.5 / 1e-3)]]
    assert XTRScores(k=3, padding="host")(q, far, None, mask).tolist() == [[1.0, 0.0]]
    assert XTRScores(k=4)(q, far, None, mask)[0, 1] == pytest.approx(-0.5 / 1e-3)
    assert XTRScores(k=2)(q, far, torch.tensor([[0.5]]), mask).tolist() == [[0.5, 0.0]]
    own = torch.randn(2, 3, 4, 8)
    q = torch.randn(2, 3, 8)
    every = XTRScores(k=6)(q, own)
    assert torch.equal(XTRKDScores(k=6)(q, own), torch.stack([every[0, :3], every[1, 3:]]))


def column(documents, kind="float32"):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    kind = pa.list_(pa.list_({"float32": pa.float32(), "float16": pa.float16()}[kind], 2))
    return pa, pa.array(
        [[[*map(np.float16, row)] for row in d] for d in documents] if kind == "float16" else documents, kind
    )


def test_lancedb_scan():
    pa, vectors = column([[E1], [BAD, E2], [], [E1, E2], [E1]])
    assert lancedb.scores(t(E1, E2), vectors).tolist() == [1.0, 1.0, -math.inf, 2.0, 1.0]
    assert lancedb.scores(t(BAD), vectors[1:], normalize=False).tolist() == pytest.approx([0.36, -math.inf, 0.0, -0.6])
    rows = pa.table({"id": range(5), "vector": vectors})
    for batches in (rows, iter(rows.to_batches(2)), pa.RecordBatchReader.from_batches(rows.schema, rows.to_batches(1))):
        best = lancedb.scan(batches, [E1, E2], 3)
        assert best["id"].to_pylist() == [3, 0, 1]
        assert best["_relevance_score"].to_pylist() == [2.0, 1.0, 1.0]
    assert lancedb.scan(best, [E1], 9).column_names == ["id", "vector", "_relevance_score"]
    assert len(lancedb.scan(rows[:0], [E1])) == 0
    with pytest.raises(ValueError, match="k must be an int >= 1, got 0"):
        lancedb.scan(rows, [E1], 0)
    with pytest.raises(ValueError, match="rows must have the column 'tokens'; they have id, vector"):
        lancedb.scan(rows, [E1], column="tokens")
    with pytest.raises(ValueError, match="query must be"):
        lancedb.scan(rows, [[E1]])
    with pytest.raises(ValueError, match="rows must hold a batch"):
        lancedb.scan([], [E1])


def test_lancedb_reranker_needs_lancedb(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lancedb", None)
    with pytest.raises(ImportError, match="pip install lancedb"):
        lancedb.maxsim_reranker([E1])
