"""How the sm_90 kernel shares out its work (csrc/cuda/walk.h), over random calls: every tile of every pair is scored
once, pieces of a document have places of their own, and the shares are even."""

import json
import random
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_cuda_emulated import emulator

from benchmarks import shapes
from benchmarks.static import hopper
from latemax.ops import tiles

pytestmark = pytest.mark.skipif(bool(emulator.why_not()), reason=emulator.why_not())
ROOT = Path(__file__).parents[1]
COST = 32  # of a ragged document, in tokens, besides its tokens


@st.composite
def calls(draw):
    n_q, n_d = draw(st.integers(1, 40)), draw(st.integers(1, 60))
    l_q, l_d = draw(st.sampled_from([8, 32, 100, 128, 300, 1030])), draw(st.sampled_from([1, 64, 65, 300, 1030, 5000]))
    own, offsets = draw(st.booleans()), None
    if not own and draw(st.booleans()):
        lengths = random.Random(draw(st.integers(0, 99)))
        offsets = [0]
        for _ in range(n_d):
            offsets.append(offsets[-1] + lengths.choice([0, 1, lengths.randint(0, 2 * l_d), l_d]))
    return n_q, n_d, l_q, l_d, 128, own, offsets


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(calls(), st.integers(1, 140), st.sampled_from([0, 4000, 2**30]))
@example((1, 1, 32, 5000, 128, False, [0, 5000]), 132, 0)  # shares of less than a tile
def test_every_tile_once_and_even_shares(call, multiprocessors, launch_clocks):
    planner = emulator.planner(tiles.SHARED_MEMORY[90], multiprocessors, launch_clocks)
    n_q, n_d, _, l_d, _, own, offsets = call
    plan = planner.plan(*call)
    per_query = -(-plan["chunks"] // plan["segments"])
    assert plan["blocks"] == (n_q * per_query if own else -(-n_q * plan["chunks"] // plan["segments"]))
    lengths = [l_d] * n_d if offsets is None else [b - a for a, b in pairwise(offsets)]
    of_document = [max(1, -(-length // plan["tile"])) for length in lengths]

    seen, places, work = defaultdict(list), set(), []
    for index in range(plan["grid"]):
        mine = 0
        for block, document, first, end, piece in planner.walk(index, *call):
            end = min(end, of_document[document])
            seen[block, document].append((first, end, index, piece))
            whole = first == 0 and end == of_document[document]
            assert (piece < 0) == whole and piece not in places and piece < 2 * plan["grid"]
            assert whole or (plan["split"] and first < end)
            places |= {piece} - {-1}
            tokens = min(end * plan["tile"], lengths[document]) - first * plan["tile"]
            mine += tokens + COST * (first == 0) if offsets else end - first
        work.append(mine)
    assert len(seen) == plan["blocks"] * n_d
    for (_, document), parts in seen.items():
        parts.sort()
        assert parts[0][0] == 0 and parts[-1][1] == of_document[document]
        assert all(a[1] == b[0] for a, b in pairwise(parts))
        if len(parts) > 1:
            # the places that launch_pieces reads: of the first part the end of its thread block, then beginnings, every
            # `step` thread blocks
            (_, _, first, piece), *others = parts
            step = others[0][2] - first
            assert piece == 2 * first + 1 and step in (1, plan["blocks"] % plan["grid"])
            assert [part[2:] for part in others] == [(i, 2 * i) for i in range(first + step, parts[-1][2] + 1, step)]
    if plan["split"] and plan["blocks"] >= plan["grid"]:
        # in tiles, or in tokens and then up to a tile and a document's cost at either end
        assert max(work) <= sum(work) / len(work) * 20 / 19 + (1 if offsets is None else 2 * (plan["tile"] + COST))


@pytest.mark.parametrize(("n_q", "n_d", "before"), [(64, 1000, 1.17), (64, 300, 1.17), (1, 1000, 1.53)])
def test_shares_of_documents_of_32_to_1024_tokens(n_q, n_d, before):
    """The longest share over the mean, on 132 multiprocessors; ``before``: with as many documents for each of them."""
    lengths, offsets = random.Random(0), [0]
    for _ in range(n_d):
        offsets.append(offsets[-1] + lengths.randint(32, 1024))
    planner = emulator.planner(tiles.SHARED_MEMORY[90], 132)
    call = (n_q, n_d, 32, 0, 128, False, offsets)
    plan = planner.plan(*call)
    assert plan["split"]
    work = []
    for index in range(plan["grid"]):
        mine = 0
        for _, document, first, end, _ in planner.walk(index, *call):
            mine += min(end, -(-(offsets[document + 1] - offsets[document]) // plan["tile"])) - first
        work.append(mine)
    assert max(work) * 132 / sum(work) < 1.05 < before


def test_the_predictions_in_the_docs_are_of_this_planner():
    stored = json.loads((ROOT / "benchmarks" / "results" / "cuda-aot.json").read_text())["plans"]
    planner = emulator.planner(tiles.SHARED_MEMORY[90], 132)
    for shape in (shapes.Shape(1, 1000, 1024, 1024), shapes.Shape(128, 128, 32, 300, 768), *shapes.CORE[-2:]):
        plan = planner.plan(shape.n_q, shape.n_d, shape.l_q, shape.l_d, shape.dim, shape.own)
        assert plan.items() <= stored[shape.name].items(), shape.name


def test_the_model_meets_published_timings():
    published = json.loads((ROOT / "benchmarks" / "results" / "hopper-published.json").read_text())
    errors = {name: abs(model / tflops - 1) for name, tflops, model in hopper.calibration(published)}
    assert len(errors) == 28
    assert [name for name, error in errors.items() if error > 0.1] == ["FlashAttention-3, head dim 256, 512 tokens"]
