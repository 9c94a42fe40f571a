"""The store: what was committed is there after any kill, damage is named, and conversions share memory."""

import os
import sys
from pathlib import Path

import pytest
import torch

from latemax.store import (
    Packed,
    PatchStore,
    StoreError,
    StoreWriter,
    from_arrow,
    from_qdrant,
    to_arrow,
    to_qdrant,
)

pytest.importorskip("safetensors", reason="stores are written with safetensors")
HERE = Path(__file__).parent
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def documents(lengths=(3, 0, 5, 1, 7), dim=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, dim, generator=generator).to(dtype) for length in lengths]


def shards(folder):
    return sorted(folder.glob("shard-*.safetensors"))


def make(folder, items, ids=None, **options):
    with StoreWriter(folder, **options) as writer:
        for i, item in enumerate(items):
            writer.add(item, None if ids is None else ids[i])
    return PatchStore(folder)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shard_bytes", [1, 100, 1 << 20], ids=["a-shard-each", "some", "one"])
def test_documents_come_back(dtype, shard_bytes, tmp_path):
    items = documents(dtype=dtype)
    store = make(tmp_path, items, shard_bytes=shard_bytes)
    assert len(store) == 5 and store.dim == 8 and store.dtype == dtype and store.n_tokens == 16
    assert all(torch.equal(a, b) for a, b in zip(store, items, strict=True))
    assert torch.equal(store[-1], items[-1]) and store.ids == list(range(5))
    assert store.offsets.tolist() == [0, 3, 3, 8, 9, 16]
    with pytest.raises(IndexError, match="document 5 of 5"):
        store[5]
    store.verify()


def test_runs_are_read_into_the_callers_buffer(tmp_path):
    items = documents()
    store = make(tmp_path, items, shard_bytes=100)
    for a in range(6):
        for b in range(a, 6):
            out = torch.full((sum(map(len, items[a:b])), 8), torch.nan)
            store.read(a, b, out)
            assert torch.equal(out, torch.cat([torch.empty(0, 8), *items[a:b]]))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise here")
def test_scattered_documents_are_announced_before_the_first_is_read(tmp_path, monkeypatch):
    """A disk then finds several at a time."""
    store, events = make(tmp_path, documents(), shard_bytes=100), []
    advise, read = os.posix_fadvise, os.preadv
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *rest: events.append("will") or advise(fd, *rest))
    monkeypatch.setattr(os, "preadv", lambda *rest: events.append("read") or read(*rest))
    chosen, out = torch.tensor([0, 2, 4]), torch.empty(15, 8)
    store.snapshot().read_some(chosen.numpy(), out)
    assert events == ["will"] * 3 + ["read"] * 3
    assert torch.equal(out, torch.cat([documents()[i] for i in (0, 2, 4)]))
    events.clear()
    store.read(0, 5, torch.empty(16, 8))
    assert "will" not in events


def test_strings_are_ids_too(tmp_path):
    ids = ["a", "größe/ß.png", "", "c" * 300, "日本"]
    assert make(tmp_path, documents(), ids, shard_bytes=100).ids == ids


def test_the_files_are_safetensors(tmp_path):
    from safetensors.torch import load_file

    items = documents()
    make(tmp_path, items)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    assert set(tensors) == {"tokens"} and torch.equal(tensors["tokens"], torch.cat(items))


def test_appending_goes_on(tmp_path):
    items = documents()
    make(tmp_path, items[:2], ["a", "b"], meta={"model": "m"})
    before = PatchStore(tmp_path)
    with StoreWriter(tmp_path, meta={"model": "m"}) as writer:
        assert len(writer) == 2 and "a" in writer and "c" not in writer
        writer.add_packed(*Packed.of(items[2:]), ids=["c", "d", "e"])
    assert len(before) == 2 and torch.equal(before[0], items[0]), "an open store is of its moment"
    store = PatchStore(tmp_path)
    assert store.ids == list("abcde") and store.meta == {"model": "m"}
    assert all(torch.equal(a, b) for a, b in zip(store, items, strict=True))


def test_what_was_added_before_an_exception_is_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path) as writer:
        writer.add(documents()[0])
        raise KeyboardInterrupt
    assert len(PatchStore(tmp_path)) == 1


def test_one_writer_at_a_time(tmp_path):
    with StoreWriter(tmp_path), pytest.raises(StoreError, match="another writer is at work"):
        StoreWriter(tmp_path)
    StoreWriter(tmp_path).close()


