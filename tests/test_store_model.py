"""The store against a plain dict, by hypothesis: any order of changes, snapshots, kills and damages.

``LATEMAX_STORE_STEPS=N`` runs N examples of 50 steps each (default 15 of 30); ``LATEMAX_STORE_SEED`` picks them.
"""

import gc
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import seed as seeded
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from latemax.store import PatchStore, StoreError, StoreWriter

EXAMPLES = int(os.environ.get("LATEMAX_STORE_STEPS", "15"))
STEPS = 50 if "LATEMAX_STORE_STEPS" in os.environ else 30
DIM = 4
IDS = st.sampled_from([f"id-{i}" for i in range(8)])
METAS = st.one_of(st.none(), st.fixed_dictionaries({"year": st.integers(2000, 2004)}))
COUNTS = {"steps": 0}


class Store(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.top = Path(tempfile.mkdtemp())
        self.folder = self.top / "store"
        self.writer = StoreWriter(self.folder, dtype=torch.float32, shard_bytes=600)
        self.committed, self.now = {}, {}  # id: (tokens, meta)
        self.readers = []  # (store, what it must show)
        self.value = 0

    def teardown(self):
        if self.writer is not None:
            self.writer.close()
        self.readers.clear()
        shutil.rmtree(self.top)

    def tokens(self, length):
        self.value += 1
        return torch.full((length, DIM), float(self.value))

    def noted(self):
        """A shard that is full commits by itself."""
        if not self.writer._added and not self.writer._removed:
            self.committed = dict(self.now)

    def open(self):
        if self.writer is None:
            self.writer = StoreWriter(self.folder, shard_bytes=600)
        return self.writer

    @rule(id=IDS, length=st.integers(0, 12), meta=METAS)
    def add(self, id, length, meta):
        tokens = self.tokens(length)
        if id in self.now:
            with pytest.raises(ValueError, match="is in the store already"):
                self.open().add(tokens, id)
        else:
            self.now[id] = (tokens, meta or {})
            self.open().add(tokens, id, meta=meta)
        self.noted()

    @rule(ids=st.lists(IDS, max_size=4), length=st.integers(0, 5))
    def add_packed(self, ids, length):
        tokens, offsets = self.tokens(length * len(ids)), torch.arange(len(ids) + 1) * length
        if len(set(ids)) < len(ids) or set(ids) & set(self.now):
            with pytest.raises(ValueError, match=r"id 'id-\d' is in"):
                self.open().add_packed(tokens, offsets, ids)
        else:
            self.now |= {id: (tokens[:length], {}) for id in ids}
            self.open().add_packed(tokens, offsets, ids)
        self.noted()

    @rule(id=IDS, length=st.one_of(st.none(), st.integers(0, 12)), meta=METAS)
    def replace(self, id, length, meta):
        tokens = None if length is None else self.tokens(length)
        if id not in self.now:
            with pytest.raises(KeyError, match=id):
                self.open().replace(tokens, id)
        else:
            old = self.now[id]
            self.now[id] = (old[0] if tokens is None else tokens, old[1] if meta is None else meta)
            self.open().replace(tokens, id, meta=meta)
        self.noted()

    @rule(id=IDS)
    def remove(self, id):
        if id not in self.now:
            with pytest.raises(KeyError, match=id):
                self.open().remove(id)
        else:
            del self.now[id]
            self.open().remove(id)

    @rule()
    def commit(self):
        self.open().commit()
        self.committed = dict(self.now)

    @rule()
    def compact(self):
        self.open().compact()
        self.committed = dict(self.now)

    @rule()
    def close(self):
        self.open().close()
        with pytest.raises(StoreError, match="is closed"):
            self.writer.add(self.tokens(1), "late")
        self.writer, self.committed = None, dict(self.now)

    @rule()
    def kill(self):
        """What a killed process leaves: nothing of what was not committed."""
        if self.writer is not None:
            self.writer._lock.close()
        self.writer, self.now = None, dict(self.committed)
        part = self.folder / "catalog.sqlite.new"
        part.write_bytes(b"half")

    @rule()
    def second_writer(self):
        self.open()
        with pytest.raises(StoreError, match="another writer"):
            StoreWriter(self.folder)

    @rule()
    def read(self):
        self.readers.append((PatchStore(self.folder), dict(self.committed)))
        self.readers = self.readers[-3:]

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def refresh(self, data):
        i = data.draw(st.integers(0, len(self.readers) - 1))
        store, _ = self.readers[i]
        store.refresh()
        self.readers[i] = store, dict(self.committed)

    @precondition(lambda self: self.readers)
    @rule()
    def pickled(self):
        store, expected = self.readers[0]
        self.readers.append((pickle.loads(pickle.dumps(store)), expected))

    @rule()
    def drop_readers(self):
        self.readers.clear()
        gc.collect()

    @rule(data=st.data(), kind=st.sampled_from(["flip", "cut", "delete"]))
    def damage(self, data, kind):
        """A copy of the store with one damaged shard is refused by name."""
        if not any(len(tokens) for tokens, _ in self.committed.values()):
            return
        copy = self.top / "copy"
        shutil.copytree(self.folder, copy)
        store = PatchStore(copy)
        path = data.draw(st.sampled_from([shard.path for shard in store.shards if shard.row.tokens]))
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        del store
        if kind == "delete":
            path.unlink()
        else:
            content[at] ^= 255
            path.write_bytes(content if kind == "flip" else content[:at])
        with pytest.raises(StoreError, match=path.name):
            PatchStore(copy).verify()
        shutil.rmtree(copy)

    @rule()
    def old_catalogue(self):
        """An old catalogue put back: the documents of then, and shards written since stay."""
        self.open().close()
        self.writer, self.committed = None, dict(self.now)
        copy = self.top / "copy"
        shutil.copytree(self.folder, copy)
        with StoreWriter(copy) as writer:
            writer.add(self.tokens(2), "newer")
        newer = {path.name for path in copy.glob("*.safetensors")}
        shutil.copy(self.folder / "catalog.sqlite", copy / "catalog.sqlite")
        with StoreWriter(copy) as writer:
            writer.add(self.tokens(3), "other")
        self.shows(PatchStore(copy), self.committed | {"other": (torch.zeros(3, DIM), {})}, values=False)
        assert newer <= {path.name for path in copy.glob("*.safetensors")}
        shutil.rmtree(copy)

    def shows(self, store, expected, values=True):
        assert store.ids == list(expected) and len(store) == len(expected)
        assert store.offsets.tolist() == [0, *torch.tensor([len(x) for x, _ in expected.values()]).cumsum(0).tolist()]
        if not values or not expected or store.dim is None:
            return
        whole = torch.full((store.n_tokens, DIM), torch.nan)
        store.read(0, len(store), whole)
        assert torch.equal(whole, torch.cat([tokens for tokens, _ in expected.values()]))
        for i, (id, (tokens, meta)) in enumerate(expected.items()):
            assert store.find(id) == i and torch.equal(store[id], tokens) and store.document_meta(i) == meta
        year = [i for i, (_, meta) in enumerate(expected.values()) if meta.get("year", 0) >= 2002]
        assert store.where("year >= ?", 2002).tolist() == year
        packed = [x for tokens, offsets in store.packed() for x in offsets.diff().tolist()]
        assert packed == [len(tokens) for tokens, _ in expected.values()]

    @invariant()
    def everything_is_seen(self):
        COUNTS["steps"] += 1
        for store, expected in self.readers:
            self.shows(store, expected)
        store = PatchStore(self.folder)
        self.shows(store, self.committed)
        store.verify()
        if self.writer is not None:
            assert len(self.writer) == len(self.now) and all(id in self.writer for id in self.now)


def test_the_store_is_a_dict():
    run = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    seeded(int(os.environ.get("LATEMAX_STORE_SEED", "0")))(Store)
    run_state_machine_as_test(Store, settings=run)
    assert COUNTS["steps"] > EXAMPLES
    print(f"{COUNTS['steps']} steps")
