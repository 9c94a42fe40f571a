"""Fine-tunes a ViT for late interaction: LoRA on W_Q and W_V, a projection and word vectors, trained through MaxSim.

The task. Sample photos of pip packages are pasted into 2x2 canvases; the caption of a canvas, "a photo of a X and a Y",
names two of its four photos. A frozen DINOv2 ViT-S/14 encodes the canvases. The trained parameters are a projection of
its tokens, one vector per word, and, with LoRA, low-rank updates to W_Q and W_V of the last blocks. The training data
never says where a photo is: a name that points at the right quadrant has learnt it only from captions of whole
canvases.

The question. Three objectives (one pooled vector, the CLS token, as CLIP trains; MaxSim over CLS and patches; MaxSim
over patches) are trained with the same settings, and each model is then scored in all three ways on held-out canvases::

    P@1       share of captions whose best canvas shows both photos
    pointing  share of names whose argmax patch on their own canvas is in their photo's quadrant (CLS is a miss)
    CLS wins  share of names whose argmax on their own canvas is CLS, if it is kept

Compositions and crops are held out, photos are not: every photo is seen in training.

    python examples/train_grounding.py                # the whole table; --seeds 0: one seed
    python examples/train_grounding.py --quick        # a few steps as a trial run; the numbers mean nothing

Needs ``pip install "latemax[demo]"``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latemax import LoRA, PatchEncoder, add_lora, maxsim
from latemax.analysis import argmax_share, own_pairs, similarity_distribution, token_groups
from latemax.demo.photos import Photo, compose, load_photos

if TYPE_CHECKING:
    from PIL.Image import Image

FILLERS = ("a", "photo", "of", "and")
# positions of the names in "a photo of a X and a Y", and its length
NOUNS, L_Q = (4, 7), 8
CLS, PATCHES = 0, slice(1, None)
# number of canvases kept for the picture, and of steps per recorded mean loss
N_MAPS, LOSS_STEPS = 4, 10
OBJECTIVES = {
    "pooled": "one pooled vector (CLS), CLIP-style",
    "kept": "MaxSim, CLS kept",
    "dropped": "MaxSim, CLS dropped",
}
RUNS = [(how, use_lora) for how in OBJECTIVES for use_lora in (False, True)]
METRICS = ("p_at_1_pooled", "p_at_1_kept", "p_at_1_dropped", "pointing_kept", "pointing_dropped", "cls_wins")


@dataclass(frozen=True)
class Settings:
    """Settings of one run.

    Attributes:
        size: canvas side in pixels.
        n_train, n_test: number of training and of held-out canvases.
        dim: features per token after the projection.
        rank, blocks: rank of the LoRA updates, and number of the last blocks that have them; earlier ones are cached.
        warm_steps: steps with a frozen ViT.
        steps: further steps at lower rates, which also train LoRA if there is one.
        batch: captions per step.
        warm_lr, lr: learning rates of the warm and of the further steps.
        lora_lr: learning rate of the LoRA factors.
    """

    size: int = 112
    n_train: int = 320
    n_test: int = 160
    dim: int = 64
    rank: int = 8
    blocks: int = 3
    warm_steps: int = 300
    steps: int = 50
    batch: int = 32
    warm_lr: float = 5e-3
    lr: float = 2e-3
    lora_lr: float = 3e-3


QUICK = Settings(n_train=24, n_test=12, dim=16, rank=2, blocks=1, warm_steps=4, steps=4, batch=8)


@dataclass(frozen=True)
class Canvases:
    """Encoded canvases.

    Attributes:
        photos: int64 [n, 4], which photo is in which quadrant (row-major).
        hidden: [n, 1 + rows * cols, width], the input of the blocks that LoRA adapts; CLS first.
        final: [n, 1 + rows * cols, width], the output of the frozen ViT after the final norm; CLS first.
        grid: (rows, cols).
    """

    photos: Tensor
    hidden: Tensor
    final: Tensor
    grid: tuple[int, int]


def encode(encoder: PatchEncoder, images: list[Image], photos: Tensor, s: Settings) -> Canvases:
    """Runs the frozen ViT once and keeps the input of block ``-s.blocks`` and the final output."""
    entering: list[Tensor] = []
    block = encoder.model.encoder.layer[-s.blocks]
    hook = block.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    try:
        out = encoder.encode(images, size=(s.size, s.size), return_prefix=True)
    finally:
        hook.remove()
    return Canvases(photos, torch.cat(entering), torch.cat([out.prefix, out.tokens], 1), out.grid)


class Tail(nn.Module):
    """The last blocks of a ViT and its final norm: [b, 1 + n, width] to (tokens of that shape, grid)."""

    def __init__(self, blocks: Iterable[nn.Module], norm: nn.Module, grid: tuple[int, int]) -> None:
        super().__init__()
        self.blocks, self.norm, self.grid = nn.ModuleList(blocks), norm, grid

    def forward(self, hidden: Tensor) -> tuple[Tensor, tuple[int, int]]:
        for block in self.blocks:
            out = block(hidden)
            hidden = out[0] if isinstance(out, tuple) else out
        return self.norm(hidden), self.grid


class Retriever(nn.Module):
    """Word vectors and a projection to one space of ``dim`` features, shared by CLS and the patches."""

    def __init__(self, n_names: int, width: int, dim: int) -> None:
        super().__init__()
        self.words = nn.Embedding(len(FILLERS) + n_names, dim)
        self.projection = nn.Linear(width, dim, bias=False)
        # CLIP's initial temperature, 0.07
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def text(self, ids: Tensor) -> Tensor:
        """Returns unit word vectors [b, l_q, dim] for ids [b, l_q]."""
        return F.normalize(self.words(ids), dim=-1)


def captions(pairs: Tensor) -> Tensor:
    """Returns the word ids [b, 8] of "a photo of a X and a Y" for pairs [b, 2], the photos to name."""
    a, photo, of, and_ = (torch.full((len(pairs),), i) for i in range(len(FILLERS)))
    x, y = (pairs + len(FILLERS)).T
    return torch.stack([a, photo, of, a, x, and_, a, y], 1)


def relevance(pairs: Tensor, photos: Tensor) -> Tensor:
    """Returns bool [n_q, n_d]: the canvases that show both named photos, from pairs [n_q, 2] and photos [n_d, 4]."""
    return (pairs[:, None, :, None] == photos[None, :, None, :]).any(-1).all(-1)


def score(text: Tensor, tokens: Tensor, how: str) -> Tensor:
    """Scores unit text [n_q, 8, dim] and unit tokens [n_d, 1 + n, dim], CLS first: [n_q, n_d] in -1..1."""
    if how == "pooled":
        return F.normalize(text.mean(1), dim=-1) @ tokens[:, CLS].T
    return maxsim(text, tokens if how == "kept" else tokens[:, PATCHES]) / text.shape[1]


def contrastive_loss(scores: Tensor, relevant: Tensor, scale: Tensor) -> Tensor:
    """Computes symmetric InfoNCE in the batch. A canvas that also shows both photos of another caption is no negative.

    Args:
        scores: [b, b], the diagonal holds the right pairs.
        relevant: bool [b, b], canvases that show both photos.
        scale: the inverse temperature.
    """
    own = torch.eye(len(scores), dtype=torch.bool)
    logits = (scale * scores).masked_fill(relevant & ~own, -math.inf)
    target = torch.arange(len(scores))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def with_prefix(encoder: PatchEncoder, inputs: Tensor) -> Tensor:
    """Returns unit tokens [b, 1 + n, dim], CLS first."""
    out = encoder(inputs, return_prefix=True)
    return torch.cat([out.prefix, out.tokens], 1)


def train(model: Retriever, encoder: PatchEncoder, inputs: Tensor, photos: Tensor, how: str, steps: int, lr: float,
          s: Settings, generator: torch.Generator, lora: LoRA | None = None,
          tick: Callable[[], Any] = lambda: None) -> list[float]:  # fmt: skip
    """Trains ``model``, and the factors of ``lora``, with objective ``how``; returns the loss of every step."""
    groups: list[dict[str, Any]] = [{"params": list(model.parameters()), "lr": lr}]
    if lora is not None:
        groups.append({"params": list(lora.parameters()), "lr": s.lora_lr})
    optimiser = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [g["lr"] for g in groups], total_steps=steps + 1)
    losses = []
    for _ in range(steps):
        at = torch.randperm(len(inputs), generator=generator)[: s.batch]
        order = torch.rand(len(at), 4, generator=generator).argsort(1)[:, :2]
        pairs = photos[at].gather(1, order)
        scores = score(model.text(captions(pairs)), with_prefix(encoder, inputs[at]), how)
        loss = contrastive_loss(scores, relevance(pairs, photos[at]), model.log_scale.exp().clamp(max=100))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        tick()
    return losses


def pointing(argmax: Tensor, quadrants: Tensor, grid: tuple[int, int]) -> float:
    """Returns the share of argmax patches [b, 2] that are in the right quadrant [b, 2] (row-major); -1 is a miss."""
    rows, cols = grid
    row, col = argmax.div(cols, rounding_mode="floor"), argmax % cols
    hit = (row * 2 // rows * 2 + col * 2 // cols == quadrants) & (argmax >= 0)
    return float(hit.double().mean())


def p_at_1(scores: Tensor, relevant: Tensor) -> float:
    """Returns the share of queries whose highest-scoring document is relevant; both arguments are [n_q, n_d]."""
    return float(relevant.gather(1, scores.argmax(1, keepdim=True)).double().mean())


@torch.no_grad()
def evaluate(
    model: Retriever, encoder: PatchEncoder, inputs: Tensor, photos: Tensor, grid: tuple[int, int]
) -> dict[str, Any]:
    """Computes all metrics over two captions per canvas: one names the top two photos, one the bottom two."""
    n = len(photos)
    owner = torch.arange(n).repeat(2)
    quadrants = torch.tensor([[0, 1], [2, 3]]).repeat_interleave(n, 0)
    pairs = photos[owner].gather(1, quadrants)
    tokens = torch.cat([with_prefix(encoder, part) for part in inputs.split(64)])
    text, relevant = model.text(captions(pairs)), relevance(pairs, photos)
    result: dict[str, Any] = {"p_at_1_pooled": p_at_1(score(text, tokens, "pooled"), relevant)}
    for how, first_patch in (("kept", 1), ("dropped", 0)):
        scores, argmax = maxsim(text, tokens[:, 1 - first_patch :], return_argmax=True)
        result[f"p_at_1_{how}"] = p_at_1(scores, relevant)
        own = argmax[torch.arange(len(owner)), owner][:, NOUNS].long()
        result[f"pointing_{how}"] = pointing(own - first_patch, quadrants, grid)
    groups, pairs_counted = token_groups(tokens.shape[1] - 1), own_pairs(owner, n)
    nouns = text[:, NOUNS]
    result["cls_wins"] = argmax_share(nouns, tokens, groups, pairs=pairs_counted)["CLS"]["share"]
    cosine = similarity_distribution(nouns, tokens, groups, pairs=pairs_counted).cosine_mean
    result["cosine"] = {name: cosine[name] for name in ("CLS", "patches", "maximum")}
    result["chance"] = {
        "p_at_1": float(relevant.double().mean()), "pointing": 1 / 4, "cls_wins": 1 / tokens.shape[1],
    }  # fmt: skip
    return result


@torch.no_grad()
def noun_maps(
    model: Retriever, encoder: PatchEncoder, inputs: Tensor, photos: Tensor, n: int = N_MAPS
) -> list[dict[str, Any]]:
    """Returns the cosines for the picture: all tokens of canvas c, CLS first, with the name of its photo c % 4."""
    tokens = with_prefix(encoder, inputs[:n])
    quadrant = torch.arange(len(tokens)) % 4
    name = photos[: len(tokens)].gather(1, quadrant[:, None])[:, 0]
    cosines = torch.einsum("cnd,cd->cn", tokens, model.text(name + len(FILLERS)))
    return [
        {"photo": int(p), "quadrant": int(q), "cosines": [round(v, 3) for v in c.tolist()]}
        for p, q, c in zip(name, quadrant, cosines, strict=True)
    ]


def run_one(vit: Any, n_names: int, data: tuple[Canvases, Canvases], how: str, use_lora: bool, seed: int,
            s: Settings, tick: Callable[[], Any] = lambda: None) -> dict[str, Any]:  # fmt: skip
    """Trains once and evaluates; returns one row of the table."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    seen, unseen = data
    model = Retriever(n_names, seen.final.shape[-1], s.dim)

    def encoder_of(blocks: Iterable[nn.Module], norm: nn.Module) -> PatchEncoder:
        return PatchEncoder(Tail(blocks, norm, seen.grid), n_prefix=1, projection=model.projection)

    frozen = encoder_of([], nn.Identity())
    losses = train(model, frozen, seen.final, seen.photos, how, s.warm_steps, s.warm_lr, s, generator, tick=tick)
    encoder, lora, name = frozen, None, "final"
    if use_lora:
        encoder, name = encoder_of(vit.encoder.layer[-s.blocks :], vit.layernorm), "hidden"
        lora = add_lora(encoder, rank=s.rank, alpha=2 * s.rank)
    fed, test = getattr(seen, name), getattr(unseen, name)
    losses += train(model, encoder, fed, seen.photos, how, s.steps, s.lr, s, generator, lora, tick)
    row = {"trained": how, "lora": use_lora, "seed": seed, **evaluate(model, encoder, test, unseen.photos, unseen.grid)}
    row["maps"] = noun_maps(model, encoder, test, unseen.photos)
    row["losses"] = [round(statistics.mean(losses[i : i + LOSS_STEPS]), 4) for i in range(0, len(losses), LOSS_STEPS)]
    if lora is not None:
        # the next run starts from the same ViT
        lora.remove()
    return row


