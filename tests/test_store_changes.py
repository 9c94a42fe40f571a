"""A living store: replacement, removal, snapshots, metadata, conditions, merging, and the format before."""

import copy
import enum
import hashlib
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import sqlite3
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from latemax import topk
from latemax.store import PatchStore, StoreError, StoreWriter, merge_stores, upgrade


def document(value, length=4, dim=8):
    return torch.full((length, dim), float(value))


def values(store):
    return [float(x[0, 0]) for x in store]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "store"
    with StoreWriter(path, meta={"model": "m"}) as writer:
        for i, id in enumerate("abcd"):
            writer.add(document(i), id, meta={"year": 2000 + i})
    return path


def test_replacing_keeps_the_order_and_what_is_not_given(folder):
    with StoreWriter(folder) as writer:
        writer.add(document(9), "e", grid=(2, 2), meta={"kind": "x"})
        writer.commit()
        writer.replace(document(7), "b")
        writer.replace(None, "e", meta={"kind": "y"})
        writer.replace(document(8), "e")
        with pytest.raises(ValueError, match="grid must multiply to the number of tokens, 5; got 2 x 2"):
            writer.replace(document(8, 5), "e")
        with pytest.raises(KeyError, match="no document 'z'"):
            writer.replace(document(1), "z")
    store = PatchStore(folder)
    assert store.ids == list("abcde") and values(store) == [0, 7, 2, 3, 8]
    assert store.document_meta(1) == {"year": 2001} and store.document_meta(4) == {"kind": "y"}
    assert store.grid(4) == (2, 2) and store.grid(1) is None
    store.verify()


def test_removed_documents_are_gone_and_numbers_are_not_used_again(tmp_path):
    with StoreWriter(tmp_path) as writer:
        for i in range(4):
            writer.add(document(i))
        writer.commit()
        writer.remove(3)
        writer.remove(1)
        assert 1 not in writer and len(writer) == 2
        with pytest.raises(KeyError, match="no document 1"):
            writer.remove(1)
    with StoreWriter(tmp_path) as writer:
        writer.add(document(4))
        writer.add(document(1.5), 1)
    store = PatchStore(tmp_path)
    assert store.ids == [0, 2, 4, 1] and values(store) == [0, 2, 4, 1.5]
    assert store.offsets.tolist() == [0, 4, 8, 12, 16] and store.n_tokens == 16
    out = torch.full((12, 8), torch.nan)
    store.read(1, 4, out)
    assert out[::4, 0].tolist() == [2, 4, 1.5]
    assert [len(offsets) - 1 for _, offsets in store.packed()] == [1, 1, 2]
    found = topk(document(1), store, 4)
    assert found.indices.tolist() == [2, 1, 3, 0]


def test_a_snapshot_outlives_commits_and_compaction(folder):
    before = PatchStore(folder)
    with StoreWriter(folder) as writer:
        writer.remove("a")
        writer.replace(document(9), "c")
        writer.commit()
        middle = PatchStore(folder)
        writer.compact()
        writer.add(document(5), "e")
    for _ in range(2):
        assert before.ids == list("abcd") and values(before) == [0, 1, 2, 3] and before.find("d") == 3
        assert before.where("year < 2002").tolist() == [0, 1]
        assert middle.ids == list("bcd") and values(middle) == [1, 9, 3]
        before.verify(), middle.verify()
        with StoreWriter(folder) as writer:
            writer.compact()
    assert before.refresh() and not before.refresh()
    assert before.ids == list("bcde") and values(before) == [1, 9, 3, 5]