@pytest.mark.parametrize(
    ("tokens", "id", "error", "words"),
    [
        (
            torch.zeros(2, 8, dtype=torch.float64),
            9,
            TypeError,
            "bfloat16 or float32 tensor, got torch.float64",
        ),
        (torch.zeros(2, 8).half(), 9, TypeError, "the store's dtype, torch.float32; got torch.float16"),
        (torch.zeros(2, 7), 9, ValueError, r"the store's dim, 8; got shape \[2, 7\]"),
        (torch.zeros(8), 9, ValueError, r"must be \[l, dim\], got shape \[8\]"),
        ([[1.0]], 9, TypeError, "got list"),
        (torch.zeros(2, 8), 0, ValueError, "id 0 is in the store already"),
        (torch.zeros(2, 8), "x", TypeError, "like the store's others, int; got str 'x'"),
        (torch.zeros(2, 8), 1.5, TypeError, "an int or a string, got float"),
        (torch.zeros(2, 8), True, TypeError, "an int or a string, got bool"),
        (torch.zeros(2, 8), 1 << 63, ValueError, "64 bits"),
    ],
)
def test_what_does_not_fit_is_refused(tokens, id, error, words, tmp_path):
    with StoreWriter(tmp_path) as writer:
        writer.add(documents()[0])
        with pytest.raises(error, match=words):
            writer.add(tokens, id)
    assert len(PatchStore(tmp_path)) == 1


def test_offsets_of_a_pair_are_checked():
    from latemax.store.packed import check

    for offsets, words in (([0, 3, 2, 4], "after document 1"), ([1, 4], "from 0 to 4, got 1 to 4"), ([0, 5], "0 to 5")):
        with pytest.raises(ValueError, match=words):
            check(torch.zeros(4, 2), torch.tensor(offsets))
    with pytest.raises(TypeError, match=r"int32 or int64 tensor, got torch\.float32"):
        check(torch.zeros(4, 2), torch.tensor([0.0, 4.0]))


def test_options_and_meta_are_checked(tmp_path):
    make(tmp_path, documents(), meta={"model": "a"})
    with pytest.raises(StoreError, match=r"meta must be what .* was made with, \{'model': 'a'\}; got \{'model': 'b'\}"):
        StoreWriter(tmp_path, meta={"model": "b"})
    with pytest.raises(StoreError, match="dtype must be the store's own"):
        StoreWriter(tmp_path, dtype=torch.float16)
    with pytest.raises(ValueError, match="shard_bytes must be an int >= 1"):
        StoreWriter(tmp_path, shard_bytes=0)
    StoreWriter(tmp_path).close()


# Each damages the second of three shards.
def shorten(path):
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"x")


def scramble_header(path):
    data = bytearray(path.read_bytes())
    data[9:20] = b"\xff" * 11
    path.write_bytes(data)


def huge_header(path):
    data = bytearray(path.read_bytes())
    data[:8] = b"\xff" * 8
    path.write_bytes(data)


def other_shape(path):
    path.write_bytes(path.read_bytes().replace(b'"shape":[5,8]', b'"shape":[8,5]'))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "is missing from"),
        (shorten, r"is truncated: \d+ bytes, the catalogue says \d+"),
        (lengthen, "is too long"),
        (scramble_header, "is corrupt: its header is not safetensors"),
        (huge_header, "is corrupt: its header is not safetensors: a header of 18446744073709551615 bytes"),
        (other_shape, r"is corrupt: tokens is F32 \[8, 5\], the catalogue says F32 \[5, 8\]"),
    ],
)
def test_opening_names_the_damaged_shard(damage, words, tmp_path):
    make(tmp_path, documents((3, 5, 4)), shard_bytes=1)
    path = shards(tmp_path)[1]
    damage(path)
    with pytest.raises(StoreError, match=f"shard {path.name} .*{words}"):
        PatchStore(tmp_path)


def test_verify_names_the_shard_with_a_flipped_bit(tmp_path):
    make(tmp_path, documents((3, 5, 4)), shard_bytes=1)
    path = shards(tmp_path)[2]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=rf"wrong checksum .*: shard {path.name}$"):
        PatchStore(tmp_path).verify()


