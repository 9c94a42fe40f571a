"""Kills a writer at what it does to files, and cuts the power after it.

    python store_kill_worker.py SHIM FOLDER DRAWS STRIDE

Runs with tests/native/disk_shim.c preloaded. Prints one JSON object: how often it was killed and cut, and what was
wrong. Each STRIDE-th operation is taken, from a first one that differs by case. After an operation one power cut leaves
nothing that was not synced, and DRAWS more leave a random part of it.
"""

import ctypes
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
from pathlib import Path

import torch

from latemax.store import PatchStore, StoreError, StoreWriter
from latemax.store.packed import empty

SHIM = ctypes.CDLL(sys.argv[1])
SECTOR = 512


def document(i):
    return torch.full((3 + i % 5, 8), float(i), dtype=torch.float16)


def base(folder):
    """Two commits, so that there is something to remove, replace and compact."""
    with StoreWriter(folder) as writer:
        for i in range(4):
            writer.add(document(i), i)
        writer.commit()
        for i in range(4, 7):
            writer.add(document(i), i)


def fragmented(folder):
    base(folder)
    with StoreWriter(folder) as writer:
        writer.remove(1)
        writer.replace(document(50), 5)


def with_codes(folder):
    with StoreWriter(folder, codes="int8") as writer:
        for i in range(3):
            writer.add(document(i), i)
        writer.commit()
        for i in range(3, 6):
            writer.add(document(i), i)


def fragmented_with_codes(folder):
    with_codes(folder)
    with StoreWriter(folder) as writer:
        writer.remove(1)


def nothing(folder):
    folder.mkdir()


def add(writer):
    writer.add(document(10), 10)
    writer.add(document(11), 11, meta={"year": 1})
    writer.commit()


def remove(writer):
    writer.remove(2)
    writer.remove(6)
    writer.commit()


def replace(writer):
    writer.replace(document(40), 4)
    writer.replace(None, 5, meta={"year": 2})
    writer.commit()


def mixed(writer):
    writer.add(document(10), 10)
    writer.remove(0)
    writer.replace(document(40), 4)
    writer.commit()


# name: (the store before, what is done, whether a reader holds the generation before)
CASES = {
    "first commit": (nothing, add, False),
    "add": (base, add, False),
    "remove": (base, remove, False),
    "replace": (base, replace, False),
    "mixed": (base, mixed, False),
    "compact": (fragmented, StoreWriter.compact, False),
    "compact under a reader": (fragmented, StoreWriter.compact, True),
    "replace with codes": (with_codes, replace, False),
    "compact with codes": (fragmented_with_codes, StoreWriter.compact, False),
}


def work(folder, change):
    with StoreWriter(folder) as writer:
        change(writer)
        SHIM.shim_mark()


def contents(folder):
    """What a reader sees: {id: first value}; {} where there is no store yet."""
    if not (folder / "catalog.sqlite").exists():
        return {}
    store = PatchStore(folder)
    store.verify()
    if store.codes:
        codes = empty(torch.int8, store.n_tokens, store.dim)
        store.read(0, len(store), codes)
        if not torch.equal(codes.dequantize().round(), torch.cat(list(store)).float()):
            raise StoreError("the codes are of other tokens")
    return {id: (float(x[0, 0]), len(x)) for id, x in zip(store.ids, store, strict=True)}


