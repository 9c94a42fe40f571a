"""latemax.compat without a host: edge rules with values worked out by hand, and patch on a host made here."""

import inspect
import logging
import math
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import latemax.compat
from latemax.arguments.rows import nonzero_rows
from latemax.compat import colpali_engine, pylate, sentence_transformers, transformers
from latemax.compat._targets import HOSTS
from latemax.compat.pylate import XTRScores

E1, E2 = [1.0, 0.0], [0.0, 1.0]
# against E1: 1, -0.6, and a zero row that must not win over -0.6
GOOD, BAD, ZERO = [1.0, 0.0], [-0.6, 0.0], [0.0, 0.0]


def t(*rows):
    return torch.tensor(rows)


@pytest.mark.parametrize(
    "score", [colpali_engine.score_multi_vector, transformers.score_retrieval], ids=["colpali", "transformers"]
)
def test_retrieval_zero_padding(score):
    query = [t(E1)]
    for pages in ([t(BAD), t(GOOD, GOOD)], torch.stack([t(BAD, ZERO), t(GOOD, GOOD)])):
        assert score(query, pages).tolist() == [[pytest.approx(-0.6), 1.0]]
        assert score(query, pages, padding="host").tolist() == [[0.0, 1.0]]
    # a batch of one is not padded
    assert score(query, [t(BAD), t(GOOD, GOOD)], batch_size=1, padding="host")[0, 0] == pytest.approx(-0.6)
    assert score(query, [t(BAD), torch.zeros(0, 2)]).tolist() == [[pytest.approx(-0.6), 0.0]]


@pytest.mark.parametrize(
    "score", [colpali_engine.score_multi_vector, transformers.score_retrieval], ids=["colpali", "transformers"]
)
def test_retrieval_refuses_empty_sets_and_options(score):
    with pytest.raises(ValueError, match="No queries provided"):
        score([], [t(E1)])
    with pytest.raises(ValueError, match="No passages provided"):
        score([t(E1)], [])
    with pytest.raises(ValueError, match="padding must be 'exact' or 'host'; got 'zero'"):
        score([t(E1)], [t(E1)], padding="zero")
    with pytest.raises(ValueError, match="batch_size must be an int >= 1, got 0"):
        score([t(E1)], [t(E1)], batch_size=0)


def test_retrieval_dtypes():
    q, d = torch.randn(2, 3, 8).bfloat16(), torch.randn(3, 4, 8).bfloat16()
    assert colpali_engine.score_multi_vector(q, d).dtype == torch.float32
    assert transformers.score_retrieval(q, d).dtype == torch.bfloat16
    assert transformers.score_retrieval(q, d, output_dtype=torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match="same dtype"):
        transformers.score_retrieval(q, d.float())


def test_colpali_losses():
    q, d = t(E1)[None], torch.stack([t(BAD, ZERO), t(ZERO, ZERO), t(GOOD, ZERO)])
    assert colpali_engine.maxsim_inbatch(q, d).tolist() == [[pytest.approx(-0.6), 0.0, 1.0]]
    assert colpali_engine.maxsim_inbatch(q, d, padding="host").tolist() == [[0.0, 0.0, 1.0]]
    assert colpali_engine.maxsim_kd(q, d[None]).tolist() == [[pytest.approx(-0.6), 0.0, 1.0]]
    assert colpali_engine.maxsim_kd(q.bfloat16(), d[None].bfloat16()).dtype == torch.float32
    assert colpali_engine.maxsim_kd(q.bfloat16(), d[None].bfloat16(), padding="host").dtype == torch.bfloat16


def test_colpali_smooth_losses():
    loss = SimpleNamespace(use_smooth_max=True, tau=0.1, normalize_scores=False)
    q, d = t(E1)[None], torch.stack([t(BAD, ZERO), t(ZERO, ZERO), t(GOOD, ZERO)])
    assert colpali_engine.inbatch_scores(loss, q, d).tolist() == [[pytest.approx(-0.6), 0.0, 1.0]]
    host = [0.1 * math.log(math.exp(s / 0.1) + 1) for s in (-0.6, 0.0, 1.0)]
    assert colpali_engine.inbatch_scores(loss, q, d, padding="host").tolist() == [pytest.approx(host, abs=1e-6)]
    assert colpali_engine.inbatch_scores(loss, q.bfloat16(), d.bfloat16(), padding="host").dtype == torch.bfloat16


