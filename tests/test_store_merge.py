"""Merged stores, and the format before the catalogue."""

import hashlib
import json
import os

import pytest
import stores
import torch
from stores import document, values

from latemax.store import PatchStore, StoreError, StoreWriter, merge_stores, upgrade
from latemax.store.merge import append

folder = stores.folder


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


def test_appending_is_one_transaction_and_replaces_in_place(folder, tmp_path, monkeypatch):
    parts = []
    for number, ids in enumerate((["b", "new"], ["z"])):
        with StoreWriter(tmp_path / str(number), dtype=torch.float32) as writer:
            for i, id in enumerate(ids):
                writer.add(document(10 * (number + 1) + i), id, grid=(2, 2), meta={"part": number})
        parts.append(PatchStore(tmp_path / str(number)))
    before = PatchStore(folder)
    with StoreWriter(folder) as writer:
        writer.add(document(5), "e")
        append(writer, parts)
        assert len(writer) == 7
        writer.add(document(6), "after")
    store = PatchStore(folder)
    assert store.ids == [*"abcde", "new", "z", "after"] and values(store) == [0, 10, 2, 3, 5, 11, 20, 6]
    assert store.generation == before.generation + 3 and store.document_meta(1) == {"part": 0}
    store.verify()
    with StoreWriter(folder) as writer, pytest.raises(ValueError, match="id 'z' is in"):
        append(writer, [parts[1], parts[1]])
    with StoreWriter(tmp_path / "half", dtype=torch.float16) as writer:
        writer.add(document(1).half(), "q")
    with StoreWriter(folder) as writer, pytest.raises(StoreError, match="stores must have one dtype"):
        append(writer, [PatchStore(tmp_path / "half")])
    # a failure in the transaction leaves the store as it was
    monkeypatch.setattr("latemax.store.merge.record", lambda *_, **__: 1 / 0)
    with StoreWriter(folder) as writer, pytest.raises(ZeroDivisionError):
        append(writer, parts)
    assert PatchStore(folder).ids == store.ids and len(list(folder.glob("*.safetensors"))) == len(store.shards)
