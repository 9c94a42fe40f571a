"""First stages: what they keep of a document, and how they keep up with a store."""

import math

import pytest
import torch
import torch.nn.functional as F
from staged import DIM, KIND, LEMUR, MAKE, pages, questions, stored

import latemax
from latemax import (
    BinaryScan,
    Lemur,
    MeanPool,
    Muvera,
    PatchStore,
    RowPool,
    StoreWriter,
    first_stage_recall,
    topk,
    two_stage,
)
from latemax.search import FirstStage


@pytest.fixture(params=MAKE)
def make(request):
    made = MAKE[request.param]
    made.kind = KIND[request.param]
    return made


def test_planted_neighbours_are_among_the_candidates(make):
    items = pages()
    wanted = [i for i in range(0, 120, 4) if i != 7]
    q = questions(items, wanted)
    first = make(items)
    assert isinstance(first, FirstStage) and len(first) == 120 and first.bytes_per_document > 0
    found = first.first(q, None, 12)
    assert found.dtype == torch.int64 and found.shape == (30, 12)
    assert all(len(set(row)) == 12 for row in found.tolist())
    assert (found == torch.tensor(wanted).unsqueeze(1)).any(1).float().mean() > 0.9
    # by chance it would be 0.2
    assert first_stage_recall(q, items, 10, first, n_candidates=24).mean > 0.5
    every = two_stage(q, items, 5, first, n_candidates=120)
    assert torch.equal(every.indices, topk(q, items, 5).indices)


def test_fewer_documents_than_asked_for(make):
    items = pages(12)
    found = make(items, **(dict(width=8, solve=8) if make.kind is Lemur else {})).first(
        questions(items, [1, 2]), None, 15
    )
    assert (found[:, 12:] == -1).all() and sorted(found[0, :12].tolist()) == list(range(12))


def test_within(make):
    items, chosen = pages(), torch.tensor([3, 8, 40, 77, 90])
    q, first = questions(items, [8, 90]), make(items)
    found = first.first(q, None, 7, within=chosen)
    assert (found[:, 5:] == -1).all() and all(sorted(row[:5]) == chosen.tolist() for row in found.tolist())
    every = first.first(q, None, 120)
    for row, whole in zip(found.tolist(), every.tolist(), strict=True):
        assert row[:5] == [i for i in whole if i in chosen.tolist()]
    # as masks, as arrays, in another order and twice
    mask = torch.zeros(len(items), dtype=torch.bool).index_fill_(0, chosen, True)
    for within in (mask, mask.numpy(), chosen.numpy(), chosen.flip(0), torch.cat([chosen, chosen])):
        assert torch.equal(first.first(q.numpy(), None, 7, within=within), found)


def test_masked_query_tokens_have_no_influence(make):
    items = pages()
    q, first, mask = questions(items, [8, 90]), make(items), torch.tensor([[1, 1, 0, 1, 1]] * 2)
    poisoned = q.clone()
    poisoned[:, 2] = math.nan
    assert torch.equal(first.first(poisoned, mask, 20), first.first(q[:, [0, 1, 3, 4]], None, 20))


def test_a_seed_decides(make):
    if make.kind in (MeanPool, RowPool, BinaryScan):
        pytest.skip("draws nothing")
    items = pages()
    one, same, other = make(items, seed=3), make(items, seed=3), make(items, seed=4)
    assert torch.equal(one.vectors, same.vectors) and not torch.equal(one.vectors, other.vectors)


def test_normalize_makes_lengths_irrelevant(make):
    if make.kind is MeanPool:
        pytest.skip("ranks by cosine always")
    items = [item.float() for item in pages()]
    made = torch.Generator().manual_seed(5)
    scaled = [item * (0.1 + 3 * torch.rand(len(item), 1, generator=made)) for item in items]
    # of rows, means are taken first
    scaled = [item * 3 for item in items] if make.kind is RowPool else scaled
    q = questions(items, [8, 90, 33])
    one, other = make(items, normalize=True), make(scaled, normalize=True)
    assert torch.equal(one.first(q, None, 5), other.first(2 * q, None, 5))


def test_rows_of_a_grid(tmp_path):
    made = torch.Generator().manual_seed(0)
    tokens = [torch.randn(n, DIM, generator=made) for n in (12, 12, 0, 7)]
    with StoreWriter(tmp_path) as writer:
        writer.add(tokens[0], grid=(3, 4))
        writer.add(tokens[1], grid=(2, 6))
        writer.add(tokens[2])
        writer.add(tokens[3])
    first = RowPool(PatchStore(tmp_path))
    assert first.offsets.tolist() == [0, 3, 5, 5, 8]
    means = [tokens[0].view(3, 4, DIM).mean(1), tokens[1].view(2, 6, DIM).mean(1)]
    means += [torch.stack([tokens[3][:3].mean(0), tokens[3][3:5].mean(0), tokens[3][5:].mean(0)])]
    torch.testing.assert_close(first.columns["means"], F.normalize(torch.cat(means), dim=-1))


