"""A damaged store is refused with a StoreError that names the file, or is right: never anything else, and no file goes.

``LATEMAX_STORE_FUZZ=N`` tries N damages of each kind (default 30).
"""

import os
import random
import shutil
import sqlite3

import pytest
import torch

from latemax.store import PatchStore, StoreError, StoreWriter

ROUNDS = int(os.environ.get("LATEMAX_STORE_FUZZ", "30"))


def document(i):
    return torch.full((i % 4, 8), float(i), dtype=torch.float16)


def build(folder):
    """Every kind of row: several commits, a replacement, removals, grids, regions, metadata."""
    with StoreWriter(folder, meta={"model": "m"}, shard_bytes=200) as writer:
        for i in range(12):
            writer.add(document(i), f"page-{i}", meta={"year": 2000 + i, "label": "größe"} if i % 3 else None)
        writer.commit()
        writer.replace(document(3), "page-3", grid=(1, 3))
        writer.replace(document(2), "page-2", regions=torch.tensor([[0, 0, 0.5, 1], [0.5, 0, 1, 1]]))
        writer.remove("page-5")
    return {f"page-{i}": document(i) for i in range(12) if i != 5}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "store"
    expected = build(folder)
    assert use(folder, expected) is None
    PatchStore(folder).verify()
    return folder, expected


def use(folder, expected):
    """Everything a reader does, and a writer; what it does not refuse must be right."""
    store = PatchStore(folder)
    if store.ids != list(expected) or store.where("year >= 2004").tolist() != [4, 6, 7, 9, 10]:
        return "other documents"
    for i, (id, tokens) in enumerate(expected.items()):
        if store.find(id) != i or not torch.equal(store[i], tokens):
            return f"another document {id}"
    if store.metas() != list(map(store.document_meta, range(len(store)))):
        return "other metadata"
    list(map(store.regions, range(len(store))))
    list(map(store.grid, range(len(store))))
    return None


def check(folder, expected, files, hostile=False):
    """Whether the damage was seen; only what is no accident may give other documents."""
    wrong = None
    try:
        wrong = use(folder, expected)
        PatchStore(folder).verify()
        verified = True
    except (StoreError, OSError):
        verified = False
    assert hostile or not (verified and wrong), f"verify() passed {wrong}"
    refusals = (OSError, KeyError, ValueError if hostile else StoreError)
    try:
        with StoreWriter(folder) as writer:
            writer.add(document(20), "page-20")
            writer.remove("page-1")
            writer.compact()
    except refusals:
        # the folder is as the writer found it, but for locks and journals
        assert files <= set(os.listdir(folder)), "a file was deleted"
    return not verified


def committed(folder):
    return {name for name in os.listdir(folder) if name.endswith(".safetensors")}


@pytest.mark.parametrize("what", ["flip", "cut", "zero", "grow"])
@pytest.mark.parametrize("target", ["catalogue", "shard"])
def test_damaged_bytes(target, what, whole, tmp_path):
    source, expected = whole
    rng = random.Random(f"{target} {what}")
    seen = 0
    for n in range(ROUNDS):
        folder = tmp_path / str(n)
        shutil.copytree(source, folder)
        path = folder / "catalog.sqlite" if target == "catalogue" else rng.choice(sorted(folder.glob("*.safetensors")))
        data = bytearray(path.read_bytes())
        # free space of the catalogue is zeros, and means nothing
        at = rng.choice([i for i, byte in enumerate(data) if byte] if target == "catalogue" else range(len(data)))
        if what == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif what == "cut":
            del data[at:]
        elif what == "zero":
            data[at : at + 512] = bytes(len(data[at : at + 512]))
        else:
            data += bytes(rng.randrange(1, 5000))
        changed = bytes(data) != path.read_bytes()
        path.write_bytes(data)
        found = check(folder, expected, committed(folder))
        seen += found
        if target == "shard":
            assert found == changed, f"byte {at} of {path.name}"
        shutil.rmtree(folder)
    assert seen > ROUNDS // 2 or (target, what) == ("catalogue", "grow")


VALUES = [None, -1, 0, 7, 1 << 62, 1.5, "", "../x.safetensors", "/etc/passwd", "x", b"", b"\xff" * 16, "\0", "[" * 5000]


@pytest.mark.parametrize("rehash", [False, True], ids=["digest-kept", "digest-fits"])
def test_damaged_rows(rehash, whole, tmp_path):
    """Any value in any column: also with the digest made to fit, as by a hostile hand."""
    from latemax.store import catalog

    source, expected = whole
    rng = random.Random(rehash)
    for n in range(ROUNDS * 2):
        folder = tmp_path / str(n)
        shutil.copytree(source, folder)
        db = sqlite3.connect(folder / "catalog.sqlite")
        table = rng.choice(list(catalog.TABLES))
        fields = catalog.TABLES[table]._fields
        column, value = rng.choice(fields), rng.choice(VALUES)
        if column != catalog.KEYS.get(table) or isinstance(value, int):
            try:
                with db:
                    (key,) = rng.choice(db.execute(f"SELECT rowid FROM {table}").fetchall())
                    before = db.execute(f"SELECT {column} FROM {table} WHERE rowid = ?", (key,)).fetchone()
                    db.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (value, key))
                    if rehash:
                        key = value if column == catalog.KEYS.get(table) else key
                        row = db.execute(f"SELECT {', '.join(fields)} FROM {table} WHERE rowid = ?", (key,)).fetchone()
                        db.execute(f"UPDATE {table} SET digest = ? WHERE rowid = ?", (catalog.digest(row), key))
            except sqlite3.IntegrityError:
                before = (value,)
            db.close()
            found = check(folder, expected, committed(folder), hostile=rehash)
            assert rehash or found or before == (value,), f"{table}.{column} = {value!r}"
        db.close()
        shutil.rmtree(folder)


def test_rows_that_are_gone_are_missed(whole, tmp_path):
    source, _ = whole
    for table, field in (("documents", "seq"), ("commits", "generation"), ("shards", "shard"), ("regions", "digest")):
        folder = tmp_path / table
        shutil.copytree(source, folder)
        db = sqlite3.connect(folder / "catalog.sqlite")
        with db:
            db.execute(f"DELETE FROM {table} WHERE {field} = (SELECT max({field}) FROM {table})")
        db.close()
        with pytest.raises(StoreError, match=r"catalog\.sqlite"):
            PatchStore(folder).verify()


def test_an_index_that_names_one_row_twice_hides_nothing(whole, tmp_path):
    source, expected = whole
    folder = tmp_path / "store"
    shutil.copytree(source, folder)
    path = folder / "catalog.sqlite"
    db = sqlite3.connect(path)
    (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'documents_id'").fetchone()
    (size,) = db.execute("PRAGMA page_size").fetchone()
    db.close()
    data = bytearray(path.read_bytes())
    # a leaf of an index: 8 bytes, then the places of its entries, 2 bytes each
    page = (root - 1) * size
    assert data[page] == 10
    data[page + 10 : page + 12] = data[page + 8 : page + 10]
    path.write_bytes(data)
    assert use(folder, expected) is None
