"""A corpus of real images for suites: crops of the demo's photos as DINOv2 patch tokens, cached as a store.

    python -m benchmarks.crops --n 20000 --folder ~/.cache/latemax/crops

Encoding takes minutes; a run that was stopped continues where it was.
"""

from __future__ import annotations

import argparse
import pathlib
import random

import torch

from latemax import PatchEncoder
from latemax.demo.photos import load_photos
from latemax.encoders.weights import cache_folder, dinov2_small
from latemax.store import PatchStore, StoreWriter

SIZE = 112  # pixels: 64 patches
BATCH = 64
FOLDER = cache_folder() / "crops"


def boxes(n: int, photos: int, seed: int) -> list[tuple[int, float, float, float]]:
    """(photo, left, top, side) of n crops, as fractions of the photo's side; the first n of any larger number."""
    rng, found = random.Random(seed), []
    for i in range(n):
        side = rng.uniform(0.15, 0.6)
        found.append((i % photos, rng.uniform(0, 1 - side), rng.uniform(0, 1 - side), side))
    return found


def encode(n: int, folder: pathlib.Path, seed: int) -> PatchStore:
    """A store of the first n crops of a seed, float16 [64, 384] each; only those that are missing are encoded."""
    with StoreWriter(folder, dtype=torch.float16, shard_bytes=1 << 26, meta={"seed": seed, "size": SIZE}) as writer:
        if len(writer) < n:
            photos = load_photos()
            encoder, places = PatchEncoder.from_pretrained(str(dinov2_small())), boxes(n, len(photos), seed)
            for start in range(len(writer), n, BATCH):
                images = []
                for photo, left, top, side in places[start : start + BATCH]:
                    image = photos[photo].image
                    box = [round(x * image.width) for x in (left, top, left + side, top + side)]
                    images.append(image.crop(box))
                with torch.autocast("cpu", torch.bfloat16):
                    out = encoder.encode(images, batch_size=BATCH, size=SIZE)
                for tokens, (photo, *_) in zip(out.tokens, places[start : start + BATCH], strict=True):
                    writer.add(tokens.half(), grid=out.grid, meta={"photo": photos[photo].name})
    return PatchStore(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--folder", type=pathlib.Path, default=FOLDER)
    options = parser.parse_args()
    print(encode(200, options.folder / "queries", 1))
    print(encode(options.n, options.folder / "documents", 0))


if __name__ == "__main__":
    main()
