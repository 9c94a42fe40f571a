"""Threads that score, search, encode and write for a long time: memory, descriptors and results stay as they are.

    python -m benchmarks.suites.soak [--minutes 30] [--json FILE]

One writer adds, replaces, removes, commits and now and then compacts; a searcher refreshes and searches its store;
two scorers call ``maxsim`` in several forms with known results; one thread encodes images with a tiny random ViT. A
sample a minute holds resident memory, open descriptors and threads.
"""

from __future__ import annotations

import os
import pathlib
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

import latemax
from benchmarks import harness
from benchmarks.tables import Table, markdown
from latemax.store import PatchStore, StoreWriter

DIM = 32
DOCUMENTS = 200
# the first minutes fill pools, caches and scratch buffers
WARM_MINUTES = 5


def document(version: int) -> torch.Tensor:
    """Tokens [1 … 40, dim] that a version number determines."""
    return torch.full((1 + version % 40, DIM), 1.0 + version % 7, dtype=torch.float16)


def resident_mb() -> float:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Soak:
    """Loops of several threads until ``stop``; the first exception of any of them ends all."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.path = folder / "store"
        self.stop = threading.Event()
        self.failed: list[BaseException] = []
        self.calls: Counter[str] = Counter()
        with StoreWriter(self.path) as writer:
            for i in range(DOCUMENTS):
                writer.add(document(i), id=i)

    def loop(self, name: str, step: Callable[[int], None]) -> None:
        try:
            while not self.stop.is_set():
                step(self.calls[name])
                self.calls[name] += 1
        except BaseException as error:
            self.failed.append(error)
            self.stop.set()

    def write(self, n: int) -> None:
        with StoreWriter(self.path) as writer:
            for i in range(5):
                writer.replace(document(n + i), id=(n * 5 + i) % DOCUMENTS)
            writer.remove((n * 7) % DOCUMENTS)
            writer.commit()
            writer.add(document(n), id=(n * 7) % DOCUMENTS)
            writer.commit()
            if n % 50 == 49:
                writer.compact()
        time.sleep(0.02)

    def search(self, n: int) -> None:
        store = self.searched
        if n % 3 == 0:
            store.refresh()
        q = torch.ones(4, DIM, dtype=torch.float16)
        found = latemax.topk(q, store, 5, return_argmax=True)
        best = max(float(store[i][0, 0]) for i in range(len(store)))
        # every token of a document is the same: its score is 4 · dim · value
        if found.scores[0] != 4 * DIM * best:
            raise AssertionError(f"topk returned {found.scores[0]}, not {4 * DIM * best}")

    def score(self, n: int) -> None:
        length = 1 + n % 50
        q, d = torch.ones(3, 7, 64), torch.ones(9, length, 64, requires_grad=n % 2 == 0)
        scores = latemax.maxsim(q, d)
        if d.requires_grad:
            scores.sum().backward()
        listed = latemax.maxsim([*q], [x[: 1 + i % length] for i, x in enumerate(d.detach())])
        if not (torch.equal(scores, listed) and bool((scores == 7 * 64).all())):
            raise AssertionError("maxsim returned another score")

    def encode(self, n: int) -> None:
        tokens = self.encoder.encode([self.image] * (1 + n % 3)).tokens
        if not torch.allclose(tokens, self.expected.expand_as(tokens), atol=1e-5):
            raise AssertionError("encode returned other tokens")

    def prepare(self) -> None:
        from PIL import Image
        from transformers import ViTConfig, ViTModel

        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=64,
            patch_size=16,
        )
        self.encoder = latemax.PatchEncoder(ViTModel(config, add_pooling_layer=False).eval())
        self.image = Image.effect_noise((80, 70), 60).convert("RGB")
        self.expected = self.encoder.encode([self.image]).tokens
        self.searched = PatchStore(self.path)

    def run(self, minutes: float, sample_seconds: float) -> list[dict[str, float]]:
        self.prepare()
        steps = {"write": self.write, "search": self.search, "score": self.score, "encode": self.encode}
        threads = [
            threading.Thread(target=self.loop, args=(name, step), name=f"{name}-{i}", daemon=True)
            for name, step in steps.items()
            for i in range(2 if name == "score" else 1)
        ]
        for thread in threads:
            thread.start()
        samples, start = [], time.monotonic()
        before: Counter[str] = Counter()
        while time.monotonic() - start < 60 * minutes and not self.stop.wait(sample_seconds):
            calls = Counter(self.calls)
            samples.append(
                dict(
                    minute=(time.monotonic() - start) / 60, resident_mb=resident_mb(),
                    descriptors=len(os.listdir("/proc/self/fd")), threads=len(os.listdir("/proc/self/task")),
                    calls=sum(calls.values()),
                )
            )  # fmt: skip
            stuck = [name for name in steps if calls[name] == before[name]]
            if stuck:
                self.failed.append(TimeoutError(f"no call of {', '.join(stuck)} ended within {sample_seconds:.0f} s"))
                break
            before = calls
        self.stop.set()
        for thread in threads:
            thread.join(60)
        if self.failed:
            raise self.failed[0]
        return samples


def measure(tiny: bool = False, minutes: float = 30) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(pathlib.Path(folder))
        samples = soak.run(0.2 if tiny else minutes, 5.0 if tiny else 60.0)
        calls = dict(soak.calls)
    steady = [sample for sample in samples if sample["minute"] > (0 if tiny else WARM_MINUTES)]
    first, last = steady[0], steady[-1]
    elapsed = max(last["minute"] - first["minute"], 1e-9)
    return dict(
        samples=samples, calls=calls, mb_a_minute=(last["resident_mb"] - first["resident_mb"]) / elapsed,
        descriptors=[min(s["descriptors"] for s in steady), max(s["descriptors"] for s in steady)],
        threads=[min(s["threads"] for s in steady), max(s["threads"] for s in steady)],
    )  # fmt: skip


def table(result: dict) -> str:
    head = ["minutes", "calls", "resident MB, first and last", "MB per minute", "descriptors", "threads"]
    samples = result["samples"]
    row = [
        f"{samples[-1]['minute']:.0f}", f"{sum(result['calls'].values()):,}",
        f"{samples[0]['resident_mb']:.0f}, {samples[-1]['resident_mb']:.0f}", f"{result['mb_a_minute']:+.2f}",
        "{} – {}".format(*result["descriptors"]), "{} – {}".format(*result["threads"]),
    ]  # fmt: skip
    return markdown(head, [row])


TABLES = {"soak": Table("soak", table)}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    options = parser.parse_args()
    result = measure(options.tiny, options.minutes)
    harness.finish(result, table, options.json)
    if not options.tiny and result["mb_a_minute"] >= 1:
        raise SystemExit(f"resident memory grew by {result['mb_a_minute']:.2f} MB per minute")


if __name__ == "__main__":
    main()
