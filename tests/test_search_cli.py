"""``latemax search`` and ``latemax store`` on small stores of known tokens."""

import io
import json
import sys

import pytest
import torch

from latemax import PatchStore, StoreWriter, cli
from latemax.cli import search

pytest.importorskip("safetensors", reason="stores are written with safetensors")


def run_json(capsys, *argv):
    assert cli.main([str(x) for x in argv]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def store(tmp_path):
    with StoreWriter(tmp_path / "plain") as writer:
        for i in range(3):
            writer.add(torch.eye(4)[i : i + 1], f"page {i}")
        writer.add(torch.empty(0, 4), "empty")
    return str(tmp_path / "plain")


@pytest.mark.parametrize("kind", ["npy", "safetensors", "pt"])
def test_search_for_query_tokens(kind, store, tmp_path, capsys):
    import numpy
    from safetensors.torch import save_file

    q, file = torch.eye(4)[:3].unsqueeze(1).contiguous(), str(tmp_path / f"q.{kind}")
    if kind == "npy":
        numpy.save(file, q.numpy())
    elif kind == "pt":
        torch.save(q, file)
    else:
        save_file({"tokens": q, "other": q + 1}, file)
    found = run_json(capsys, "search", store, "--tokens", file, "--json")
    assert [rows[0]["id"] for rows in found["results"]] == ["page 0", "page 1", "page 2"]
    assert found["results"][0][-1] == {"rank": 4, "id": "empty", "index": 3, "score": None}
    assert cli.main(["search", store, "--tokens", file, "-k", "1", "--normalize"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["query 1", "   1      1.0000  page 0"]


def test_errors_are_one_line(store, tmp_path, capsys):
    def error(*argv):
        assert cli.main(list(argv)) == 1
        return capsys.readouterr().err

    assert "no such file or folder" in error("index", "nowhere", "--model", "m", "-o", store)
    (tmp_path / "empty").mkdir()
    assert "no image (.bmp" in error("index", str(tmp_path / "empty"), "--model", "m", "-o", store)
    assert "nowhere holds no store" in error("search", "nowhere", "--tokens", "q.npy")
    assert "q.npy: no such file" in error("search", store, "--tokens", "q.npy")
    assert "does not say which model made it" in error("search", store, "--image", "a.png")
    (tmp_path / "q.txt").write_text("1")
    assert "must be a .npy, .safetensors or .pt file" in error("search", store, "--tokens", str(tmp_path / "q.txt"))
    torch.save(torch.ones(2, 4, dtype=torch.int64), tmp_path / "q.pt")
    assert "must hold floats, got torch.int64" in error("search", store, "--tokens", str(tmp_path / "q.pt"))
    torch.save(torch.ones(4), tmp_path / "q.pt")
    assert "must hold tokens [l_q, dim]" in error("search", store, "--tokens", str(tmp_path / "q.pt"))
    with pytest.raises(SystemExit):
        cli.main(["search", store])
    assert "one of the arguments --text --image --tokens is required" in capsys.readouterr().err


def test_a_device_that_does_not_work_is_one_line_in_search(store, tmp_path, capsys):
    torch.save(torch.ones(2, 4), tmp_path / "q.pt")
    argv = ["search", store, "--tokens", str(tmp_path / "q.pt"), "--device", "cuda:77"]
    assert cli.main(argv) == 1
    said = capsys.readouterr().err
    assert said.startswith("latemax search: --device cuda:77 does not work here: ") and said.count("\n") == 1


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_any_name_is_printed_on_any_terminal(encoding, tmp_path, monkeypatch):
    names = ["plain.png", "line\nend.png", "\x1b[31mred.png", "\u202eleft.png", "\U0001f600 é.png"]
    with StoreWriter(tmp_path / "store") as writer:
        for i, name in enumerate(names):
            writer.add(torch.eye(5)[i : i + 1], name)
    torch.save(torch.tensor([[5.0, 4, 3, 2, 1]]), tmp_path / "q.pt")
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["search", str(tmp_path / "store"), "--tokens", str(tmp_path / "q.pt")]) == 0
    out.flush()
    lines = out.buffer.getvalue().decode(encoding).splitlines()
    assert [line.split("  ")[-1] for line in lines[:4]] == [
        "plain.png", "line\\nend.png", "\\x1b[31mred.png", "\\u202eleft.png"
    ]  # fmt: skip
    last = {"latin-1": "\\U0001f600 é.png", "ascii": "\\U0001f600 \\xe9.png", "utf-8": "\U0001f600 é.png"}
    assert lines[4].endswith("  " + last[encoding]) and len(lines) == 5


class TestSearchOptions:
    @pytest.fixture
    def pages(self, tmp_path):
        with StoreWriter(tmp_path / "pages") as writer:
            for i in range(4):
                tokens = torch.zeros(6, 4)
                tokens[i, i] = 2
                writer.add(tokens, f"page {i}", None if i == 3 else (2, 3), {"year": 2000 + i})
        torch.save(torch.eye(4)[[0, 1, 1]], tmp_path / "q.pt")
        return str(tmp_path / "pages"), str(tmp_path / "q.pt")

    def test_where(self, pages, capsys):
        store, q = pages
        found = run_json(capsys, "search", store, "--tokens", q, "--where", "year >= 2001 AND id != 'page 2'", "--json")
        assert [row["id"] for row in found["results"][0]] == ["page 1", "page 3"]
        assert cli.main(["search", store, "--tokens", q, "--where", "year > 3000"]) == 0
        assert capsys.readouterr().out == "no document\n"
        assert cli.main(["search", store, "--tokens", q, "--where", "year >"]) == 1
        assert capsys.readouterr().err.count("\n") == 1

    def test_patches(self, pages, capsys):
        store, q = pages
        found = run_json(capsys, "search", store, "--tokens", q, "-k", 1, "--patches", "--json")
        assert found["results"][0][0]["id"] == "page 1"
        assert found["results"][0][0]["patches"] == [
            {"row": 0, "column": 1, "box": None, "part": 4.0, "query_tokens": 2},
            {"row": 0, "column": 0, "box": None, "part": 0.0, "query_tokens": 1},
        ]
        assert cli.main(["search", store, "--tokens", q, "-k", "1", "--patches"]) == 0
        line = capsys.readouterr().out.splitlines()[1]
        assert line.strip() == "from 2 patches (row, column): (0, 1) 4.00, (0, 0) 0.00"
        rows = search.search(store, tokens=q, k=4, where="id = 'page 3'", patches=True)["results"][0]
        assert {(p["row"], p["query_tokens"]) for p in rows[0]["patches"]} == {(0, 3)}


class TestPage:
    def test_one_query_becomes_a_page(self, store, tmp_path, capsys):
        torch.save(torch.eye(4)[:2], tmp_path / "q.pt")
        out = tmp_path / "out.html"
        assert cli.main(["search", store, "--tokens", str(tmp_path / "q.pt"), "--html", str(out)]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"{out} shows them"
        text = out.read_text(encoding="utf-8")
        assert text.count('<li class="result">') == 4 and ">token 2<" in text and "page 0" in text
        found = run_json(capsys, "search", store, "--tokens", tmp_path / "q.pt", "--html", out, "--json", "-k", 1)
        assert found["html"] == str(out) and out.read_text(encoding="utf-8").count('<li class="result">') == 1
        assert cli.main(
            ["search", store, "--tokens", str(tmp_path / "q.pt"), "--where", "id = 'x'", "--html", str(out)]
        ) == 0  # fmt: skip
        assert "No document." in out.read_text(encoding="utf-8")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html", "plain", "q.pt"]

    def test_errors_come_before_the_search(self, store, tmp_path, capsys, monkeypatch):
        torch.save(torch.eye(4).unsqueeze(1), tmp_path / "q.pt")
        monkeypatch.setattr(search, "topk", None)
        for html, message in (("out.html", "--html shows one query, "), ("no/out.html", "no such folder")):
            argv = ["search", store, "--tokens", str(tmp_path / "q.pt"), "--html", str(tmp_path / html)]
            assert cli.main(argv) == 1 and message in capsys.readouterr().err


class TestStore:
    def test_info(self, store, capsys):
        found = run_json(capsys, "store", store, "info", "--json")
        assert found["documents"] == 4 and found["tokens"] == 3 and found["dim"] == 4 and found["ids"] == "str"
        assert found["bytes"] > 0 and found["dtype"] == "float32"
        assert cli.main(["store", store, "info"]) == 0
        assert "documents   4 of 3 tokens, dim 4, float32\n" in capsys.readouterr().out

    def test_remove_takes_all_or_none(self, store, capsys):
        assert cli.main(["store", store, "remove", "page 1", "page 9"]) == 1
        assert capsys.readouterr().err == f"latemax store: {store} has no document page 9; nothing was removed\n"
        assert len(PatchStore(store)) == 4
        assert cli.main(["store", store, "remove", "page 1", "empty"]) == 0
        assert "2 removed; " in capsys.readouterr().out and PatchStore(store).ids == ["page 0", "page 2"]

    def test_remove_by_number(self, tmp_path, capsys):
        with StoreWriter(tmp_path / "s") as writer:
            writer.add(torch.ones(2, 4))
            writer.add(torch.ones(2, 4))
        store = str(tmp_path / "s")
        assert cli.main(["store", store, "remove", "x"]) == 1
        assert "has integer ids, got x" in capsys.readouterr().err
        assert cli.main(["store", store, "remove", "0"]) == 0 and PatchStore(store).ids == [1]

    def test_verify_and_compact(self, store, capsys):
        assert cli.main(["store", store, "verify"]) == 0
        assert "4 documents in 1 shard, every byte is correct" in capsys.readouterr().out
        cli.main(["store", store, "remove", "page 0"])
        shard = PatchStore(store).shards[0].path
        assert cli.main(["store", store, "compact"]) == 0 and not shard.exists()
        assert PatchStore(store).ids == ["page 1", "page 2", "empty"]
        shard = PatchStore(store).shards[0].path
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        capsys.readouterr()
        assert cli.main(["store", store, "verify"]) == 1
        said = capsys.readouterr().err
        assert shard.name in said and said.count("\n") == 1

    @pytest.mark.parametrize("action", ["info", "verify", "compact", "upgrade"])
    def test_no_store_is_one_line_and_makes_none(self, action, tmp_path, capsys):
        assert cli.main(["store", str(tmp_path / "nowhere"), action]) == 1
        assert "holds no store" in capsys.readouterr().err and not (tmp_path / "nowhere").exists()


def test_metas_are_those_of_the_documents(tmp_path):
    """In the documents' order, which a replacement keeps; a removed document has none."""
    with StoreWriter(tmp_path / "s") as writer:
        for i in range(4):
            writer.add(torch.ones(1, 2), f"page {i}", None, {"n": i} if i != 2 else None)
    with StoreWriter(tmp_path / "s") as writer:
        writer.replace(None, "page 0", meta={"n": 7})
        writer.remove("page 1")
    store = PatchStore(tmp_path / "s")
    assert store.metas() == [{"n": 7}, {}, {"n": 3}] == [store.document_meta(i) for i in range(3)]