def fde(tokens, planes, signs, is_query):
    """The encoding of one set of tokens, as the paper defines it."""
    parts = []
    for plane, sign in zip(planes, signs, strict=True):
        sides = tokens @ plane > 0
        for cluster in range(2 ** plane.shape[1]):
            wanted = torch.tensor([bool(cluster >> bit & 1) for bit in range(plane.shape[1])])
            inside = (sides == wanted).all(1)
            if is_query:
                part = tokens[inside].sum(0)
            elif inside.any():
                part = tokens[inside].mean(0)
            else:
                differ = (sides != wanted).sum(1)
                # a tie in the number of sides goes to the lowest cluster, then to the first token
                numbers = (sides * 2 ** torch.arange(plane.shape[1])).sum(1)
                part = tokens[min(range(len(tokens)), key=lambda i: (differ[i], numbers[i], i))]
            parts.append(part @ sign)
    return torch.cat(parts)


@pytest.mark.parametrize(("bits", "projection"), [(3, 8), (0, 8), (2, DIM)])
def test_muvera_is_the_papers_encoding(bits, projection):
    items, q = [item.float() for item in pages(9)], questions(pages(9), [1, 2])
    first = Muvera(items, repetitions=3, bits=bits, projection=projection, engine="torch", memory=20_000)
    assert first.vectors.shape == (9, 3 * 2**bits * projection)
    for i, item in enumerate(items):
        expected = fde(item, first.planes, first.signs, False) if len(item) else torch.zeros(first.vectors.shape[1])
        torch.testing.assert_close(first.vectors[i], expected, rtol=1e-5, atol=1e-6)
    expected = torch.stack([fde(x, first.planes, first.signs, True) for x in q])
    torch.testing.assert_close(first._query(q, None), expected, rtol=1e-5, atol=1e-5)


def test_lemur_solves_least_squares_of_our_scores():
    items = pages()
    first = Lemur(items, engine="torch", **LEMUR)
    features = first._features(first.sample).double()
    wanted = latemax.maxsim(first.sample.unsqueeze(1), items, empty_score=0.0).double()
    damped = torch.cat([features, math.sqrt(1e-3 * float((features**2).sum(0).mean())) * torch.eye(64)])
    solved = torch.linalg.lstsq(damped.double(), torch.cat([wanted, torch.zeros(64, 120)])).solution
    torch.testing.assert_close(first.vectors.double(), solved.T, rtol=1e-3, atol=1e-4)
    # what was learned predicts better than the features it began with
    untrained = Lemur(items, engine="torch", **(LEMUR | dict(epochs=1, tokens=1)))
    left = [
        float(
            (
                x._features(items[20]) @ x.vectors.T - latemax.maxsim(items[20].unsqueeze(1), items, empty_score=0.0)
            ).std()
        )
        for x in (first, untrained)
    ]
    assert left[0] < left[1]


# in step with a store


def test_update_reads_what_is_new_and_equals_a_fresh_build(make, tmp_path, monkeypatch):
    from latemax.store.shards import Shard

    items = pages()
    store = stored(tmp_path, items)
    first = make(store)
    assert first.generation == store.generation
    with StoreWriter(tmp_path) as writer:
        for i in (0, 50, 119):
            writer.remove(f"page-{i}")
        writer.replace(items[1][:2], "page-9", grid=(1, 2))
        for i, item in enumerate(pages(3, seed=9)):
            writer.add(item, f"new-{i}", grid=(1, len(item)))
    q = questions(items, [8, 90])
    two_stage(q, store, 5, first)
    store.refresh()
    with pytest.raises(ValueError, match=r"first must be of (this corpus|generation)"):
        two_stage(q, store, 5, first)
    with pytest.raises(ValueError, match=r"first must be of (this corpus|generation)"):
        first_stage_recall(q, store, 5, first)
    read, real = [], Shard.read
    monkeypatch.setattr(Shard, "read", lambda self, *at: read.append(len(at[-1])) or real(self, *at))
    first.update(store)
    assert sum(read) == 2 + sum(map(len, pages(3, seed=9)))
    monkeypatch.undo()
    assert first.generation == store.generation and len(first) == 120
    if make.kind is not Lemur:
        fresh = make(store)
        assert torch.equal(first.offsets, fresh.offsets)
        assert all(torch.equal(first.columns[name], fresh.columns[name]) for name in fresh.columns)
    else:
        tokens = torch.cat(list(store))
        again = {"vectors": torch.empty(120, 64)}
        first._encode(tokens, store.offsets, torch.ones(120, dtype=torch.int64), again)
        torch.testing.assert_close(first.vectors, again["vectors"], rtol=1e-4, atol=1e-5)
    whole = two_stage(q, store, 5, first, n_candidates=120)
    assert torch.equal(whole.indices, topk(q, store, 5).indices)