def test_compaction_gives_disk_space_back(tmp_path):
    with StoreWriter(tmp_path, shard_bytes=4000) as writer:
        for i in range(100):
            writer.add(document(i, 10), i)
        writer.commit()
        shards = len(list(tmp_path.glob("*.safetensors")))
        for i in range(0, 100, 2):
            writer.remove(i)
        writer.compact()
        assert shards == 8 and len(list(tmp_path.glob("*.safetensors"))) == 4
        store = PatchStore(tmp_path)
        assert values(store) == list(range(1, 100, 2)) and len(store.shards) == 4
        names = sorted(os.listdir(tmp_path))
        writer.compact()
        assert sorted(os.listdir(tmp_path)) == names, "nothing is left to do"
        writer.add(document(1000))
    PatchStore(tmp_path).verify()


def test_small_shards_are_joined(tmp_path):
    with StoreWriter(tmp_path, shard_bytes=1) as writer:
        for i in range(20):
            writer.add(document(i), i)
    with StoreWriter(tmp_path) as writer:
        writer.compact()
    store = PatchStore(tmp_path)
    assert len(store.shards) == 1 and values(store) == list(range(20))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_copies_open_the_same_generation(folder):
    store = PatchStore(folder)
    data = pickle.dumps(store)
    with StoreWriter(folder) as writer:
        writer.remove("a")
    for twin in (copy.copy(store), copy.deepcopy(store), pickle.loads(data)):
        assert twin.ids == list("abcd") and values(twin) == [0, 1, 2, 3]
        del twin
    assert values(store) == [0, 1, 2, 3]
    del store
    with StoreWriter(folder) as writer:
        writer.compact()
    with pytest.raises(StoreError, match="has no generation 1 any more"):
        pickle.loads(data)
    shutil.rmtree(folder)
    with StoreWriter(folder) as writer:
        writer.add(document(1), "z")
    with pytest.raises(StoreError, match="is of another store"):
        pickle.loads(data)


def first_value(store):
    return float(store["b"][0, 0])


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_other_processes_read_it(method, folder):
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(first_value, (PatchStore(folder),)) == 1.0


def test_a_forked_child_neither_holds_nor_uses_the_writer(folder):
    writer = StoreWriter(folder)
    pid = os.fork()
    if not pid:
        try:
            writer.remove("a")
        except StoreError:
            os._exit(0 if os.getppid() else 1)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.read(read, 1)
        os._exit(0)
    try:
        writer.close()
        StoreWriter(folder).close()
    finally:
        os.write(write, b"x")
        os.waitpid(pid, 0)


@pytest.mark.parametrize("change", ["add", "add_packed", "replace", "remove", "commit", "compact"])
def test_a_closed_writer_refuses(change, folder):
    writer = StoreWriter(folder)
    writer.close()
    writer.close()
    arguments = {
        "add": (document(1), "e"),
        "add_packed": (document(1), torch.tensor([0, 4]), ["e"]),
        "replace": (document(1), "a"),
        "remove": ("a",),
    }
    with pytest.raises(StoreError, match="is closed"):
        getattr(writer, change)(*arguments.get(change, ()))
    assert PatchStore(folder).ids == list("abcd")


class Text(str, enum.Enum):
    A = "page"


class Number(enum.IntEnum):
    A = 3


@pytest.mark.parametrize(
    ("id", "plain"), [(np.str_("page"), "page"), (Text.A, "page"), (Number.A, 3), (np.int64(3), 3), (np.uint8(3), 3)]
)
def test_ids_of_subclasses_are_plain(id, plain, tmp_path):
    with StoreWriter(tmp_path) as writer:
        writer.add(document(1), id)
        assert plain in writer
        writer.add(document(2), "other" if isinstance(plain, str) else 4)
    store = PatchStore(tmp_path)
    assert store.ids[0] == plain and type(store.ids[0]) in (int, str) and store.find(id) == 0
    assert store.id_type == type(plain).__name__


@pytest.mark.parametrize("id", [True, np.True_, 1.0, b"x", ("x",)])
def test_other_ids_are_refused(id, folder):
    with StoreWriter(folder) as writer:
        with pytest.raises(TypeError, match="id must be an int or a string, got"):
            writer.add(document(1), id)
        with pytest.raises(TypeError, match="id must be an int or a string, got NoneType"):
            writer.add_packed(document(1), torch.tensor([0, 4]), [None])
        with pytest.raises(ValueError, match="id must be text that UTF-8 can write, got 'bad"):
            writer.add(document(1), os.fsdecode(b"bad\xff.png"))
    assert PatchStore(folder).ids == list("abcd")


