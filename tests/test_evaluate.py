"""BinaryScan, what `retention` measures, and `latemax evaluate`."""

import json
import math

import pytest
import torch

from latemax import BinaryScan, PatchStore, StoreWriter, first_stage_recall, maxsim, quantize, topk, two_stage
from latemax.cli.main import main
from latemax.search import ndcg, overlap, retention
from latemax.store import Packed

DIM = 24


def documents(n=80, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (n,), generator=generator).tolist()
    return [torch.randn(DIM, generator=generator) + 0.5 * torch.randn(m, DIM, generator=generator) for m in lengths]


def queries(items, n_q=4):
    return torch.stack(
        [items[i][0] + 0.2 * torch.randn(3, DIM, generator=torch.Generator().manual_seed(i)) for i in range(n_q)]
    )


@pytest.fixture
def store(tmp_path):
    with StoreWriter(tmp_path / "store", codes="int8", shard_bytes=5000) as writer:
        for i, item in enumerate(documents()):
            writer.add(item, f"page-{i}")
    return PatchStore(tmp_path / "store")


def test_one_bit_codes_as_a_first_stage(store):
    items = documents()
    q = queries(items)
    codes = [quantize(x, "binary") for x in items]
    expected = maxsim(q, codes).topk(9).indices
    for corpus in (items, Packed.of(items), store):
        first = BinaryScan(corpus, memory=40_000)
        assert torch.equal(first.first(q, None, 9), expected)
        assert torch.equal(first.tokens.codes, torch.cat([x.codes for x in codes]))
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0], [0, 1, 1]])
    assert torch.equal(first.first(q, mask, 9), maxsim(q, codes, mask).topk(9).indices)
    within = torch.tensor([3, 7, 50])
    found = first.first(q, None, 5, within=within)
    assert (found[:, 3:] == -1).all() and (found[:, :3].sort().values == within).all()
    everything = two_stage(q, store, 6, first, n_candidates=80)
    assert torch.equal(everything.indices, topk(q, store, 6).indices)
    inside = two_stage(q, store, 2, first, n_candidates=20, within=within)
    assert torch.equal(inside.indices, topk(q, store, 2, within=within).indices)
    assert first_stage_recall(q, store, 5, first, n_candidates=20).mean > 0.9


def test_codes_of_eight_bits_become_one(tmp_path):
    items = documents()
    with StoreWriter(tmp_path, dtype="int8") as writer:
        for item in items:
            writer.add(item, quantize=True)
    first = BinaryScan(PatchStore(tmp_path))
    assert torch.equal(first.tokens.codes, quantize(quantize(torch.cat(items)).dequantize(), "binary").codes)


def test_measures():
    exact = torch.tensor([[4, 2, 9], [1, 0, 5]])
    assert overlap(torch.tensor([[9, 4, 1, 7], [5, 0, 1, -1]]), exact).tolist() == pytest.approx([2 / 3, 1.0])
    gains = [{4: 3.0, 2: 2.0, 9: 1.0}, {}]
    found = ndcg(torch.tensor([[2, 7, 4], [1, 0, 5]]), gains, 3)
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    assert float(found[0]) == pytest.approx((2 + 3 / 2) / ideal) and found[1].isnan()
    assert float(ndcg(exact[:1], gains[:1], 3)) == pytest.approx(1.0)
    assert float(ndcg(torch.tensor([[2, 7, 4]]), gains[:1], 2)) == pytest.approx(2 / (3 + 2 / math.log2(3)))


def test_what_is_kept_of_the_exact_ranking(store):
    items = documents()
    rows = {row.method: row for row in retention(queries(items), store, 5, n_candidates=20)}
    names = [
        "exact",
        "exact, from codes",
        "int8",
        "one bit",
        "mean pool",
        "one bit, 20 rescored",
        "mean pool, 20 rescored",
    ]
    assert list(rows) == names
    tokens = store.n_tokens / len(store)
    assert rows["exact"].bytes == pytest.approx(tokens * DIM * 4) and rows["one bit"].bytes == pytest.approx(tokens * 7)
    for name in ("exact", "exact, from codes"):
        assert rows[name].overlap == rows[name].ndcg == pytest.approx(1.0), name
    assert rows["one bit, 20 rescored"].overlap >= rows["one bit"].overlap > 0.4
    assert rows["int8"].overlap > 0.9 and rows["mean pool"].overlap > 0.2
    assert all(row.ms > 0 and row.indices.shape == (4, 5) for row in rows.values())
    # without codes in the store they are made
    plain = {row.method: row for row in retention(queries(items), items, 5)}
    assert torch.equal(plain["int8"].indices, rows["int8"].indices) and "exact, from codes" not in plain


def test_a_token_that_is_not_finite_is_named():
    items = documents()
    q = queries(items)
    items[70] = torch.full((3, DIM), 1.0)
    items[70][1, 4] = math.nan
    with pytest.raises(ValueError, match="token 1 of document 70 holds NaN or infinity"):
        retention(q, items, 5, n_candidates=20, memory=40_000)


