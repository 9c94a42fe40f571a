"""Words that find their patch: one vector a word and a projection, trained through MaxSim on a frozen ViT."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latemax import maxsim
from latemax.demo.photos import Photo, compose
from latemax.demo.progress import one_thread

if TYPE_CHECKING:
    from PIL.Image import Image

    from latemax import PatchEncoder

# pixels of a canvas of 2 x 2 photos: 8 x 8 patches of 14 pixels
SIZE = 112
N_TRAIN, N_TEST = 240, 96
DIM, STEPS, BATCH, RATE = 64, 300, 32, 5e-3
# these words are shown if their photos are installed
SHOWN = ("cat", "motorcycle", "coffee")


class Canvases(NamedTuple):
    """Encoded canvases.

    Attributes:
        images: of ``SIZE`` x ``SIZE`` pixels.
        photos: int64 [n, 4], which photo is in which quadrant (row-major).
        tokens: [n, p + rows * cols, width], the ViT's, CLS and other prefix tokens first.
        prefix: p.
        grid: (rows, cols).
    """

    images: list[Image]
    photos: Tensor
    tokens: Tensor
    prefix: int
    grid: tuple[int, int]


class Words(nn.Module):
    """One vector a word, and a projection of the ViT's tokens into their space."""

    def __init__(self, n: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Embedding(n, DIM)
        self.projection = nn.Linear(width, DIM, bias=False)
        # CLIP's initial temperature, 0.07
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def text(self, ids: Tensor) -> Tensor:
        """Returns unit vectors [..., DIM] of word ids [...]."""
        return F.normalize(self.vectors(ids), dim=-1)

    def project(self, tokens: Tensor) -> Tensor:
        """Returns unit tokens [..., DIM]."""
        return F.normalize(self.projection(tokens), dim=-1)


def encode(encoder: PatchEncoder, photos: list[Photo], n: int, seed: int) -> Canvases:
    """Composes n canvases of random crops of four photos each, and encodes them."""
    images, which = compose(photos, n, SIZE, seed)
    out = encoder.encode(images, size=(SIZE, SIZE), return_prefix=True)
    prefix = 0 if out.prefix is None else out.prefix.shape[1]
    tokens = out.tokens if out.prefix is None else torch.cat([out.prefix, out.tokens], 1)
    assert isinstance(out.grid, tuple)
    return Canvases(images, which, tokens, prefix, out.grid)


def train(canvases: Canvases, n_words: int, *, keep_prefix: bool, seed: int) -> Words:
    """Trains words from captions: two of a canvas's four photos by name, never where they are.

    Args:
        canvases: what is trained on.
        n_words: number of words, one a photo.
        keep_prefix: MaxSim over CLS and patches, else over patches.
        seed: of the first weights, the batches and the captions.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = Words(n_words, canvases.tokens.shape[-1])
    generator = torch.Generator().manual_seed(seed)
    tokens = canvases.tokens if keep_prefix else canvases.tokens[:, canvases.prefix :]
    optimiser = torch.optim.AdamW(words.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=STEPS + 1)
    for _ in range(STEPS):
        at = torch.randperm(len(tokens), generator=generator)[:BATCH]
        photos = canvases.photos[at]
        pairs = photos.gather(1, torch.rand(len(at), 4, generator=generator).argsort(1)[:, :2])
        # a canvas that shows both photos of another caption is no negative
        both = (pairs[:, None, :, None] == photos[None, :, None, :]).any(-1).all(-1)
        own = torch.arange(len(at))
        scores = maxsim(words.text(pairs), words.project(tokens[at])) / pairs.shape[1]
        logits = words.log_scale.exp().clamp(max=100) * scores
        logits = logits.masked_fill(both & ~torch.eye(len(at), dtype=torch.bool), -math.inf)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return words.requires_grad_(False)


def pointing(words: Words, canvases: Canvases, *, keep_prefix: bool) -> dict[str, float]:
    """Computes how often the argmax of a photo's word on its canvas is in the photo's quadrant, over all photos.

    Returns:
        ``{"pointing", "cls"}``: the share in the right quadrant, and the share whose argmax is CLS, which is a miss.
    """
    first = canvases.prefix if keep_prefix else 0
    tokens = words.project(canvases.tokens[:, canvases.prefix - first :])
    # every photo of a canvas is a word of one query
    similarity = words.text(canvases.photos) @ tokens.transpose(1, 2)
    argmax = similarity.argmax(-1) - first
    rows, cols = canvases.grid
    quadrant = argmax.div(cols, rounding_mode="floor") * 2 // rows * 2 + argmax % cols * 2 // cols
    right = (argmax >= 0) & (quadrant == torch.arange(4))
    return {"pointing": float(right.double().mean()), "cls": float((argmax < 0).double().mean())}


def shown_words(photos: list[Photo]) -> Tensor:
    """Returns the numbers of the words that are shown: `SHOWN`, or the first ones if none of them is installed."""
    found = [i for name in SHOWN for i, photo in enumerate(photos) if photo.name == name]
    return torch.tensor(found or list(range(min(len(SHOWN), len(photos)))))


def study(encoder: PatchEncoder, photos: list[Photo], seed: int) -> tuple[dict[str, Any], dict[str, Words], Canvases]:
    """Trains words with CLS kept and dropped, and measures both on canvases of other crops and compositions.

    Returns:
        (numbers, ``{"kept": words, "dropped": words}``, the held-out canvases); "kept" only if there is a CLS token.
    """
    seen, unseen = encode(encoder, photos, N_TRAIN, 2 * seed), encode(encoder, photos, N_TEST, 2 * seed + 1)
    hows = ("kept", "dropped") if seen.prefix else ("dropped",)
    with one_thread():
        trained = {how: train(seen, len(photos), keep_prefix=how == "kept", seed=seed) for how in hows}
    torch.manual_seed(seed)
    untrained = Words(len(photos), seen.tokens.shape[-1]).requires_grad_(False)
    numbers: dict[str, Any] = {
        "photos": len(photos),
        "train": N_TRAIN,
        "test": N_TEST,
        "steps": STEPS,
        "chance": {"dropped": 1 / 4, "kept": seen.grid[0] * seen.grid[1] / 4 / seen.tokens.shape[1]},
        "untrained": {how: pointing(untrained, unseen, keep_prefix=how == "kept") for how in hows},
        "trained": {how: pointing(trained[how], unseen, keep_prefix=how == "kept") for how in hows},
    }
    return numbers, trained, unseen