def test_add_packed_takes_all_or_nothing(folder):
    tokens, offsets = document(1, 6), torch.tensor([0, 2, 4, 6])
    with StoreWriter(folder) as writer:
        for ids, words in ((["x", "a", "y"], "'a' is in the store"), (["x", "y", "x"], "'x' is in ids twice")):
            with pytest.raises(ValueError, match=words):
                writer.add_packed(tokens, offsets, ids)
        with pytest.raises(TypeError, match="like the store's others, str"):
            writer.add_packed(tokens, offsets, ["x", 1, "y"])
        assert len(writer) == 4
        writer.add_packed(tokens, offsets, ["x", "y", "z"])
    assert PatchStore(folder).ids == list("abcdxyz")


def test_metadata_is_what_json_keeps(tmp_path):
    meta = {"size": (1, 2), 3: "x", "größe": [None, True]}
    with StoreWriter(tmp_path, meta=meta) as writer:
        writer.add(document(1), "a", meta=meta)
        writer.add(document(1), "b")
        for bad, error in (({"x": {1}}, TypeError), ({"x": float("nan")}, ValueError), ({"x": "\ud800"}, ValueError)):
            with pytest.raises(error, match="meta must be"):
                writer.add(document(2), "c", meta=bad)
            with pytest.raises(error, match="meta must be"):
                StoreWriter(tmp_path / "other", meta=bad)
        with pytest.raises(TypeError, match=r"meta must be a JSON object \(a dict\), got list"):
            writer.add(document(2), "c", meta=[1])
    StoreWriter(tmp_path, meta=meta).close()
    store = PatchStore(tmp_path)
    assert store.document_meta(0) == store.meta == {"size": [1, 2], "3": "x", "größe": [None, True]}
    assert store.document_meta(1) == {}


def test_grids_and_regions(tmp_path):
    boxes = torch.tensor([[0, 0, 0.5, 1], [0.5, 0, 1, 1], [float("nan")] * 4])
    with StoreWriter(tmp_path) as writer:
        writer.add(document(0, 6), "grid", grid=(np.int64(2), 3))
        writer.add(document(0, 3), "regions", regions=boxes)
        writer.add(document(0, 3), "array", regions=boxes.numpy())
        writer.add(document(0, 3), "none")
        for arguments, words in (
            (dict(grid=(2, 2)), "grid must multiply to the number of tokens, 3; got 2 x 2"),
            (dict(grid=(1, 3), regions=boxes), "not both"),
            (dict(regions=boxes[:2]), r"regions must be \[l, 4\] with the l of tokens, 3; got shape \[2, 4\]"),
            (dict(regions=boxes.flip(1)), "row 0 is"),
            (dict(regions=boxes * 2), "row 0 is"),
        ):
            with pytest.raises(ValueError, match=words):
                writer.add(document(0, 3), "bad", **arguments)
        with pytest.raises(TypeError, match=r"regions must be a float32 tensor or array, got float64"):
            writer.add(document(0, 3), "bad", regions=boxes.double())
        with pytest.raises(TypeError, match="grid must be two ints"):
            writer.add(document(0, 3), "bad", grid=3)
        writer.compact()
    store = PatchStore(tmp_path)
    assert [store.grid(i) for i in range(4)] == [(2, 3), None, None, None]
    for i in (1, 2):
        torch.testing.assert_close(store.regions(i), boxes, equal_nan=True, rtol=0, atol=0)
    assert store.regions(0) is None and store.regions(3) is None
    with StoreWriter(tmp_path) as writer:
        writer.replace(None, "regions", grid=(1, 3))
        writer.replace(None, "grid", regions=torch.tensor([[0.0, 0, 1, 1]]).expand(6, -1))
    store.refresh()
    assert store.grid(1) == (1, 3) and store.regions(1) is None and store.grid(0) is None
    assert store.regions(0).shape == (6, 4)