def test_the_same_number_of_documents_of_another_generation(make, tmp_path):
    items = pages()
    store = stored(tmp_path, items)
    first = make(store)
    with StoreWriter(tmp_path) as writer:
        writer.replace(items[3], "page-9", grid=(1, len(items[3])))
    store.refresh()
    with pytest.raises(ValueError, match=rf"generation {store.generation} of .*; it is of another generation, "):
        two_stage(questions(items, [8]), store, 5, first)


def test_update_after_compact_and_of_another_store(make, tmp_path):
    items = pages()
    stored(tmp_path / "a", items)
    store = PatchStore(tmp_path / "a")
    first = make(store)
    del store
    with StoreWriter(tmp_path / "a") as writer:
        writer.remove("page-3")
        writer.compact()
    other = stored(tmp_path / "b", pages(120, seed=7))
    # the other one has the same numbers of rows
    for store in (other, PatchStore(tmp_path / "a")):
        first.update(store)
        if make.kind is not Lemur:
            assert all(torch.equal(first.columns[name], column) for name, column in make(store).columns.items())
        found = two_stage(questions(items, [8]), store, 4, first, n_candidates=120)
        assert torch.equal(found.indices, topk(questions(items, [8]), store, 4).indices)
    narrow = [item[:, :8] for item in items]
    with pytest.raises(ValueError, match="store must have the dim of this first stage, 24; got 8"):
        first.update(narrow)


def test_save_and_load(make, tmp_path):
    items = pages()
    store = stored(tmp_path / "store", items)
    first, path, q = make(store), tmp_path / "store" / "kept.first", questions(items, [8, 90])
    first.save(path)
    again = make.kind.load(path)
    assert again.generation == store.generation and len(again) == 120
    assert torch.equal(again.first(q, None, 30), first.first(q, None, 30))
    assert torch.equal(two_stage(q, store, 5, again).indices, two_stage(q, store, 5, first).indices)
    with StoreWriter(tmp_path / "store") as writer:
        writer.add(items[2], "late", grid=(1, len(items[2])))
    store.refresh()
    with pytest.raises(ValueError, match="call its update"):
        two_stage(q, store, 5, again)
    again.update(store)
    first.update(store)
    assert all(torch.equal(again.columns[name], column) for name, column in first.columns.items())
    # onto the file that its own rows are mapped from
    again.save(path)
    assert len(make.kind.load(path)) == 121 and len(list(tmp_path.glob("store/.kept*"))) == 0
    store.verify()


def test_load_refuses_what_is_no_first_stage(tmp_path):
    path = tmp_path / "x.first"
    with pytest.raises(FileNotFoundError, match=r"x\.first"):
        MeanPool.load(path)
    MeanPool(pages(), engine="torch").save(path)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=r"x\.first must hold a RowPool of version 1, got 'MeanPool'"):
        RowPool.load(path)
    for content in (b"", b"no", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.first is no first stage"):
            MeanPool.load(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match=r"x\.first is no first stage"):
        MeanPool.load(path)


def test_a_failed_save_leaves_the_file_before(tmp_path, monkeypatch):
    first, path = MeanPool(pages(), engine="torch"), tmp_path / "x.first"
    first.save(path)
    before, plain = path.read_bytes(), tmp_path / "plain"
    plain.touch()
    # whoever may read other new files may read this one
    assert path.stat().st_mode == plain.stat().st_mode
    plain.unlink()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        first.save(path)
    assert path.read_bytes() == before and [x.name for x in tmp_path.iterdir()] == ["x.first"]


# HNSW finds the largest inner products only of vectors of one length
@pytest.mark.parametrize(
    ("kind", "factory"), [("MeanPool", "Flat"), ("Muvera", "Flat"), ("Lemur", "Flat"), ("MeanPool", "HNSW16")]
)
def test_faiss_finds_what_torch_finds(kind, factory, tmp_path):
    pytest.importorskip("faiss", reason="faiss is not installed")
    items = pages()
    q = questions(items, [8, 90, 33])
    options = LEMUR if kind == "Lemur" else {}
    first, plain = (
        KIND[kind](items, **engine, **options)
        for engine in (dict(engine="faiss", factory=factory), dict(engine="torch"))
    )
    assert first.engine == "faiss" and torch.equal(first.vectors, plain.vectors)
    assert torch.equal(first.first(q, None, 5), plain.first(q, None, 5))
    first.save(tmp_path / "x")
    assert torch.equal(KIND[kind].load(tmp_path / "x").first(q, None, 5), plain.first(q, None, 5))