def test_nonzero_rows():
    tiny = torch.full((2,), 1e-30)  # its squared norm underflows
    x = torch.stack([torch.zeros(2), tiny, torch.tensor([math.nan, 0.0])])[None]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert nonzero_rows(x.to(dtype)).tolist() == [[False, True, True]]
    assert nonzero_rows(x[:, 1:]) is None
    # few rows begin with 0: a zero row, one of negative numbers, one of NaN
    x = torch.ones(100, 3)
    x[7:10] = torch.tensor([[0.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, math.nan, 0.0]])
    for many in (x, x[6:10]):
        assert (~nonzero_rows(many)).nonzero().tolist() == [[7 - 6 * (many is not x)]]
    # several blocks, rows that start with 0 without being zero, negative zeros
    x = torch.randn(40, 90, 8)
    x[..., 0], x[:, 70:], x[3, 80:] = 0.0, -0.0, math.inf
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for view in (x.to(dtype), x.to(dtype)[:, 60:], x.to(dtype).transpose(0, 1), x[:1].to(dtype).expand(3, -1, -1)):
            given = view.clone()
            assert torch.equal(nonzero_rows(view), given.ne(0).any(-1))
            assert torch.equal(view, given)


@pytest.mark.parametrize("dim", [4, 6, 20, 24, 128])
@pytest.mark.parametrize("by_torch", [False, True])
def test_nonzero_rows_of_any_width(by_torch, dim, monkeypatch):
    monkeypatch.setattr("latemax.arguments.rows.ROWS", 7)
    if by_torch:
        monkeypatch.setattr("latemax.ops.backends.native._cpu", None)
    x = torch.zeros(5, 9, dim)
    x[torch.arange(45).view(5, 9) % 3 == 0, dim // 2] = -1.0
    x[torch.arange(45).view(5, 9) % 5 == 0, -1] = math.nan
    x[4, :, 0] = -0.0
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert torch.equal(nonzero_rows(x.to(dtype)), x.ne(0).any(-1))


@pytest.mark.parametrize("form", ["float", "bool", "int", "numpy", "list", "broadcast"])
def test_sentence_transformers_masks(form):
    a, b = t(E1, E2)[None], torch.stack([t(E1, E2), t(E1, [0.0, 2.0])])
    mask = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    mask = {
        "bool": mask.bool(), "int": mask.int(), "numpy": mask.numpy(), "list": [*mask], "broadcast": mask[:1]
    }.get(form, mask)  # fmt: skip
    assert sentence_transformers.maxsim(a, b, b_mask=mask).tolist() == [[1.0, 1.0]]
    assert sentence_transformers.maxsim(list(a), list(b), b_mask=mask).tolist() == [[1.0, 1.0]]
    assert sentence_transformers.maxsim(b, b, a_mask=mask).tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_sentence_transformers_weights_multiply():
    a, b = t(E1, E2)[None], t(E1, E2)[None]
    weights = torch.tensor([[0.5, 3.0]], requires_grad=True)
    score = sentence_transformers.maxsim(a, b, a_mask=weights)
    assert score.tolist() == [[3.5]]
    score.sum().backward()
    assert weights.grad.tolist() == [[1.0, 1.0]]
    assert sentence_transformers.maxsim(a.bfloat16(), b.bfloat16(), a_mask=weights.detach()).tolist() == [[3.5]]
    assert sentence_transformers.mean_maxsim(a, b, a_mask=weights.detach()).tolist() == [[1.75]]
    with pytest.raises(ValueError, match="nonnegative"):
        sentence_transformers.maxsim(a, b, a_mask=torch.tensor([[1.0, -1.0]]))


def test_sentence_transformers_empty(caplog):
    sentence_transformers._warn_empty_documents.cache_clear()
    empty, full = torch.zeros(0, 2), t(E1)
    with caplog.at_level(logging.WARNING):
        scores = sentence_transformers.maxsim([full, empty], [full, empty])
    assert scores.tolist() == [[1.0, -1e9], [0.0, -1e9]]
    assert len(caplog.records) == 1
    zeros = torch.stack([full, torch.zeros(1, 2)])
    assert sentence_transformers.maxsim(full, zeros).tolist() == [[1.0, -1e9]]
    assert sentence_transformers.maxsim([full], list(zeros)).tolist() == [[1.0, 0.0]]
    assert sentence_transformers.maxsim_pairwise([full, full], [full, empty]).tolist() == [1.0, -1e9]
    assert sentence_transformers.maxsim(torch.zeros(2, 0, 2), zeros).tolist() == [[0.0, -1e9]] * 2
    assert sentence_transformers.maxsim([], [full]).shape == (0, 1)
    assert sentence_transformers.maxsim_pairwise([], []).shape == (0,)


def test_sentence_transformers_refuses_masks():
    a = t(E1, E2)[None]
    with pytest.raises(ValueError, match=r"`a_mask` covers 3 tokens, but the padded embeddings have 2\."):
        sentence_transformers.maxsim(a, a, a_mask=torch.ones(1, 3))
    with pytest.raises(TypeError, match="`b_mask` must be a tensor, an ndarray, or a list"):
        sentence_transformers.maxsim(a, a, b_mask="ones")
    with pytest.raises(ValueError, match="same number of items to score as pairs, got 1 and 2"):
        sentence_transformers.maxsim_pairwise(a, torch.cat([a, a]))


def test_sentence_transformers_mask_next_to_a_list():
    documents, mask = [t(BAD), t(GOOD, GOOD)], torch.ones(2, 2)
    assert sentence_transformers.maxsim(t(E1), documents, b_mask=mask)[0, 0] == pytest.approx(-0.6)
    assert sentence_transformers.maxsim(t(E1), documents, b_mask=mask, padding="host")[0, 0] == 0.0


def test_groups_are_query_major():
    q, d = torch.randn(2, 3, 4), torch.randn(2, 5, 6, 4)
    wanted = latemax.maxsim(q, d.flatten(0, 1))
    assert torch.equal(sentence_transformers.colbert_scores(q, d), wanted)
    assert torch.equal(pylate.ColBERTScores()(q, d), wanted)
    assert torch.equal(sentence_transformers.colbert_kd_scores(q, d), latemax.maxsim(q, d))
    assert torch.equal(pylate.colbert_kd_scores(q, d), latemax.maxsim(q, d))


def test_pylate_masks():
    q, d, mask = t(E1)[None], torch.stack([t(BAD, GOOD)]), torch.tensor([[1.0, 0.0]])
    assert pylate.colbert_scores(q, d, None, mask).tolist() == [[pytest.approx(-0.6)]]
    assert pylate.colbert_scores(q, d, None, mask, padding="host").tolist() == [[0.0]]
    assert pylate.colbert_scores(q, d, torch.tensor([[0.5]])).tolist() == [[0.5]]
    assert pylate.colbert_scores(q.bfloat16(), d.bfloat16(), padding="host").dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"documents_mask must be \[1, 2\] or broadcast to it; got shape \[1, 3\]"):
        pylate.colbert_scores(q, d, None, torch.ones(1, 3))
    with pytest.raises(ValueError, match="backend must be one of"):
        pylate.colbert_scores(q, d, backend="cuda")


