"""What a store knows of its documents: metadata, grids, regions, ids and conditions."""

import numpy as np
import pytest
import stores
import torch
from stores import document, values

from latemax.store import PatchStore, StoreWriter

folder = stores.folder


def test_metadata_is_what_json_keeps(tmp_path):
    meta = {"size": (1, 2), 3: "x", "größe": [None, True]}
    with StoreWriter(tmp_path, meta=meta) as writer:
        writer.add(document(1), "a", meta=meta)
        writer.add(document(1), "b")
        for bad, error in (({"x": {1}}, TypeError), ({"x": float("nan")}, ValueError), ({"x": "\ud800"}, ValueError)):
            with pytest.raises(error, match="meta must be"):
                writer.add(document(2), "c", meta=bad)
            with pytest.raises(error, match="meta must be"):
                StoreWriter(tmp_path / "other", meta=bad)
        with pytest.raises(TypeError, match=r"meta must be a JSON object \(a dict\), got list"):
            writer.add(document(2), "c", meta=[1])
    StoreWriter(tmp_path, meta=meta).close()
    store = PatchStore(tmp_path)
    assert store.document_meta(0) == store.meta == {"size": [1, 2], "3": "x", "größe": [None, True]}
    assert store.document_meta(1) == {}


def test_grids_and_regions(tmp_path):
    boxes = torch.tensor([[0, 0, 0.5, 1], [0.5, 0, 1, 1], [float("nan")] * 4])
    with StoreWriter(tmp_path) as writer:
        writer.add(document(0, 6), "grid", grid=(np.int64(2), 3))
        writer.add(document(0, 3), "regions", regions=boxes)
        writer.add(document(0, 3), "array", regions=boxes.numpy())
        writer.add(document(0, 3), "none")
        for arguments, words in (
            (dict(grid=(2, 2)), "grid must multiply to the number of tokens, 3; got 2 x 2"),
            (dict(grid=(1, 3), regions=boxes), "not both"),
            (dict(regions=boxes[:2]), r"regions must be \[l, 4\] with the l of tokens, 3; got shape \[2, 4\]"),
            (dict(regions=boxes.flip(1)), "row 0 is"),
            (dict(regions=boxes * 2), "row 0 is"),
        ):
            with pytest.raises(ValueError, match=words):
                writer.add(document(0, 3), "bad", **arguments)
        with pytest.raises(TypeError, match=r"regions must be a float32 tensor or array, got float64"):
            writer.add(document(0, 3), "bad", regions=boxes.double())
        with pytest.raises(TypeError, match="grid must be two ints"):
            writer.add(document(0, 3), "bad", grid=3)
        writer.compact()
    store = PatchStore(tmp_path)
    assert [store.grid(i) for i in range(4)] == [(2, 3), None, None, None]
    for i in (1, 2):
        torch.testing.assert_close(store.regions(i), boxes, equal_nan=True, rtol=0, atol=0)
    assert store.regions(0) is None and store.regions(3) is None
    with StoreWriter(tmp_path) as writer:
        writer.replace(None, "regions", grid=(1, 3))
        writer.replace(None, "grid", regions=torch.tensor([[0.0, 0, 1, 1]]).expand(6, -1))
    store.refresh()
    assert store.grid(1) == (1, 3) and store.regions(1) is None and store.grid(0) is None
    assert store.regions(0).shape == (6, 4)


def test_by_id(folder):
    store = PatchStore(folder)
    assert torch.equal(store["c"], store[2]) and store.find("c") == 2 and "c" in store and "z" not in store
    for call in (lambda: store["z"], lambda: store.find("z")):
        with pytest.raises(KeyError, match="no document 'z'"):
            call()
    with pytest.raises(TypeError, match="the number or the id of a document, got float"):
        store[1.0]
    store[0][0] = 7
    assert values(store)[0] == 0, "a copy"


CONDITIONS = {
    "year >= 2002": [2, 3],
    "year BETWEEN ? AND ?": [1, 2],
    "id IN ('a', ?)": [0, 3],
    "NOT id LIKE 'a%' AND year <> 2002": [1, 3],
    'year IS NULL OR "year" = 2000.0': [0],
    "year IS NOT NULL and not (id = 'b' or year == 2003)": [0, 2],
    '"it\'s ""odd""." = \'x\'\'y\'': [1],
    "nothing": [],
    "flag": [2],
    "flag = TRUE": [2],
    "id NOT IN ('a', 'b') AND year NOT BETWEEN 2003 AND 2009 AND id NOT LIKE 'z'": [2],
    "year = -2000 OR année = 1": [3],
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditions(condition, folder):
    with StoreWriter(folder) as writer:
        writer.replace(None, "b", meta={"year": 2001, 'it\'s "odd".': "x'y"})
        writer.replace(None, "c", meta={"year": 2002, "flag": True})
        writer.replace(None, "d", meta={"year": 2003, "année": 1})
    bound = {"year BETWEEN ? AND ?": (np.int64(2001), 2002.0), "id IN ('a', ?)": ("d",)}.get(condition, ())
    found = PatchStore(folder).where(condition, *bound)
    assert found.dtype == torch.int64 and found.tolist() == CONDITIONS[condition]


@pytest.mark.parametrize(
    "condition",
    [
        "", "year =", "year = 1; DROP TABLE documents", "year = 1 -- x", "year = 1 /* x */", "abs(year) = 1",
        "load_extension('x')", "(SELECT 1) = 1", "SELECT 1", "year IN (SELECT 1)", "EXISTS (SELECT 1)", "a.b = 1",
        "year COLLATE NOCASE = 1", "year IN ()", "year = 'x", 'year = "x', "year ? 1", "year = ?1", "year = :x",
        "year || 'x' = 'y'", "year + 1 = 2", "CAST(year AS TEXT) = 'x'", "CASE WHEN 1 THEN 2 END", "year GLOB 'x'",
        "year REGEXP 'x'", "(" * 60 + "1" + ")" * 60, "NOT " * 60 + "1", " OR ".join(["year = 1"] * 500), "year = \0",
        "year = 1 = 1", "year = 'a\ud800'", "year is 1",
    ],
)  # fmt: skip
def test_other_conditions_are_refused(condition, folder):
    before = (folder / "catalog.sqlite").read_bytes()
    with pytest.raises(ValueError, match=r"condition"):
        PatchStore(folder).where(condition)
    assert (folder / "catalog.sqlite").read_bytes() == before


def test_values_of_conditions_are_checked(folder):
    store = PatchStore(folder)
    for given, error in (((), ValueError), ((1, 2), ValueError), (([1],), TypeError), ((1 << 64,), ValueError)):
        with pytest.raises(error, match="values must"):
            store.where("year = ?", *given)
    assert store.where("id = ?", "x' OR '1' = '1").tolist() == []
    with pytest.raises(TypeError, match="condition must be a string"):
        store.where(5)


def test_a_condition_without_end_is_stopped(folder, monkeypatch):
    monkeypatch.setattr("latemax.store.where.STEPS", 10)
    monkeypatch.setattr("latemax.store.where.STEPS_PER_DOCUMENT", 0)
    with StoreWriter(folder) as writer:
        for i in range(3000):
            writer.add(document(0, 0), str(i))
    with pytest.raises(ValueError, match="fewer than 10 steps"):
        PatchStore(folder).where("year = 1")
