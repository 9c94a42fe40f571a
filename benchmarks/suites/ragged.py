"""Ragged documents and reranking in place, compared with padding, gathering and documents of one length.

    python -m benchmarks.suites.ragged [--json FILE]

On CUDA where there is one, else on the CPU. Scores are compared before anything is timed; contenders are interleaved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

import latemax
from benchmarks import harness, shapes
from benchmarks.shapes import unit
from benchmarks.tables import Table, markdown

# contender -> the name of its row
RAGGED, MASKED, PADDED = "ragged", "padded and masked", "padded, all computed"
RERANK, CONTIGUOUS, GATHERED = "rerank", "contiguous", "gathered, then scored"


def medians_ms(runs: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, float]:
    seconds = harness.timer(device=device)
    # the first calls compile and allocate
    harness.interleaved(runs, 2, seconds)
    return {name: 1e3 * x for name, x in harness.medians(runs, rounds, seconds).items()}


def ragged(shape: shapes.Ragged, train: bool, device: str, dtype: str, rounds: int) -> dict[str, Any]:
    """Documents as ragged tokens, padded and masked, padded and computed whole."""
    generator, to = torch.Generator().manual_seed(0), dict(device=device, dtype=getattr(torch, dtype))
    lengths = torch.randint(shape.shortest, shape.longest + 1, (shape.n_d,), generator=generator)
    d = unit(int(lengths.sum()), shape.dim, generator=generator).to(**to)
    q = unit(shape.n_q, shape.l_q, shape.dim, generator=generator).to(**to)
    q_offsets = torch.arange(shape.n_q + 1, device=device) * shape.l_q
    d_offsets = torch.tensor([0, *lengths.tolist()], device=device).cumsum(0)
    padded = pad_sequence(list(d.split(lengths.tolist())), batch_first=True)
    mask = torch.arange(padded.shape[1], device=device) < lengths.to(device).unsqueeze(1)
    calls = {
        RAGGED: lambda q, d: latemax.maxsim_varlen(q.view(-1, shape.dim), d, q_offsets, d_offsets),
        MASKED: lambda q, d: latemax.maxsim(q, d, None, mask),
        PADDED: lambda q, d: latemax.maxsim(q, d),
    }
    harness.check("ragged or masked", calls[RAGGED](q, d), calls[MASKED](q, padded), 1e-3)
    inputs = {name: (q.clone(), (d if name == RAGGED else padded).clone()) for name in calls}
    for pair in inputs.values():
        for x in pair:
            x.requires_grad_(train)

    def run(name: str) -> None:
        q, d = inputs[name]
        scores = calls[name](q, d)
        if train:
            torch.autograd.grad(scores.sum(), (q, d))

    ms = medians_ms({name: lambda name=name: run(name) for name in calls}, device, rounds)
    real = int(lengths.sum()) / padded.shape[:2].numel()
    return dict(
        case="ragged", n_q=shape.n_q, n_d=shape.n_d, train=train, dtype=dtype, real_of_padded=real, ms=ms,
        per_token=ms[RAGGED] / (real * ms[PADDED]),
    )  # fmt: skip


def rerank(shape: shapes.Rerank, device: str, dtype: str, rounds: int) -> dict[str, Any]:
    """k scattered candidates of a corpus, compared with the same documents in one contiguous tensor."""
    generator, to = torch.Generator().manual_seed(1), dict(device=device, dtype=getattr(torch, dtype))
    tokens = unit(shape.documents * shape.l_d, shape.dim, generator=generator).to(**to)
    q = unit(1, shape.l_q, shape.dim, generator=generator).to(**to)
    offsets = torch.arange(shape.documents + 1, device=device) * shape.l_d
    picked = torch.randperm(shape.documents, generator=generator)[: shape.k].to(device)
    documents = tokens.view(shape.documents, shape.l_d, shape.dim)
    contiguous = documents[picked].clone()
    runs = {
        RERANK: lambda: latemax.rerank(q, tokens, offsets, picked.unsqueeze(0)),
        CONTIGUOUS: lambda: latemax.maxsim(q, contiguous),
        GATHERED: lambda: latemax.maxsim(q, documents[picked]),
    }
    harness.check("rerank", runs[RERANK](), runs[CONTIGUOUS](), 1e-3)
    ms = medians_ms(runs, device, rounds)
    return dict(
        case="rerank", documents=shape.documents, l_d=shape.l_d, k=shape.k, dtype=dtype, ms=ms,
        of_contiguous=ms[RERANK] / ms[CONTIGUOUS],
    )  # fmt: skip


def measure(tiny: bool = False) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, rounds = ("bfloat16", 100) if device == "cuda" else ("float32", 15)
    rounds = 2 if tiny else rounds
    rows = [
        ragged(shape.tiny() if tiny else shape, train, device, dtype, rounds) for shape, train in shapes.RAGGED[device]
    ]
    shape = shapes.RERANK[device]
    rows.append(rerank(shape.tiny() if tiny else shape, device, dtype, rounds))
    return dict(machine=harness.machine(device), rows=rows)


def table(result: dict) -> str:
    """Ragged tokens compared with padded ones, and candidates in place with the same documents contiguous."""
    machine, lines = result["machine"], []
    for row in result["rows"]:
        for name, ms in row["ms"].items():
            if row["case"] == "ragged":
                what = f"{row['n_q']} x {row['n_d']}" + (", forward and backward" if row["train"] else "")
                note = f"{row['per_token']:.2f}× of padded by real tokens" if name == RAGGED else ""
            else:
                what = f"{row['k']} of {row['documents']} documents"
                note = f"{row['of_contiguous']:.2f}× of contiguous" if name == RERANK else ""
            lines.append([what, name, f"{ms:.1f}", note])
    return markdown(["what", "how", "ms", ""], lines) + (
        f"\nDocuments of 32 to 1024 tokens of dim 128 (reranked: 196), queries of 32, {result['rows'][0]['dtype']}; "
        f"median of interleaved rounds. {machine.get('gpu') or machine['cpu']}, {machine['threads']} threads, torch "
        f"{machine['torch']}, commit {machine['commit']}, {machine['date']}.\n"
    )


TABLES = {"ragged": Table("ragged", table)}


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    harness.finish(measure(options.tiny), table, options.json)


if __name__ == "__main__":
    main()