def run(
    seeds: list[int], s: Settings, encoder: PatchEncoder, photos: list[Photo], progress: bool = True
) -> dict[str, Any]:
    """Runs every objective with and without LoRA for every seed; a seed draws canvases, crops, captions and weights."""
    from tqdm import tqdm

    start, cpu_start = time.perf_counter(), time.process_time()
    rows, n_runs = [], len(seeds) * len(RUNS)
    # disable=None draws no bar if stderr is not a terminal
    with tqdm(total=n_runs * (s.warm_steps + s.steps), unit="step", disable=None if progress else True) as bar:
        for seed in seeds:
            bar.set_description(f"seed {seed}: encoding canvases")
            # even seeds for training, odd seeds for testing: no two are equal
            data = (
                encode(encoder, *compose(photos, s.n_train, s.size, 2 * seed), s),
                encode(encoder, *compose(photos, s.n_test, s.size, 2 * seed + 1), s),
            )
            for how, use_lora in RUNS:
                bar.set_description(f"seed {seed}: {how}{' + LoRA' if use_lora else ''}")
                rows.append(run_one(encoder.model, len(photos), data, how, use_lora, seed, s, bar.update))
    for row in rows:
        if row["seed"] != seeds[0]:
            del row["maps"]
    return {
        "settings": asdict(s),
        "seeds": seeds,
        "photos": [photo.name for photo in photos],
        "grid": data[0].grid,
        "chance": {name: statistics.mean(row["chance"][name] for row in rows) for name in rows[0]["chance"]},
        "summary": summarise(rows),
        "rows": rows,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "machine": {
            "python": platform.python_version(), "torch": torch.__version__, "processor": platform.machine(),
            "cpu_count": os.cpu_count(), "threads": torch.get_num_threads(),
        },
    }  # fmt: skip


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns mean and standard deviation over the seeds (0 for one seed), a row per objective and use of LoRA."""
    table = []
    for how, use_lora in RUNS:
        mine = [row for row in rows if row["trained"] == how and row["lora"] == use_lora]
        values = {name: [row[name] for row in mine] for name in METRICS}
        values |= {f"cosine_{name}": [row["cosine"][name] for row in mine] for name in mine[0]["cosine"]}
        table.append({
            "trained": how, "lora": use_lora, "seeds": len(mine),
            "mean": {name: statistics.mean(v) for name, v in values.items()},
            "sd": {name: statistics.stdev(v) if len(v) > 1 else 0.0 for name, v in values.items()},
        })  # fmt: skip
    return table


def print_table(result: dict[str, Any]) -> None:
    """Prints the summary and the chances."""
    chance = result["chance"]
    heads = ("P@1 CLS", "P@1 kept", "P@1 dropped", "point kept", "point dropped", "CLS wins")
    print(f"\n{'trained by':<40}{'LoRA':<6}", *(f"{head:>14}" for head in heads))
    for row in result["summary"]:
        cells = (f"{row['mean'][name]:.3f} ({row['sd'][name]:.3f})" for name in METRICS)
        print(f"{OBJECTIVES[row['trained']]:<40}{'yes' if row['lora'] else 'no':<6}", *(f"{c:>14}" for c in cells))
    by_chance = [chance["p_at_1"]] * 3 + [chance["pointing"]] * 2 + [chance["cls_wins"]]
    print(f"{'chance':<46}", *(f"{value:>14.3f}" for value in by_chance))
    n = len(result["seeds"])
    print(f"mean (standard deviation) over {n} seed{'s' * (n > 1)}, held-out canvases; {result['seconds']:.0f} s, "
          f"{result['cpu_seconds']:.0f} s of processor time on {result['machine']['threads']} threads")  # fmt: skip


def as_json(result: dict[str, Any]) -> str:
    """Formats the result as indented JSON with one row per line."""
    head = json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in result["rows"])
    return f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the command line and returns the result."""
    parser = argparse.ArgumentParser(description="Fine-tune a ViT for late interaction.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="dinov2-small", help="a DINOv2 folder or hub name (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps only, as a trial run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to this file")
    options = parser.parse_args(arguments)
    encoder = PatchEncoder.from_pretrained(options.model, normalize=False)
    encoder.requires_grad_(False)
    result = run(options.seeds, QUICK if options.quick else Settings(), encoder, load_photos())
    print_table(result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(as_json(result))
    return result


if __name__ == "__main__":
    main()