def test_by_id(folder):
    store = PatchStore(folder)
    assert torch.equal(store["c"], store[2]) and store.find("c") == 2 and "c" in store and "z" not in store
    for call in (lambda: store["z"], lambda: store.find("z")):
        with pytest.raises(KeyError, match="no document 'z'"):
            call()
    with pytest.raises(TypeError, match="the number or the id of a document, got float"):
        store[1.0]
    store[0][0] = 7
    assert values(store)[0] == 0, "a copy"


CONDITIONS = {
    "year >= 2002": [2, 3],
    "year BETWEEN ? AND ?": [1, 2],
    "id IN ('a', ?)": [0, 3],
    "NOT id LIKE 'a%' AND year <> 2002": [1, 3],
    'year IS NULL OR "year" = 2000.0': [0],
    "year IS NOT NULL and not (id = 'b' or year == 2003)": [0, 2],
    '"it\'s ""odd""." = \'x\'\'y\'': [1],
    "nothing": [],
    "flag": [2],
    "flag = TRUE": [2],
    "id NOT IN ('a', 'b') AND year NOT BETWEEN 2003 AND 2009 AND id NOT LIKE 'z'": [2],
    "year = -2000 OR année = 1": [3],
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditions(condition, folder):
    with StoreWriter(folder) as writer:
        writer.replace(None, "b", meta={"year": 2001, 'it\'s "odd".': "x'y"})
        writer.replace(None, "c", meta={"year": 2002, "flag": True})
        writer.replace(None, "d", meta={"year": 2003, "année": 1})
    bound = {"year BETWEEN ? AND ?": (np.int64(2001), 2002.0), "id IN ('a', ?)": ("d",)}.get(condition, ())
    found = PatchStore(folder).where(condition, *bound)
    assert found.dtype == torch.int64 and found.tolist() == CONDITIONS[condition]


@pytest.mark.parametrize(
    "condition",
    [
        "", "year =", "year = 1; DROP TABLE documents", "year = 1 -- x", "year = 1 /* x */", "abs(year) = 1",
        "load_extension('x')", "(SELECT 1) = 1", "SELECT 1", "year IN (SELECT 1)", "EXISTS (SELECT 1)", "a.b = 1",
        "year COLLATE NOCASE = 1", "year IN ()", "year = 'x", 'year = "x', "year ? 1", "year = ?1", "year = :x",
        "year || 'x' = 'y'", "year + 1 = 2", "CAST(year AS TEXT) = 'x'", "CASE WHEN 1 THEN 2 END", "year GLOB 'x'",
        "year REGEXP 'x'", "(" * 60 + "1" + ")" * 60, "NOT " * 60 + "1", " OR ".join(["year = 1"] * 500), "year = \0",
        "year = 1 = 1", "year = 'a\ud800'", "year is 1",
    ],
)  # fmt: skip
def test_other_conditions_are_refused(condition, folder):
    before = (folder / "catalog.sqlite").read_bytes()
    with pytest.raises(ValueError, match=r"condition"):
        PatchStore(folder).where(condition)
    assert (folder / "catalog.sqlite").read_bytes() == before


def test_values_of_conditions_are_checked(folder):
    store = PatchStore(folder)
    for given, error in (((), ValueError), ((1, 2), ValueError), (([1],), TypeError), ((1 << 64,), ValueError)):
        with pytest.raises(error, match="values must"):
            store.where("year = ?", *given)
    assert store.where("id = ?", "x' OR '1' = '1").tolist() == []
    with pytest.raises(TypeError, match="condition must be a string"):
        store.where(5)


def test_a_condition_without_end_is_stopped(folder, monkeypatch):
    monkeypatch.setattr("latemax.store.where.STEPS", 10)
    monkeypatch.setattr("latemax.store.where.STEPS_PER_DOCUMENT", 0)
    with StoreWriter(folder) as writer:
        for i in range(3000):
            writer.add(document(0, 0), str(i))
    with pytest.raises(ValueError, match="fewer than 10 steps"):
        PatchStore(folder).where("year = 1")


def test_shards_without_their_catalogue_stay(folder):
    others = ("holiday.zip.part", "shard-of-another-tool.safetensors")
    for name in others:
        (folder / name).write_text("mine")
    (folder / "catalog.sqlite").unlink()
    names = set(os.listdir(folder))
    for open_it in (PatchStore, StoreWriter):
        with pytest.raises(StoreError, match=r"holds 1 shards \(shard-000000-.*\) but no catalog\.sqlite"):
            open_it(folder)
    assert set(os.listdir(folder)) - {"writer.lock"} == names - {"writer.lock"}


def test_only_pending_files_are_cleared(folder):
    (folder / "shard-000077-00000000.safetensors").write_text("of a newer catalogue")
    with StoreWriter(folder) as writer:
        from latemax.store import catalog

        row = catalog.ShardRow(50, "shard-000050-12345678.safetensors", "pending", "tokens", "float32", 8, 0, 0, b"")
        with catalog.opened(folder / "catalog.sqlite", write=True) as db:
            catalog.insert(db, "shards", [row])
        (folder / row.name).write_text("half")
        del writer
    StoreWriter(folder).close()
    assert not (folder / row.name).exists() and (folder / "shard-000077-00000000.safetensors").exists()
    assert PatchStore(folder).ids == list("abcd")


def test_a_store_put_under_an_open_one_is_noticed(folder, tmp_path):
    shutil.copy(folder / "catalog.sqlite", tmp_path / "old")
    with StoreWriter(folder) as writer:
        writer.remove("a")
    store = PatchStore(folder)
    shutil.copy(tmp_path / "old", folder / "catalog.sqlite")
    with pytest.raises(StoreError, match="was replaced while generation 2 of it was open"):
        store.find("b")
    writer = StoreWriter(folder)
    with StoreWriter(tmp_path / "other") as other:
        other.add(document(1), "x")
    shutil.copy(tmp_path / "other" / "catalog.sqlite", folder / "catalog.sqlite")
    writer.add(document(1), "new")
    with pytest.raises(StoreError, match="was changed while a writer was at work"):
        writer.close()


def test_a_read_only_folder_opens(folder):
    for name in os.listdir(folder):
        if name.endswith(".lock"):
            (folder / name).unlink()
    # below the folder for temporary files, where everybody may look: pytest's own are closed to others
    top = Path(tempfile.mkdtemp())
    folder = Path(shutil.copytree(folder, top / "store"))
    os.chmod(folder, 0o555), os.chmod(top, 0o555)
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        said = b"right"
        try:
            if not os.getuid():
                # root may write everywhere
                os.setgid(65534), os.setuid(65534)
            store = PatchStore(folder)
            store.verify()
            assert store.ids == list("abcd") and store.where("year = 2001").tolist() == [1] and values(store)[1] == 1
        except BaseException as error:
            said = repr(error).encode()
        os.write(write, said)
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 10_000) == b"right"
    assert not [name for name in os.listdir(folder) if name.startswith("readers")]
    os.chmod(top, 0o755), os.chmod(folder, 0o755)
    shutil.rmtree(top)


