"""What `PatchEncoder` costs over the bare model: `python benchmarks/encoder_overhead.py`.

The real DINOv2 ViT-S/14 (downloaded once), wrapped, bare, and bare a second time as the noise floor, called in turns in
rotating order so that drift hits all alike. CPU time of one thread, because a neighbour's load does not count in it;
medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from latemax.encoders import PatchEncoder


def interleaved_medians(calls: dict, rounds: int) -> dict[str, float]:
    """Median CPU seconds per call; each round calls every entry once and starts with another one."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    names = list(calls)
    for _ in range(rounds):
        names = names[1:] + names[:1]
        for name in names:
            start = time.process_time()
            calls[name]()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def wrapper_alone(enc: PatchEncoder, x: torch.Tensor) -> float:
    """Median CPU seconds of everything but the tower: an upper bound of the overhead, free of the tower's own spread.

    The final norm is counted in it, though the bare model runs that too.
    """
    raw = enc.adapter.run(x)
    run = enc.adapter.run
    enc.adapter.run = lambda *args, **inputs: raw
    try:
        return interleaved_medians({"alone": lambda: enc(x)}, 500)["alone"]
    finally:
        enc.adapter.run = run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    enc = PatchEncoder.from_pretrained("dinov2-small")
    print("| batch | bare ms | PatchEncoder ms | overhead | bare again | wrapper alone ms | of bare |")
    print("|---|---|---|---|---|---|---|")
    for batch in (1, 4):
        x = torch.randn(batch, 3, 224, 224)

        def bare(x=x):
            return enc.model(x).last_hidden_state[:, 1:]

        calls = {"bare": bare, "wrapped": lambda x=x: enc(x).tokens, "again": bare}
        with torch.no_grad():
            ms = {name: 1e3 * t for name, t in interleaved_medians(calls, max(options.rounds // batch, 15)).items()}
            alone = 1e3 * wrapper_alone(enc, x)
        change = [f"{100 * (ms[name] / ms['bare'] - 1):+.2f} %" for name in ("wrapped", "again")]
        cells = (batch, f"{ms['bare']:.2f}", f"{ms['wrapped']:.2f}", *change, f"{alone:.3f}")
        print("| " + " | ".join(map(str, (*cells, f"{100 * alone / ms['bare']:.2f} %"))) + " |")


if __name__ == "__main__":
    main()
