"""Stores of 8-bit codes, alone and next to float tokens."""

import math
import sqlite3

import pytest
import torch

from latemax import QuantizedTokens, quantize
from latemax.store import PatchStore, StoreError, StoreWriter, merge_stores, to_arrow
from latemax.store.packed import empty

DIM = 9


def documents(lengths=(3, 0, 5, 1, 7), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, DIM, generator=generator).to(dtype) for length in lengths]


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("codes", "scale", "error"))


def read_codes(store, first=0, last=None):
    last = len(store) if last is None else last
    out = empty(torch.int8, int(store.offsets[last] - store.offsets[first]), store.dim)
    store.read(first, last, out)
    return out


def make(folder, items, **options):
    with StoreWriter(folder, **options) as writer:
        for item in items:
            writer.add(item)
    return PatchStore(folder)


@pytest.mark.parametrize("shard_bytes", [1, 100, 1 << 20], ids=["a-shard-each", "some", "one"])
def test_a_store_of_codes_alone(shard_bytes, tmp_path):
    items = documents()
    with StoreWriter(tmp_path, dtype="int8", shard_bytes=shard_bytes) as writer:
        for item in items[:3]:
            writer.add(quantize(item))
        writer.add(items[3], quantize=True)
        writer.add_packed(quantize(items[4]), torch.tensor([0, 7]))
    store = PatchStore(tmp_path)
    assert store.dtype == torch.int8 and store.dim == DIM and store.codes is None and len(store) == 5
    assert all(isinstance(x, QuantizedTokens) and same(x, quantize(y)) for x, y in zip(store, items, strict=True))
    assert torch.equal(store.floats(2), quantize(items[2]).dequantize())
    assert same(read_codes(store, 1, 4), quantize(torch.cat(items[1:4])))
    parts = list(store.packed())
    assert torch.equal(torch.cat([x.dequantize() for x, _ in parts]), quantize(torch.cat(items)).dequantize())
    store.verify()