def test_many_shards_need_few_descriptors(tmp_path):
    with StoreWriter(tmp_path, shard_bytes=1) as writer:
        for i in range(120):
            writer.add(document(i, 1), i)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 80, hard))
    try:
        stores = [PatchStore(tmp_path) for _ in range(3)]
        found = [topk(document(1, 1), store, 120) for store in stores]
        assert all(x.indices.tolist() == list(range(119, -1, -1)) for x in found)
        assert [list(map(float, (x[0, 0] for x in store))) for store in stores] == [list(range(120))] * 3
        StoreWriter(tmp_path).close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_full_disk_leaves_the_store_and_the_changes(folder, monkeypatch):
    real = os.write
    writer = StoreWriter(folder)
    writer.add(document(9), "e")

    def full(fd, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        writer.commit()
    monkeypatch.setattr(os, "write", real)
    assert PatchStore(folder).ids == list("abcd") and len(list(folder.glob("*.safetensors"))) == 1
    writer.close()
    assert PatchStore(folder).ids == list("abcde")


def test_merging(folder, tmp_path):
    other = tmp_path / "other"
    with StoreWriter(other, meta={"model": "m"}) as writer:
        writer.add(document(7), "x", grid=(2, 2), meta={"k": 1})
        writer.add(document(8, 2), "y", regions=torch.rand(2, 4).sort(1).values[:, [0, 1, 2, 3]].sort(1).values)
        writer.add(document(6), "gone")
        writer.commit()
        writer.remove("gone")
    merge_stores([other, folder], tmp_path / "all")
    store, part = PatchStore(tmp_path / "all"), PatchStore(other)
    assert store.ids == ["x", "y", *"abcd"] and values(store) == [7, 8, 0, 1, 2, 3] and store.meta == {"model": "m"}
    assert store.grid(0) == (2, 2) and store.document_meta(0) == {"k": 1}
    assert torch.equal(store.regions(1), part.regions(1))
    with pytest.raises(ValueError, match=r"id 'a' is in .* and in"):
        merge_stores([folder, folder], tmp_path / "twice")
    with pytest.raises(StoreError, match="out must hold no store yet"):
        merge_stores([folder], other)
    with StoreWriter(tmp_path / "third", meta={"model": "n"}) as writer:
        writer.add(document(1), "q")
    with pytest.raises(StoreError, match="stores must have one meta"):
        merge_stores([folder, tmp_path / "third"], tmp_path / "twice")
    with StoreWriter(tmp_path / "fourth", meta={"model": "m"}) as writer:
        writer.add(document(1).half(), "q")
    with pytest.raises(StoreError, match="stores must have one dtype"):
        merge_stores([folder, tmp_path / "fourth"], tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def old_store(folder, ids):
    """As it was written before the catalogue."""
    from safetensors.torch import save

    folder.mkdir()
    shards = []
    for number in range(2):
        mine = ids[2 * number : 2 * number + 2]
        tensors = {"tokens": torch.cat([document(2 * number + i, i + 1) for i in range(2)])}
        tensors["offsets"] = torch.tensor([0, 1, 3])
        if isinstance(mine[0], int):
            tensors["ids"] = torch.tensor(mine)
        else:
            parts = [id.encode() for id in mine]
            tensors["id_bytes"] = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
            tensors["id_offsets"] = torch.tensor([0, *map(len, parts)]).cumsum(0)
        data, name = save(tensors), f"shard-{number:06d}.safetensors"
        (folder / name).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        shards.append({"file": name, "documents": 2, "tokens": 3, "bytes": len(data), "sha256": digest})
    manifest = {
        "format": "latemax.PatchStore", "version": 1, "dim": 8, "dtype": "float32",
        "id_type": type(ids[0]).__name__, "meta": {"model": "m"}, "shards": shards,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest


@pytest.mark.parametrize("ids", [[3, 1, 4, 7], ["a", "größe", "c", "d"]], ids=["int", "str"])
def test_the_format_before_is_upgraded(ids, tmp_path):
    pytest.importorskip("safetensors", reason="old shards are read with safetensors")
    folder = tmp_path / "old"
    old_store(folder, ids)
    shards = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    for open_it in (PatchStore, StoreWriter):
        with pytest.raises(StoreError, match=r"manifest\.json is of the old format: run `latemax store .* upgrade`"):
            open_it(folder)
    upgrade(folder)
    upgrade(folder)
    store = PatchStore(folder)
    store.verify()
    assert store.ids == ids and values(store) == [0, 1, 2, 3] and store.meta == {"model": "m"}
    assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == shards
    assert not (folder / "manifest.json").exists()
    with StoreWriter(folder, meta={"model": "m"}) as writer:
        writer.add(document(9), 100 if isinstance(ids[0], int) else "new")
        writer.remove(ids[0])
        if isinstance(ids[0], int):
            writer.add(document(9))
    with StoreWriter(folder) as writer:
        writer.compact()
    store.refresh()
    assert values(store)[:4] == [1, 2, 3, 9] and store.ids[:3] == ids[1:]
    assert isinstance(ids[0], str) or store.ids[-1] == 101
    with pytest.raises(FileNotFoundError, match="holds no store"):
        upgrade(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(version=2), "version 2 are unknown"),
        (dict(dim="8"), "numbers must be ints"),
        (dict(dtype="int8"), "dtype 'int8'"),
        (dict(shards=[{}]), "KeyError"),
        (dict(shards=5), "TypeError"),
        (dict(file="../shard-000000.safetensors"), "a file of the store's folder, got '../shard"),
        (dict(file=5), "a file of the store's folder, got 5"),
        (dict(file="shard-000009.safetensors"), r"shard-000009\.safetensors is missing"),
        (dict(sha256="00"), "its checksum is not the manifest's"),
        (dict(documents=3), "is corrupt"),
    ],
)
def test_a_damaged_manifest_is_refused(change, words, tmp_path):
    pytest.importorskip("safetensors", reason="old shards are read with safetensors")
    folder = tmp_path / "old"
    manifest = old_store(folder, ["a", "b", "c", "d"])
    where = manifest if set(change) & set(manifest) else manifest["shards"][0]
    where.update(change)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    names = set(os.listdir(folder))
    with pytest.raises(StoreError, match=words):
        upgrade(folder)
    assert set(os.listdir(folder)) == names | {"writer.lock"}


def test_shards_stay_inside_the_folder(folder):
    from latemax.store import catalog

    shutil.copy(next(folder.glob("*.safetensors")), folder.parent / "outside.safetensors")
    with catalog.opened(folder / "catalog.sqlite", write=True) as db:
        (row,) = catalog.read_shards(db).values()
        catalog.insert(db, "shards", [row._replace(name="../outside.safetensors")])
    for open_it in (PatchStore, StoreWriter):
        with pytest.raises(StoreError, match=r"a file of the store's folder, got '\.\./outside"):
            open_it(folder).verify()


def test_another_version_is_named(folder):
    db = sqlite3.connect(folder / "catalog.sqlite")
    with db:
        db.execute("UPDATE store SET format_version = 2")
    db.close()
    with pytest.raises(StoreError, match="reads version 1, the store has 2"):
        PatchStore(folder)


def test_an_empty_store(tmp_path):
    StoreWriter(tmp_path / "a").close()
    store = PatchStore(tmp_path / "a")
    assert len(store) == 0 and store.dim is None and store.dtype is None and store.ids == []
    store.verify()
    with pytest.raises(ValueError, match="corpus must hold at least one document"):
        topk(document(1), store, 1)
    with pytest.raises(FileNotFoundError, match=r"holds no store: there is no catalog\.sqlite"):
        PatchStore(tmp_path / "nowhere")


def test_a_default_device_changes_nothing(folder):
    torch.set_default_device("meta")
    try:
        with StoreWriter(folder) as writer:
            writer.add(torch.ones(4, 8, device="cpu"), "e")
            writer.compact()
        store = PatchStore(folder)
        found = topk(torch.ones(4, 8, device="cpu"), store, 3, within=["e", "b", "d"], return_argmax=True)
        assert store["b"].device.type == "cpu" and found.indices.tolist() == [3, 1, 4]
    finally:
        torch.set_default_device(None)