def test_pylate_rerank():
    documents = [[np.array([BAD], dtype=np.float32), np.array([GOOD, GOOD], dtype=np.float32)], []]
    ranked = pylate.rerank([["a", "b"], []], [np.array([E1], dtype=np.float32)] * 2, documents)
    assert ranked == [[{"id": "b", "score": 1.0}, {"id": "a", "score": pytest.approx(-0.6)}], []]
    host = pylate.rerank([["a", "b"]], [t(E1)], documents[:1], padding="host")
    assert host == [[{"id": "b", "score": 1.0}, {"id": "a", "score": 0.0}]]


def test_pylate_pairs_are_cut_as_by_zip():
    q, d = [t(E1), t(E2)], [t(GOOD), t(E2), t(E1)]
    assert pylate.colbert_scores_pairwise(q, d).tolist() == [1.0, 1.0]


def test_importing_imports_no_host():
    program = (
        "import sys, latemax; before = set(sys.modules); import latemax.compat; "
        + "; ".join(f"import latemax.compat.{host}" for host in (*HOSTS, "lancedb"))
        + "; added = {m.split('.')[0] for m in set(sys.modules) - before} - {'latemax'}; "
        + f"assert not added & { ({*HOSTS, 'lancedb', 'pyarrow'})!r}, added"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# A host: two modules bind its function, one as a default; its parameters are PyLate's.
FAKE = {
    "__init__.py": "",
    "scores/__init__.py": "from .colbert import colbert_scores, colbert_kd_scores",
    "scores/colbert.py": """
        def colbert_scores(
            queries_embeddings, documents_embeddings, queries_mask=None, documents_mask=None, backend=None
        ):
            return "host"
        def colbert_kd_scores(
            queries_embeddings, documents_embeddings, queries_mask=None, documents_mask=None, backend=None
        ):
            return "host"
        def colbert_scores_pairwise(queries_embeddings, documents_embeddings, backend=None):
            return "host"
        class ColBERTScores:
            def __call__(
                self, queries_embeddings, documents_embeddings, queries_mask=None, documents_mask=None, backend=None
            ):
                return "host"
    """,
    "scores/xtr.py": """
        class XTRScores:
            def __init__(self, k=256, document_chunk_size=None):
                self.k, self.document_chunk_size = k, document_chunk_size
            def _score(self, queries_embeddings, documents_embeddings, queries_mask, documents_mask):
                return "host"
    """,
    "rank/__init__.py": "from .rank import rerank",
    "rank/rank.py": """
        def rerank(documents_ids, queries_embeddings, documents_embeddings, device=None):
            return "host"
    """,
    "losses.py": """
        from .scores import colbert_kd_scores
        class Distillation:
            def __init__(self, metric=colbert_kd_scores, *, other=colbert_kd_scores):
                self.metric, self.other = metric, other
    """,
    "later.py": "from .scores import colbert_scores",
}


@pytest.fixture
def host(tmp_path, monkeypatch):
    def install(**changed):
        for name, text in {**FAKE, **changed}.items():
            (tmp_path / "pylate" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "pylate" / name).write_text(textwrap.dedent(text))
        import pylate.losses
        import pylate.rank
        import pylate.scores.xtr

        return pylate

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "pylate"]:
            del sys.modules[name]

    forget()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield install
    if "pylate" in latemax.compat._patching._active:
        latemax.compat._patching._active["pylate"].undo()
    forget()