def test_arrow_takes_no_codes(tmp_path):
    pytest.importorskip("pyarrow")
    with StoreWriter(tmp_path, dtype="int8") as writer:
        writer.add(documents()[0], quantize=True)
    with pytest.raises(TypeError, match="corpus must hold floats"):
        to_arrow(PatchStore(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shard_bytes", [1, 100, 1 << 20], ids=["a-shard-each", "some", "one"])
def test_codes_next_to_tokens(dtype, shard_bytes, tmp_path):
    items = documents(dtype=dtype)
    store = make(tmp_path, items, codes="int8", shard_bytes=shard_bytes)
    assert store.dtype == dtype and store.codes == "int8" and "with int8 codes" in repr(store)
    assert all(torch.equal(a, b) for a, b in zip(store, items, strict=True))
    for a in range(6):
        for b in range(a, 6):
            assert same(read_codes(store, a, b), quantize(torch.cat([items[0][:0], *items[a:b]])))
    store.verify()


def test_a_token_that_is_not_finite_has_an_infinite_error(tmp_path):
    items = documents()
    items[2][1, 0], items[2][4, 3] = math.nan, -math.inf
    codes = read_codes(make(tmp_path, items, codes="int8"))
    assert (codes.error.isinf().nonzero().flatten() - 3).tolist() == [1, 4]
    assert not codes.codes[[4, 7]].any() and not codes.scale[[4, 7]].any()
    with StoreWriter(tmp_path / "alone", dtype="int8") as writer:
        with pytest.raises(ValueError, match="valid tokens must be finite"):
            writer.add(items[2], quantize=True)
        assert len(writer) == 0


def test_the_shards_are_safetensors(tmp_path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    items = documents()
    tokens, codes = (load_file(shard.path) for shard in make(tmp_path, items, codes="int8").shards)
    assert set(tokens) == {"tokens"} and set(codes) == {"codes", "scale", "error"}
    assert same(QuantizedTokens(**codes, kind="int8", dim=DIM), quantize(torch.cat(items)))


def test_changes_keep_the_codes_in_step(tmp_path):
    items = documents((3, 4, 5, 6))
    make(tmp_path, items, codes="int8", shard_bytes=100)
    with StoreWriter(tmp_path) as writer:
        assert writer.codes == "int8"
        writer.remove(1)
        writer.replace(items[1], 3)
        writer.replace(None, 0, meta={"year": 1})
    before = PatchStore(tmp_path)
    left = [items[0], items[2], items[1]]
    assert same(read_codes(before), quantize(torch.cat(left)))
    with StoreWriter(tmp_path) as writer:
        writer.compact()
    store = PatchStore(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(store, left, strict=True)) and len(store.shards) == 2
    assert same(read_codes(store), quantize(torch.cat(left)))
    store.verify()
    # the reader of the generation before still has its files
    before.verify()
    assert same(read_codes(before), quantize(torch.cat(left)))
    before.refresh()
    with StoreWriter(tmp_path) as writer:
        writer.compact()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_merging_keeps_the_kind(tmp_path):
    for name, options in (("both", dict(codes="int8")), ("alone", dict(dtype="int8"))):
        items = documents()
        for part, at in (("a", slice(2)), ("b", slice(2, None))):
            with StoreWriter(tmp_path / name / part, **options) as writer:
                for i, item in enumerate(items[at], at.start or 0):
                    writer.add(item, i, quantize=name == "alone")
        merge_stores([tmp_path / name / "a", tmp_path / name / "b"], tmp_path / name / "out")
        merged = PatchStore(tmp_path / name / "out")
        assert merged.codes == options.get("codes") and same(read_codes(merged), quantize(torch.cat(items)))
        merged.verify()
    with pytest.raises(StoreError, match="one dtype"):
        merge_stores([tmp_path / "both" / "a", tmp_path / "alone" / "b"], tmp_path / "out")
    make(tmp_path / "plain", documents())
    with pytest.raises(StoreError, match="one codes"):
        merge_stores([tmp_path / "both" / "a", tmp_path / "plain"], tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(dtype="int4"), TypeError, "dtype must be float16, bfloat16, float32 or 'int8', got 'int4'"),
        (dict(codes="int4"), ValueError, "codes must be 'int8' or None, got 'int4'"),
        (dict(dtype="int8", codes="int8"), ValueError, "codes must be None where dtype is 'int8'"),
    ],
)
def test_options_are_checked(options, error, words, tmp_path):
    with pytest.raises(error, match=words):
        StoreWriter(tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()


def test_the_kind_of_a_store_is_fixed(tmp_path):
    make(tmp_path / "plain", documents())
    with pytest.raises(StoreError, match="codes must be the store's own, None, or None; got 'int8'"):
        StoreWriter(tmp_path / "plain", codes="int8")
    with pytest.raises(StoreError, match="dtype must be the store's own"):
        StoreWriter(tmp_path / "plain", dtype="int8")
    make(tmp_path / "both", documents(), codes="int8")
    # a store without codes keeps the version that earlier releases read; they refuse the other
    for name, version in (("plain", 1), ("both", 2)):
        db = sqlite3.connect(tmp_path / name / "catalog.sqlite")
        assert db.execute("SELECT format_version FROM store").fetchall() == [(version,)]
        db.close()


@pytest.mark.parametrize(
    ("tokens", "error", "words"),
    [
        (torch.zeros(2, DIM), TypeError, "tokens must be QuantizedTokens, or quantize must be True; got torch.float32"),
        (quantize(torch.zeros(2, 3)), ValueError, r"the store's dim, 9; got shape \[2, 3\]"),
        (quantize(torch.zeros(2, DIM), "binary"), ValueError, "kind 'int8', got 'binary'"),
        (quantize(torch.zeros(1, 2, DIM)), ValueError, r"must be \[l, dim\], got shape \[1, 2, 9\]"),
        ("scale", ValueError, "scale of tokens must be finite"),
        ("error", ValueError, "error of tokens must be finite"),
        ("codes", ValueError, "-127 to 127"),
    ],
)
def test_codes_are_checked(tokens, error, words, tmp_path):
    with StoreWriter(tmp_path, dtype="int8") as writer:
        writer.add(quantize(torch.ones(1, DIM)))
        if isinstance(tokens, str):
            name, tokens = tokens, quantize(torch.ones(2, DIM))
            getattr(tokens, name)[1] = -128 if name == "codes" else math.inf
        with pytest.raises(error, match=words):
            writer.add(tokens)
        with pytest.raises(error, match=words):
            writer.add_packed(tokens, torch.tensor([0, 2])) if len(tokens.shape) == 2 else writer.add(tokens)
        assert len(writer) == 1


def test_codes_do_not_go_into_a_store_of_floats(tmp_path):
    with StoreWriter(tmp_path) as writer:
        for options in ({}, dict(quantize=True)):
            with pytest.raises(TypeError, match="made with dtype='int8'"):
                writer.add(quantize(torch.ones(1, DIM)) if not options else torch.ones(1, DIM), **options)


def test_a_shard_of_codes_that_is_gone_or_changed_is_named(tmp_path):
    store = make(tmp_path, documents(), codes="int8")
    path = store.shards[1].path
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StoreError, match=path.name):
        PatchStore(tmp_path).verify()
    path.write_bytes(data[:-1])
    with pytest.raises(StoreError, match="is truncated"):
        PatchStore(tmp_path)
    path.write_bytes(data.replace(b"scale", b"scalf"))
    with pytest.raises(StoreError, match="is corrupt"):
        PatchStore(tmp_path)
    path.unlink()
    with pytest.raises(StoreError, match="is missing"):
        PatchStore(tmp_path)