def test_a_killed_writer_loses_nothing_committed(tmp_path):
    """As benchmarks/suites/kill_writer.py, at fewer points."""
    sys.path.insert(0, str(HERE.parent))
    from benchmarks.suites.kill_writer import kill_writers

    result = kill_writers(tmp_path, kills=3, seed=0)
    assert result["kills"] == 3 and result["documents"] > 0 and result["lost"] == 0 and result["unreadable"] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_arrow_shares_the_tokens_both_ways(dtype, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    items = documents(dtype=dtype)
    store = make(tmp_path, items, list("abcde"), shard_bytes=100)
    table = to_arrow(store)
    value = pyarrow.float16() if dtype == torch.float16 else pyarrow.float32()
    assert table.schema.field("tokens").type == pyarrow.list_(pyarrow.list_(value, 8))
    assert table["id"].to_pylist() == list("abcde")
    for chunk, shard in zip(table["tokens"].chunks, store.shards, strict=True):
        tokens, offsets = from_arrow(chunk)
        assert tokens.data_ptr() == shard.tokens.data_ptr() and torch.equal(tokens, shard.tokens)
        assert torch.equal(offsets, shard.offsets)
    with pytest.raises(ValueError, match="must be one chunk, got"):
        from_arrow(table["tokens"])
    packed = Packed.of(items)
    pair = to_arrow(packed)
    back = from_arrow(pair["tokens"])
    assert back.tokens.data_ptr() == packed.tokens.data_ptr() and torch.equal(back.offsets, packed.offsets)
    cut = from_arrow(pair["tokens"].chunk(0).slice(2, 2))
    assert torch.equal(cut.tokens, torch.cat(items[2:4])) and cut.offsets.tolist() == [0, 5, 6]


def test_arrow_has_no_bfloat16_and_takes_no_null(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    store = make(tmp_path, documents(dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"no bfloat16; dtype=torch\.float32 keeps every bfloat16 value"):
        to_arrow(store)
    wide = from_arrow(to_arrow(store, dtype=torch.float32)["tokens"])
    assert torch.equal(wide.tokens.bfloat16(), torch.cat(list(store)))
    vectors = pyarrow.list_(pyarrow.list_(pyarrow.float32(), 2))
    with pytest.raises(ValueError, match="no null"):
        from_arrow(pyarrow.array([[[1.0, 2.0]], None], vectors))
    with pytest.raises(ValueError, match="no null"):
        from_arrow(pyarrow.array([[[1.0, None]]], vectors))
    with pytest.raises(TypeError, match=r"must be of type list<fixed_size_list<float16 \| float32>>, got list<"):
        from_arrow(pyarrow.array([[1.0]]))


def test_lancedb_round_trip_scores_alike(tmp_path):
    lancedb = pytest.importorskip("lancedb", reason="lancedb is not installed")
    from latemax import maxsim, topk

    items = [torch.nn.functional.normalize(x, dim=-1).half() for x in documents((3, 4, 5, 1, 7))]
    q = torch.nn.functional.normalize(documents((6,), seed=1)[0], dim=-1).half()
    store = make(tmp_path / "store", items, list("abcde"), shard_bytes=100)
    table = lancedb.connect(tmp_path / "lance").create_table("pages", to_arrow(store))
    column = table.to_arrow()["tokens"].combine_chunks()
    corpus = from_arrow(column)
    assert torch.equal(corpus.tokens, torch.cat(items))
    ours, same = topk(q, store, 5), topk(q, tuple(corpus), 5)
    assert torch.equal(ours.scores, same.scores) and torch.equal(ours.indices, same.indices)
    rows = table.search(q.float().numpy(), vector_column_name="tokens").distance_type("cosine").limit(5).to_list()
    assert [row["id"] for row in rows] == [store.ids[i] for i in ours.indices]
    theirs = torch.tensor([len(q) - row["_distance"] for row in rows])
    torch.testing.assert_close(theirs, maxsim(q, items, normalize=True)[ours.indices], rtol=2e-3, atol=2e-3)


def test_qdrant_round_trip_scores_alike(tmp_path):
    pytest.importorskip("qdrant_client", reason="qdrant-client is not installed")
    from qdrant_client import QdrantClient, models

    from latemax import topk

    items, q = documents((3, 4, 5, 1, 7)), documents((6,), seed=1)[0]
    store = make(tmp_path, items, [3, 1, 4, 15, 9], shard_bytes=100)
    client = QdrantClient(":memory:")
    many = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    client.create_collection(
        "pages", {"mv": models.VectorParams(size=8, distance=models.Distance.DOT, multivector_config=many)}
    )
    client.upsert("pages", list(to_qdrant(store, store.ids, vector="mv")))
    points, _ = client.scroll("pages", with_vectors=True, limit=10)
    ids, back = from_qdrant(points, vector="mv")
    assert sorted(ids) == sorted(store.ids)
    assert all(torch.equal(tokens, items[store.ids.index(id)]) for id, tokens in zip(ids, back, strict=True))
    found = client.query_points("pages", query=q.tolist(), using="mv", limit=5).points
    ours = topk(q, store, 5)
    assert [point.id for point in found] == [store.ids[i] for i in ours.indices]
    torch.testing.assert_close(torch.tensor([point.score for point in found]), ours.scores)
    with pytest.raises(ValueError, match=r"point 1 brings no vector 'other' \(vectors: \['mv'\]\)"):
        from_qdrant([point for point in points if point.id == 1], vector="other")