def test_patch_and_undo(host):
    fake = host()
    q, d = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    with latemax.compat.patch("pylate") as handle:
        import pylate.later

        assert torch.equal(fake.scores.colbert_scores(q, d), latemax.maxsim(q, d))
        assert torch.equal(pylate.later.colbert_scores(q, d), latemax.maxsim(q, d))
        assert torch.equal(fake.scores.colbert.ColBERTScores()(q, d[:, None]), latemax.maxsim(q, d))
        found = fake.scores.xtr.XTRScores(k=3)._score(q, d[:, None], None, None)
        assert torch.equal(found, XTRScores(k=3)(q, d[:, None]))
        loss = fake.losses.Distillation()
        assert torch.equal(loss.metric(q, d[:, None]), latemax.maxsim(q, d[:, None]))
        assert loss.other is loss.metric is fake.losses.colbert_kd_scores
        assert fake.rank.rerank([["a"]], [q[0]], [[d[0]]])[0][0]["id"] == "a"
        assert latemax.compat.patch("pylate") is handle
        with pytest.raises(RuntimeError, match="patched with padding='exact'"):
            latemax.compat.patch("pylate", padding="host")
        assert "active" in repr(handle)
    assert "undone" in repr(handle)
    loss = fake.losses.Distillation()
    bound = (
        fake.scores.colbert_scores, fake.scores.colbert.colbert_scores, pylate.later.colbert_scores, loss.metric,
        loss.other, fake.losses.colbert_kd_scores, fake.scores.colbert.ColBERTScores(),
    )  # fmt: skip
    assert [f(q, d) for f in bound] == ["host"] * len(bound)
    assert fake.rank.rerank([], [], []) == "host"
    handle.undo()


def test_patch_passes_padding(host):
    fake = host()
    q, d, mask = t(E1)[None], torch.stack([t(BAD, GOOD)]), torch.tensor([[1.0, 0.0]])
    with latemax.compat.patch("pylate", padding="host"):
        assert fake.scores.colbert_scores(q, d, documents_mask=mask).tolist() == [[0.0]]


def test_patch_refuses_a_version_without_a_target(host):
    host(**{"rank/rank.py": "rerank = None"})
    with pytest.raises(RuntimeError, match=r"has no function pylate\.rank\.rank\.rerank"):
        latemax.compat.patch("pylate")
    assert sys.modules["pylate.scores"].colbert_scores(0, 0) == "host"


def test_patch_refuses_other_parameters(host):
    host(**{"rank/rank.py": "def rerank(ids, queries): ..."})
    with pytest.raises(RuntimeError, match=r"rank\.rerank of pylate .* takes \(ids, queries\)"):
        latemax.compat.patch("pylate")


def test_patch_refuses_unknown_and_missing_hosts(monkeypatch):
    with pytest.raises(ValueError, match=r"host must be one of .*; got 'faiss'"):
        latemax.compat.patch("faiss")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pylate is not installed"):
        latemax.compat.patch("pylate")


@pytest.mark.parametrize("name", HOSTS)
def test_every_target_has_a_function_with_padding(name):
    module = __import__(f"latemax.compat.{name}", fromlist=["x"])
    for target in HOSTS[name].targets:
        parameter = inspect.signature(getattr(module, target.ours)).parameters["padding"]
        assert parameter.default == "exact" and parameter.kind is parameter.KEYWORD_ONLY


def test_masked_query_tokens_with_nan_have_no_influence():
    q, mask = t(E1, [math.nan, 0.0])[None], torch.tensor([[1.0, 0.0]])
    assert pylate.colbert_scores(q, t(GOOD)[None], mask).tolist() == [[1.0]]
    assert pylate.colbert_scores(q, t(GOOD)[None], mask, padding="host").isnan().all()
    assert sentence_transformers.maxsim(q, t(GOOD)[None], mask).tolist() == [[1.0]]