def test_the_command(store, tmp_path, capsys):
    items = documents()
    torch.save(queries(items), tmp_path / "q.pt")
    torch.save(items[0][:1], tmp_path / "one.pt")
    arguments = ["evaluate", str(store.path), "--queries", str(tmp_path / "q.pt"), str(tmp_path / "one.pt"), "-k", "5"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["documents"] == 80 and found["queries"] == 5 and found["k"] == 5
    assert set(found["rows"][0]) == {"method", "overlap", "ndcg", "bytes", "ms"}
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "top 5 kept" in text and "one bit, 50 rescored" in text
    assert main([*arguments, "--plot", str(tmp_path / "no" / "plot.png")]) == 1
    assert "no such folder" in capsys.readouterr().err
    if pytest.importorskip("matplotlib", reason="the plot needs matplotlib"):
        assert main([*arguments, "--plot", str(tmp_path / "plot.png")]) == 0
        assert (tmp_path / "plot.png").stat().st_size > 5000


def test_wrong_queries_are_named(store, tmp_path, capsys):
    torch.save(torch.zeros(2, DIM), tmp_path / "a.pt")
    torch.save(torch.zeros(2, 3), tmp_path / "b.pt")
    for files, words in (
        (["a.pt", "b.pt"], "queries must have one dim, got 3, 24"),
        (["none.pt"], "no such file"),
        (["page.png"], "does not say which model made it"),
    ):
        assert main(["evaluate", str(store.path), "--queries", *(str(tmp_path / name) for name in files)]) == 1
        assert words in capsys.readouterr().err


def judgements(path, store, q):
    """Relevant: the exact best two of each query, the first one twice; a query that is not asked is ignored."""
    rows = topk(q, store, 2).indices.tolist()
    lines = [f"q.pt#{i} 0 {store.ids[x]} {2 - rank}" for i, row in enumerate(rows) for rank, x in enumerate(row)]
    path.write_text("\n".join([*lines, "", "other 0 page-1 1"]) + "\n")


def test_judged_queries(store, tmp_path, capsys):
    pytest.importorskip("pytrec_eval", reason="ir-measures is not installed")
    pytest.importorskip("ir_measures", reason="ir-measures is not installed")
    q = queries(documents())
    torch.save(q, tmp_path / "q.pt")
    judgements(tmp_path / "qrels", store, q)
    arguments = ["evaluate", str(store.path), "--queries", str(tmp_path / "q.pt"), "--qrels", str(tmp_path / "qrels")]
    arguments += ["-k", "5", "--candidates", "80", "--stages", "mean", "row", "muvera"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row["relevance"] for row in found["rows"]}
    assert found["judged"] == 4 and {"row pool", "Muvera", "Muvera, 80 rescored", "int8"} <= set(rows)
    for name in ("exact", "mean pool, 80 rescored", "Muvera, 80 rescored"):
        assert rows[name] == {"ndcg": 1.0, "recall": 1.0, "mrr": 1.0}, name
    # our own nDCG says the same of a ranking that is not perfect
    gains = [{i: float(2 - rank) for rank, i in enumerate(row)} for row in topk(q, store, 2).indices.tolist()]
    pooled = {row.method: row for row in retention(q, store, 5, stages=["mean"])}["mean pool"]
    assert rows["mean pool"]["ndcg"] == pytest.approx(float(ndcg(pooled.indices, gains, 5).mean()), abs=1e-6) != 1
    assert main(arguments) == 0
    assert "4 of them judged" in (text := capsys.readouterr().out) and "recall@5" in text and "MRR@5" in text
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    assert main([*arguments, "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("q.pt#0 page-1\n", "line 1 must be: query 0 document relevance"),
        ("\nq.pt#0 0 page-1 high\n", "line 2 must be"),
        ("", "holds no judgement"),
        ("q.pt 0 page-1 1\n", "names of their own; 'q.pt' is the name of two"),
        ("nobody 0 page-1 1\n", "no query has judgements: queries are 'q.pt#0'"),
    ],
)
def test_wrong_judgements_are_named(store, tmp_path, capsys, monkeypatch, text, words):
    monkeypatch.setattr("latemax.cli.evaluate.measuring", lambda: None)
    torch.save(queries(documents()), tmp_path / "q.pt")
    (tmp_path / "qrels").write_text(text)
    files = [tmp_path / "q.pt", tmp_path / "a" / "q.pt", tmp_path / "b" / "q.pt"]
    for file in files[1:]:
        file.parent.mkdir()
        torch.save(queries(documents())[0], file)
    arguments = ["evaluate", str(store.path), "--queries", *map(str, files), "--qrels", str(tmp_path / "qrels")]
    assert main(arguments) == 1
    assert words in capsys.readouterr().err


def test_judgements_need_ir_measures(store, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ir_measures", None)
    arguments = ["evaluate", str(store.path), "--queries", "q.pt", "--qrels", str(tmp_path / "qrels")]
    assert main(arguments) == 1
    assert '--qrels needs ir-measures: pip install "latemax[eval]"' in capsys.readouterr().err


def test_tabs_separate_ids_with_spaces(tmp_path):
    from latemax.cli.qrels import read

    (tmp_path / "qrels").write_text("a b\t0\tpage one\t1\na b\tpage two\t0\n")
    assert read(str(tmp_path / "qrels")) == {"a b": {"page one": 1, "page two": 0}}


def test_an_unknown_stage_is_named(store):
    with pytest.raises(ValueError, match="stages must be of binary, mean, row, muvera, lemur; got 'best'"):
        retention(queries(documents()), store, 5, stages=["best"])
