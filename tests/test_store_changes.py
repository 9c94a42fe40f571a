"""A living store: replacement, removal, snapshots, compaction, files and locks."""

import copy
import enum
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
import stores
import torch
from stores import document, values

from latemax import topk
from latemax.store import PatchStore, StoreError, StoreWriter

folder = stores.folder


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


def test_shards_without_their_catalogue_stay(folder):
    others = ("holiday.zip.part", "shard-of-another-tool.safetensors")
    for name in others:
        (folder / name).write_text("mine")
    (folder / "catalog.sqlite").unlink()
    names = set(os.listdir(folder))
    for open_it in (PatchStore, StoreWriter):
        with pytest.raises(StoreError, match=r"holds shards \(1: shard-000000-.*\) but no catalog\.sqlite"):
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
        db.execute("UPDATE store SET format_version = 3")
    db.close()
    with pytest.raises(StoreError, match="reads versions 1 and 2, the store has 3"):
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
