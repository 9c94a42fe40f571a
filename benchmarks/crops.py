"""A corpus of real images for suites: crops of the demo's photos as DINOv2 patch tokens, cached as a store.

    python -m benchmarks.crops --n 20000 --folder ~/.cache/latemax/crops [--codes]

Encoding takes minutes; a run that was stopped continues where it was. With ``--codes`` the documents have 8-bit codes,
as `codes_topk` wants them.
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
BATCH = 16
# What multiplies bfloat16, by its names in `torch.cpu.get_capabilities`. Others emulate it: 3 crops a second on a Zen 3
# core, which takes 25 in float32.
MULTIPLIES_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
FOLDER = cache_folder() / "crops"


def boxes(n: int, photos: int, seed: int) -> list[tuple[int, float, float, float]]:
    """(photo, left, top, side) of n crops, as fractions of the photo's side; the first n of any larger number."""
    rng, found = random.Random(seed), []
    for i in range(n):
        side = rng.uniform(0.15, 0.6)
        found.append((i % photos, rng.uniform(0, 1 - side), rng.uniform(0, 1 - side), side))
    return found


def encode(n: int, folder: pathlib.Path, seed: int, codes: str | None = None) -> PatchStore:
    """A store of the first n crops of a seed, float16 [64, 384] each; only those that are missing are encoded.

    codes: "int8" to keep them too.
    """
    capable = torch.cpu.get_capabilities()
    options = dict(dtype=torch.float16, codes=codes, shard_bytes=1 << 26, meta={"seed": seed, "size": SIZE})
    with StoreWriter(folder, **options) as writer:
        if len(writer) < n:
            photos = load_photos()
            encoder, places = PatchEncoder.from_pretrained(str(dinov2_small())), boxes(n, len(photos), seed)
            for start in range(len(writer), n, BATCH):
                images = []
                for photo, left, top, side in places[start : start + BATCH]:
                    image = photos[photo].image
                    box = [round(x * image.width) for x in (left, top, left + side, top + side)]
                    images.append(image.crop(box))
                fast = any(capable.get(name) for name in MULTIPLIES_BFLOAT16)
                with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                    out = encoder.encode(images, batch_size=BATCH, size=SIZE)
                for tokens, (photo, *_) in zip(out.tokens, places[start : start + BATCH], strict=True):
                    writer.add(tokens.half(), grid=out.grid, meta={"photo": photos[photo].name})
    return PatchStore(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--folder", type=pathlib.Path, default=FOLDER)
    parser.add_argument("--codes", action="store_true", help="keep 8-bit codes of the documents too")
    options = parser.parse_args()
    print(encode(200, options.folder / "queries", 1))
    print(encode(options.n, options.folder / "documents", 0, "int8" if options.codes else None))


if __name__ == "__main__":
    main()
