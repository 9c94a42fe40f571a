"""A writer killed (SIGKILL) at random moments: every store left readable, nothing lost that was committed.

    python -m benchmarks.kill_writer [--kills 50] [--json FILE]

One store is written to by a process that reports every commit after it returned, and is killed; then the store is
opened, verified and compared with what was reported, and the next process goes on with it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import torch

from latemax.store import PatchStore, StoreWriter

ROOT = pathlib.Path(__file__).parents[1]
DIM = 16


def document(i: int) -> torch.Tensor:
    """[1 … 400, dim], told by its number."""
    return torch.full((1 + (i * 37) % 400, DIM), float(i % 1000), dtype=torch.float16)


def write(folder: pathlib.Path) -> None:
    """Appends and commits a few documents at a time until killed; prints how many are committed."""
    with StoreWriter(folder) as writer:
        print("ready", len(writer), flush=True)
        while True:
            for _ in range(8):
                writer.add(document(len(writer)))
            writer.commit()
            print(len(writer), flush=True)


def run(folder: pathlib.Path, kills: int, seed: int) -> dict:
    """Kills ``kills`` writers of one store; counts what was lost or unreadable."""
    rng = random.Random(seed)
    result = dict(kills=0, documents=0, lost=0, unreadable=0, left_behind=0)
    for _ in range(kills):
        command = [sys.executable, "-m", "benchmarks.kill_writer", "--write", str(folder)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        committed = int(writer.stdout.readline().split()[1])
        time.sleep(rng.uniform(0, 0.25))
        writer.kill()
        for line in writer.stdout.read().split():
            committed = int(line)
        writer.wait()
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
        result["left_behind"] += any(path.name not in known for path in folder.glob("shard-*"))
        result["documents"] = len(store)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--write", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(options.write)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = run(pathlib.Path(folder) / "store", options.kills, options.seed)
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if result["lost"] or result["unreadable"]:
        raise SystemExit("a committed document was lost, or a store could not be read")


if __name__ == "__main__":
    main()
