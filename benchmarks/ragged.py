"""Tokens end to end and candidates in place, beside what they would cost padded, equally long, or gathered.

    python -m benchmarks.ragged [--json FILE]

On CUDA where there is one, else on the CPU. Scores are compared before anything is timed; contenders are interleaved.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics

import torch
from torch.nn.utils.rnn import pad_sequence

import latemax
from benchmarks.cpu import machine
from latemax.cli.bench import interleaved

DIM, L_Q = 128, 32


def same(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    error = (a - b).abs().max().item()
    if not error < 1e-3:
        raise RuntimeError(f"{name}: scores differ by {error:.3g}")


def medians(runs: dict, device: str, rounds: int) -> dict[str, float]:
    interleaved(runs, device, 2)
    return {name: 1e3 * statistics.median(times) for name, times in interleaved(runs, device, rounds).items()}


def ragged(device: str, dtype: torch.dtype, n_q: int, n_d: int, train: bool, rounds: int) -> dict:
    """Documents of 32 to 1024 tokens: end to end, padded and masked, padded and whole."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(32, 1025, (n_d,), generator=generator)
    d = torch.nn.functional.normalize(torch.randn(int(lengths.sum()), DIM, generator=generator), dim=-1)
    d = d.to(device, dtype)
    q = torch.nn.functional.normalize(torch.randn(n_q, L_Q, DIM, generator=generator), dim=-1).to(device, dtype)
    cu_q = torch.arange(n_q + 1, device=device) * L_Q
    cu_d = torch.tensor([0, *lengths.tolist()], device=device).cumsum(0)
    padded = pad_sequence(list(d.split(lengths.tolist())), batch_first=True)
    mask = torch.arange(padded.shape[1], device=device) < lengths.to(device).unsqueeze(1)
    flat = q.flatten(0, 1)
    calls = {
        "end to end": lambda q, d: latemax.maxsim_varlen(q.view(-1, DIM), d, cu_q, cu_d),
        "padded and masked": lambda q, d: latemax.maxsim(q, d, None, mask),
        "padded, all computed": lambda q, d: latemax.maxsim(q, d),
    }
    same("padded and masked", calls["end to end"](flat, d), calls["padded and masked"](q, padded))
    inputs = {name: (q.clone(), (d if name == "end to end" else padded).clone()) for name in calls}
    if train:
        for pair in inputs.values():
            pair[0].requires_grad_(), pair[1].requires_grad_()

    def run(name):
        q, d = inputs[name]
        scores = calls[name](q, d)
        if train:
            torch.autograd.grad(scores.sum(), (q, d))

    ms = medians({name: lambda name=name: run(name) for name in calls}, device, rounds)
    real = int(lengths.sum()) / padded.shape[:2].numel()
    return dict(
        case="ragged", n_q=n_q, n_d=n_d, train=train, dtype=str(dtype).removeprefix("torch."), real_of_padded=real,
        ms=ms, per_token=ms["end to end"] / (real * ms["padded, all computed"]),
    )  # fmt: skip


def rerank(device: str, dtype: torch.dtype, documents: int, l_d: int, k: int, rounds: int) -> dict:
    """k scattered candidates of a corpus, beside the same documents lying side by side."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.nn.functional.normalize(torch.randn(documents * l_d, DIM, generator=generator), dim=-1)
    tokens = tokens.to(device, dtype)
    q = torch.nn.functional.normalize(torch.randn(1, L_Q, DIM, generator=generator), dim=-1).to(device, dtype)
    offsets = torch.arange(documents + 1, device=device) * l_d
    picked = torch.randperm(documents, generator=generator)[:k].to(device)
    beside = tokens.view(documents, l_d, DIM)[picked].clone()
    runs = {
        "rerank": lambda: latemax.rerank(q, tokens, offsets, picked.unsqueeze(0)),
        "side by side": lambda: latemax.maxsim(q, beside),
        "gathered, then scored": lambda: latemax.maxsim(q, tokens.view(documents, l_d, DIM)[picked]),
    }
    same("rerank", runs["rerank"](), runs["side by side"]())
    ms = medians(runs, device, rounds)
    return dict(
        case="rerank", documents=documents, l_d=l_d, k=k, dtype=str(dtype).removeprefix("torch."), ms=ms,
        of_side_by_side=ms["rerank"] / ms["side by side"],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write machine and rows there")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device, dtype, rounds = ("cuda", torch.bfloat16, 100) if cuda else ("cpu", torch.float32, 15)
    rows = [
        ragged(device, dtype, 1, 10_000 if cuda else 500, False, rounds),
        ragged(device, dtype, 64 if cuda else 8, 1000 if cuda else 100, False, rounds),
        ragged(device, dtype, 64 if cuda else 8, 1000 if cuda else 100, True, rounds),
        rerank(device, dtype, 100_000 if cuda else 5000, 196, 1000, rounds),
    ]
    for row in rows:
        print(row["case"], {name: round(ms, 3) for name, ms in row["ms"].items()},
              f"{row.get('per_token') or row['of_side_by_side']:.3f}×")  # fmt: skip
    if args.json:
        where = machine() | (dict(gpu=torch.cuda.get_device_name()) if cuda else {})
        args.json.write_text(json.dumps(dict(machine=where, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
