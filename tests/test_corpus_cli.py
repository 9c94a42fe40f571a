"""``latemax index`` and ``latemax search``: images in, the right one found, resumed after an interrupt."""

import json

import pytest
import torch

from latemax import PatchStore, StoreWriter, cli
from latemax.cli import corpus

pytest.importorskip("safetensors", reason="stores are written with safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="the encoder is a transformers model")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=56, patch_size=14
    )
    folder = tmp_path_factory.mktemp("model")
    transformers.Dinov2Model(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "BitImageProcessor",
                "do_resize": True, "size": {"shortest_edge": 56}, "resample": 3,
                "do_center_crop": True, "crop_size": {"height": 56, "width": 56},
                "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True,
                "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
            }
        )
    )  # fmt: skip
    return str(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    folder, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    (folder / "more").mkdir()
    for name in ("a.png", "b.jpg", "c.png", "more/d.PNG"):
        pixels = torch.randint(0, 256, (60, 60, 3), generator=generator, dtype=torch.uint8)
        image.fromarray(pixels.numpy()).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def run_json(capsys, *argv):
    assert cli.main([str(x) for x in argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_index_then_search_finds_the_image(model, images, tmp_path, capsys):
    out = tmp_path / "store"
    done = run_json(capsys, "index", images, "--model", model, "-o", out, "--json", "--batch-size", 3)
    assert done == {"store": str(out), "indexed": 4, "already": 0, "unreadable": [], "documents": 4}
    store = PatchStore(out)
    names = ("a.png", "b.jpg", "c.png", "more/d.PNG")
    assert store.ids == [str(images / name) for name in names] and store.meta == {"model": model, "size": None}
    assert store.dtype == torch.float16 and store[0].shape == (16, 32)
    for name in names:
        found = run_json(capsys, "search", out, "--image", images / name, "-k", 2, "--json", "--verify")
        (rows,) = found["results"]
        assert found["documents"] == 4 and [row["rank"] for row in rows] == [1, 2]
        assert rows[0]["id"] == str(images / name) and rows[0]["score"] == pytest.approx(16, abs=0.05)
    assert cli.main(["search", str(out), "--image", str(images / "a.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].split()[0] == "1" and lines[0].endswith("a.png")
    again = run_json(capsys, "index", images, "--model", model, "-o", out, "--json")
    assert again["indexed"] == 0 and again["already"] == 4
    assert cli.main(["index", str(images), "--model", "another", "-o", str(out)]) == 1
    assert "meta must be what" in capsys.readouterr().err


def test_an_interrupt_keeps_what_was_done_and_the_next_run_goes_on(model, images, tmp_path, capsys, monkeypatch):
    from latemax.encoders import PatchEncoder

    encode, calls, out = PatchEncoder.encode, [], str(tmp_path / "store")

    def interrupted(self, batch, **options):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, batch, **options)

    monkeypatch.setattr(PatchEncoder, "encode", interrupted)
    argv = ["index", str(images), "--model", model, "-o", out, "--batch-size", "1"]
    assert cli.main(argv) == 130
    assert capsys.readouterr().err.endswith("latemax index: interrupted\n")
    assert len(PatchStore(out)) == 2
    assert cli.main(argv) == 0
    assert "2 images indexed, 2 already there;" in capsys.readouterr().out
    assert calls == [1, 1, 1, 1, 1] and len(PatchStore(out)) == 4


def test_a_broken_image_is_left_out_and_named(model, images, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes((images / "a.png").read_bytes()[:200])
    argv = ["index", str(broken), str(images / "b.jpg"), "--model", model, "-o", str(tmp_path / "store")]
    assert cli.main(argv) == 1
    said = capsys.readouterr()
    assert "1 images indexed" in said.out and f"left out: {broken}" in said.err
    assert "1 images could not be read and were left out" in said.err
    assert PatchStore(tmp_path / "store").ids == [str(images / "b.jpg")]


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
    assert "one of the arguments --image --tokens is required" in capsys.readouterr().err


def test_folders_are_walked_in_order_and_each_image_once(images):
    found = corpus.find_images([str(images / "c.png"), str(images)])
    assert [path.removeprefix(str(images)) for path in found] == ["/c.png", "/a.png", "/b.jpg", "/more/d.PNG"]
