"""A writer killed (SIGKILL) at random moments: every store stays readable, nothing committed is lost.

    python -m benchmarks.suites.kill_writer [--kills 50] [--json FILE]

A process writes to one store, reports every commit after it returned, and is killed; then the store is opened, verified
and compared with what was reported, and the next process continues it.
"""

from __future__ import annotations

import multiprocessing
import pathlib
import random
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks import harness
from benchmarks.tables import Table, markdown
from latemax.store import PatchStore, StoreWriter

DIM = 16


def document(i: int) -> torch.Tensor:
    """The i-th document, [1 … 400, dim]: its number says its length and its values."""
    return torch.full((1 + (i * 37) % 400, DIM), float(i % 1000), dtype=torch.float16)


def write(folder: pathlib.Path, reports: Connection) -> None:
    """Appends and commits a few documents at a time until killed; reports how many are committed."""
    with StoreWriter(folder) as writer:
        reports.send(len(writer))
        while True:
            for _ in range(8):
                writer.add(document(len(writer)))
            writer.commit()
            reports.send(len(writer))


def killed_writer(folder: pathlib.Path, seconds: float) -> int:
    """Kills a writer so many seconds after it opened the store; how many documents it reported."""
    context = multiprocessing.get_context("spawn")
    reports, sender = context.Pipe(duplex=False)
    writer = context.Process(target=write, args=(folder, sender))
    writer.start()
    # the writer's own copy is the last one then, and its death ends the reports
    sender.close()
    committed = reports.recv()
    time.sleep(seconds)
    writer.kill()
    while True:
        try:
            committed = reports.recv()
        except EOFError:
            break
    writer.join()
    return committed


def kill_writers(folder: pathlib.Path, kills: int, seed: int) -> dict[str, int]:
    """Kills ``kills`` writers of one store; counts what was lost or unreadable."""
    rng = random.Random(seed)
    result = dict(kills=0, documents=0, lost=0, unreadable=0, unfinished_files=0)
    for _ in range(kills):
        committed = killed_writer(folder, rng.uniform(0, 0.25))
        result["kills"] += 1
        try:
            if not committed and not (folder / "catalog.sqlite").exists():
                continue
            store = PatchStore(folder)
            store.verify()
            right = all(torch.equal(tokens, document(i)) for i, tokens in enumerate(store))
        except (OSError, ValueError) as error:
            print(f"unreadable: {error}", file=sys.stderr)
            result["unreadable"] += 1
            continue
        # a commit may be on the disk that was not reported yet
        if not right or not committed <= len(store) <= committed + 8:
            result["lost"] += 1
        known = {shard.name for shard in store.shards}
        result["unfinished_files"] += any(path.name not in known for path in folder.glob("shard-*"))
        result["documents"] = len(store)
    return result


def measure(tiny: bool = False, kills: int = 50, seed: int = 0) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return kill_writers(pathlib.Path(folder) / "store", 2 if tiny else kills, seed)


def table(result: dict) -> str:
    head = ["writers killed", "stores unreadable", "kills that lost a commit", "kills that left a file to clear",
            "documents at the end"]  # fmt: skip
    return markdown(
        head,
        [
            [
                result["kills"],
                result["unreadable"],
                result["lost"],
                result["unfinished_files"],
                f"{result['documents']:,}",
            ]
        ],
    )


TABLES = {"kill-writer": Table("kill_writer", table)}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    result = measure(options.tiny, options.kills, options.seed)
    harness.finish(result, table, options.json)
    if result["lost"] or result["unreadable"]:
        raise SystemExit("a committed document was lost, or a store could not be read")


if __name__ == "__main__":
    main()
