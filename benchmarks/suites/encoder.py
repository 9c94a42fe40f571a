"""What ``PatchEncoder`` costs over the bare model.

    python -m benchmarks.suites.encoder [--rounds 60] [--json FILE]

The real DINOv2 ViT-S/14 (downloaded once), wrapped, bare, and bare a second time as the noise floor, interleaved. CPU
time of one thread, because the load of other processes does not count in it; medians.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks import harness
from benchmarks.shapes import IMAGE_BATCHES, IMAGE_SIZE
from benchmarks.tables import Table, markdown
from latemax.encoders import PatchEncoder

CPU_TIME = harness.timer(time.process_time)


def wrapper_seconds(enc: PatchEncoder, x: torch.Tensor, rounds: int) -> float:
    """Median CPU seconds of everything except the tower: an upper bound of the overhead, free of the tower's spread.

    It includes the final norm, though the bare model runs that too.
    """
    raw = enc.adapter.run(x)
    run = enc.adapter.run
    enc.adapter.run = lambda *args, **inputs: raw
    try:
        return harness.medians({"wrapper": lambda: enc(x)}, rounds, CPU_TIME)["wrapper"]
    finally:
        enc.adapter.run = run


def measure_encoder(enc: PatchEncoder, rounds: int) -> list[dict[str, Any]]:
    """A row for each batch size."""
    rows = []
    for batch in IMAGE_BATCHES:
        x = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE)

        def bare(x: torch.Tensor = x) -> torch.Tensor:
            return enc.model(x).last_hidden_state[:, 1:]

        runs = {"bare": bare, "wrapped": lambda x=x: enc(x).tokens, "bare again": bare}
        with torch.no_grad():
            # the first calls allocate
            harness.interleaved(runs, 1, CPU_TIME)
            ms = harness.medians(runs, max(rounds // batch, min(rounds, 15)), CPU_TIME)
            ms |= {"wrapper only": wrapper_seconds(enc, x, 8 * rounds)}
        rows.append(dict(batch=batch, ms={name: 1e3 * seconds for name, seconds in ms.items()}))
    return rows


def measure(tiny: bool = False, rounds: int = 60) -> dict[str, Any]:
    torch.set_num_threads(1)
    enc = PatchEncoder.from_pretrained("dinov2-small")
    rounds = 2 if tiny else rounds
    return dict(machine=harness.machine(), rounds=rounds, rows=measure_encoder(enc, rounds))


def table(result: dict) -> str:
    machine = result["machine"]
    head = ["batch", "bare ms", "PatchEncoder ms", "overhead", "bare again", "wrapper only ms", "of bare"]
    rows = []
    for row in result["rows"]:
        ms = row["ms"]
        change = [f"{100 * (ms[name] / ms['bare'] - 1):+.2f} %" for name in ("wrapped", "bare again")]
        share = f"{100 * ms['wrapper only'] / ms['bare']:.2f} %"
        cells = [f"{ms[name]:.2f}" for name in ("bare", "wrapped")]
        rows.append([row["batch"], *cells, *change, f"{ms['wrapper only']:.3f}", share])
    loaded = f" Other programs ran meanwhile (load average {machine['load']:.0f})." if machine["load"] > 2 else ""
    return markdown(head, rows) + (
        f"\nDINOv2 ViT-S/14 at {IMAGE_SIZE} px, processor time of one thread, medians of interleaved rounds "
        f"({result['rounds']} of one image). {machine['cpu']}, torch {machine['torch']}, commit {machine['commit']}, "
        f"{machine['date']}.{loaded}\n"
    )


TABLES = {"encoder": Table("encoder", table)}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    harness.finish(measure(options.tiny, options.rounds), table, options.json)


if __name__ == "__main__":
    main()