def checked(folder, before, after, done):
    """What is wrong with a store after the kill, or None; then a writer goes on with it."""
    try:
        found = contents(folder)
        if found != after and (done or found != before):
            return f"{found}, not {after}" + ("" if done else f" or {before}")
        with StoreWriter(folder) as writer:
            writer.add(document(30), 30)
        if contents(folder) != found | {30: (30.0, len(document(30)))}:
            return "the next writer lost something"
        with StoreWriter(folder) as writer:
            writer.compact()
        store = PatchStore(folder)
        left = {name for name in os.listdir(folder) if name.endswith(".safetensors")} - {x.name for x in store.shards}
        if left:
            return f"left: {left}"
    except (StoreError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def child(folder, change, kill_at, log, torn):
    pid = os.fork()
    if not pid:
        SHIM.shim_arm(os.fsencode(folder), kill_at, log, torn)
        work(folder, change)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def kills(source, folder, change, before, after, wrong, first, stride):
    count = 0
    for torn in (0, 1):
        for n in range((first + torn) % stride, 10_000, stride):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(source, folder)
            killed = child(folder, change, n, -1, torn)
            problem = checked(folder, before, after, not killed)
            if problem:
                wrong.append(f"killed at {n}{' in the write' if torn else ''}: {problem}")
            if not killed:
                break
            count += 1
    return count


def read_log(path):
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        op = chr(data[at])
        a, b, offset, n = struct.unpack_from("<4q", data, at + 1)
        at += 33
        name, other = data[at : at + a].decode(), data[at + a : at + a + b].decode()
        at += a + b
        size = n if op == "W" else 0
        found.append((op, name, other, offset, data[at : at + size]))
        at += size
    return found


class Disk:
    """Files of one folder: what is synced, and what is not."""

    def __init__(self, folder):
        self.folder = str(folder)
        self.files = {str(p): [p.read_bytes(), []] for p in folder.iterdir()}  # inode: [synced content, writes since]
        self.names = {name: self.files[name] for name in self.files}
        self.synced = dict(self.names)
        self.changes = []

    def apply(self, op, name, other, offset, data):
        if op == "C":
            self.names[name] = [b"", []]
            self.changes.append((name, self.names[name]))
        elif op in "WT":
            self.names[name][1].append((op, offset, data))
        elif op == "S" and name == self.folder:
            self.synced, self.changes = dict(self.names), []
        elif op == "S" and name in self.names:
            inode = self.names[name]
            inode[:] = [content(inode[0], inode[1]), []]
        elif op == "U":
            del self.names[name]
            self.changes.append((name, None))
        elif op == "R":
            self.names[other] = self.names.pop(name)
            self.changes += [(other, self.names[other]), (name, None)]

    def after_power_cut(self, rng, to):
        """The folder as it may be found: of what was not synced nothing, or (with rng) a part."""
        names = dict(self.synced)
        # the journal of a file system keeps the order of names
        for name, inode in self.changes[: rng.randint(0, len(self.changes)) if rng else 0]:
            names.pop(name, None)
            if inode is not None:
                names[name] = inode
        to.mkdir()
        for name, (data, writes) in names.items():
            if rng:
                writes = [w for w in writes if rng.random() < 0.5]
            (to / Path(name).name).write_bytes(content(data, writes if rng else []))


def content(data, writes):
    data = bytearray(data)
    for op, offset, new in writes:
        if op == "T":
            del data[offset:]
            data += bytes(offset - len(data))
        else:
            data += bytes(max(0, offset + len(new) - len(data)))
            data[offset : offset + len(new)] = new
    return bytes(data)


def power_cuts(source, folder, change, before, after, wrong, draws, first, stride):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    disk = Disk(folder)
    log = folder.with_name("log")
    with open(log, "wb") as file:
        assert not child(folder, change, -1, file.fileno(), 0)
    done, cuts, rng = False, 0, random.Random(0)
    for number, entry in enumerate(read_log(log)):
        if entry[0] == "M":
            done = True
        else:
            disk.apply(*entry)
        if number % stride != first % stride:
            continue
        for draw in range(draws + 1):
            found = folder.with_name("found")
            shutil.rmtree(found, ignore_errors=True)
            disk.after_power_cut(rng if draw else None, found)
            problem = checked(found, before, after, done)
            cuts += 1
            if problem:
                wrong.append(f"power cut after {number} ({entry[0]} {Path(entry[1]).name}), draw {draw}: {problem}")
    return cuts


def main():
    torch.set_num_threads(1)
    work_folder, draws, stride = Path(sys.argv[2]).resolve(), int(sys.argv[3]), int(sys.argv[4])
    result = {"kills": {}, "power cuts": {}, "wrong": []}
    for first, (name, (make, change, held)) in enumerate(CASES.items()):
        top = Path(tempfile.mkdtemp(dir=work_folder))
        source, folder, wrong = top / "source", top / "store", []
        make(source)
        before = contents(source)
        shutil.copytree(source, folder)
        work(folder, change)
        after = contents(folder)
        result["kills"][name] = kills(source, folder, change, before, after, wrong, first, stride)
        if held:
            shutil.rmtree(folder)
            shutil.copytree(source, folder)
            reader = PatchStore(folder)
            seen = contents(folder)
            work(folder, change)
            reader.verify()
            if {id: (float(x[0, 0]), len(x)) for id, x in zip(reader.ids, reader, strict=True)} != seen:
                wrong.append("a reader saw the compaction")
        result["power cuts"][name] = power_cuts(source, folder, change, before, after, wrong, draws, first, stride)
        result["wrong"] += [f"{name}: {problem}" for problem in wrong]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
