"""Every kernel of the tile table compiled ahead of time for GPUs that need not be here: no spills, shared memory within
the limit, Hopper's matrix instruction at every query length."""

import json

import pytest

pytest.importorskip("triton", reason="the kernels need triton")
from benchmarks.internals import tiles
from benchmarks.static import aot


@pytest.fixture(scope="module")
def rows():
    return aot.stored_or_measured()


@pytest.mark.parametrize("current", [True, False], ids=["current", "stale"])
def test_stored_rows_are_read_only_while_their_sources_are_unchanged(current, tmp_path, monkeypatch):
    (tmp_path / "aot.json").write_text(json.dumps(dict(sources=aot.sources() if current else "", rows=["stored"])))
    monkeypatch.setattr(aot, "STORED", tmp_path / "aot.json")
    monkeypatch.setattr(aot, "measure", lambda: ["compiled"])
    assert aot.stored_or_measured() == ["stored" if current else "compiled"]


def test_compiling_gives_the_same_rows(rows):
    """A sample compiled now: what decides a row but is no part of the digest shows here."""
    sample = aot.measure((90,), tiny=True)
    assert sample
    # the first call that launches a kernel names its row: in the sample another one may be first
    unnamed = [{key: value for key, value in row.items() if key != "case"} for row in rows]
    for row in sample:
        row.pop("case")
        assert row in unnamed, row


def aligned(row):
    """Rows start at multiples of 16 bytes, as far as the tokens' dim decides it."""
    return row.get("dim", 128) % 8 == 0


def spilled(rows):
    return [(row["arch"], row["kernel"], row["case"], row["spills"]) for row in rows if row["spills"]]


def test_no_register_spills(rows):
    # products without a wgmma, and float64: since tiles are read from last to first, ptxas spills a few registers
    # there, far from the limit of 255; at dim 128 on sm_90 three stages avoid it, elsewhere no tile was found yet
    few = {"ieee": 12, "double": 12}

    def allowed(row):
        if row["loop_spills"] <= 1 and (
            row["kernel"].startswith("smooth") or "d=" in row["case"] or row["arch"] == 100
        ):
            # smooth maxima, codes and sm_100: before the loop, at most one in it
            return 17
        return few.get(row["case"].split()[0], 0)

    assert not spilled(row for row in rows if aligned(row) and row["spills"] > allowed(row))


@pytest.mark.xfail(reason="rows that are not 16-byte aligned are loaded through registers: 8 to 501 spills at dim 1030")
def test_no_register_spills_of_unaligned_rows(rows):
    assert not spilled(row for row in rows if not aligned(row))


def test_shared_memory_within_the_limit(rows):
    for row in rows:
        assert row["shared"] <= tiles.SHARED_MEMORY[row["arch"]], row


@pytest.mark.parametrize("l_q", [16, 32, 128])
def test_wgmma_on_hopper_at_every_query_length(rows, l_q):
    cases = [
        row
        for row in rows
        if row["arch"] == 90
        and row["kernel"] == "forward_kernel"
        and row["case"].startswith(f"half dim {row['dim']} l_q {l_q}")
    ]
    assert cases
    for row in cases:
        assert row["wgmma"] > 0 and row["mma"] == 0, row


def test_loads_are_16_bytes_wide(rows):
    # 128 one-bit codes are 16 bytes, spread over the lanes that multiply them
    narrow = [
        row["case"]
        for row in rows
        if row["kernel"] == "forward_kernel"
        and aligned(row)
        and not row["vector_loads"]
        and row["arch"] < 100
        and "q=binary" not in row["case"]
    ]
    assert not narrow


def test_the_hot_loop_stays_short(rows):
    """Instructions of the inner loop on sm_90: a mask or bound check that slips into it shows here."""
    loops = {row["case"]: row["loop"] for row in rows if row["arch"] == 90 and row["kernel"] == "forward_kernel"}
    assert loops["half dim 128 l_q 32"] <= 200
    assert loops["half dim 128 l_q 128"] <= 200
    assert loops["half dim 128 l_q 128 d_masked=True"] <= 320


def test_shared_memory_estimate_is_an_upper_bound(rows):
    """fits() decides by an estimate: what the compiler uses never exceeds it."""
    for row in rows:
        if row["kernel"] == "forward_kernel":
            assert row["shared"] <= row["estimate"], row
