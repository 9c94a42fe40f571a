"""``latemax index`` and ``latemax search``: images in, the right one found, resumed after an interrupt."""

import io
import json
import os
import random

import pytest
import torch
from encoder_models import save_tiny_dinov2

from latemax import PatchStore, StoreWriter, cli
from latemax.cli import index
from latemax.encoders import records

pytest.importorskip("safetensors", reason="stores are written with safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("transformers", reason="the encoder is a transformers model")
    return save_tiny_dinov2(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    for number, name in enumerate(("a.png", "b.jpg", "c.png", "more/d.PNG")):
        write_image(folder / name, number, (60, 60))
    (folder / "notes.txt").write_text("not an image")
    return folder


def run_json(capsys, *argv):
    assert cli.main([str(x) for x in argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_index_then_search_finds_the_image(model, images, tmp_path, capsys):
    out = tmp_path / "store"
    done = run_json(capsys, "index", images, "--model", model, "-o", out, "--json", "--batch-size", 3)
    counts = {"indexed": 4, "replaced": 0, "already": 0, "deleted": 0, "removed": 0}
    assert done == {"store": str(out), **counts, "left_out": [], "documents": 4}
    store = PatchStore(out)
    names = ("a.png", "b.jpg", "c.png", "more/d.PNG")
    assert store.ids == [str(images / name) for name in names] and store.meta == {
        "model": model, "size": None, "model_id": model, "space": "patches"
    }  # fmt: skip
    assert store.grid(0) == (4, 4) and store.document_meta(0)["file"] == os.path.realpath(images / "a.png")
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
        # the first is the check of the settings
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(self, batch, **options)

    monkeypatch.setattr(PatchEncoder, "encode", interrupted)
    argv = ["index", str(images), "--model", model, "-o", out, "--batch-size", "1"]
    assert cli.main(argv) == 130
    assert capsys.readouterr().err.endswith("latemax index: interrupted\n")
    assert len(PatchStore(out)) == 2
    assert cli.main(argv) == 0
    assert "2 images indexed, 2 already there;" in capsys.readouterr().out
    assert calls == [1] * 7 and len(PatchStore(out)) == 4


def test_a_broken_image_is_left_out_and_named(model, images, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes((images / "a.png").read_bytes()[:200])
    argv = ["index", str(broken), str(images / "b.jpg"), "--model", model, "-o", str(tmp_path / "store")]
    assert cli.main(argv) == 3
    said = capsys.readouterr()
    assert "1 images indexed, 1 left out;" in said.out
    (line,) = [line for line in said.err.splitlines() if line.startswith("latemax index: ")]
    assert line.startswith(f"latemax index: left out: {broken}: corrupt or truncated image: ")
    assert PatchStore(tmp_path / "store").ids == [str(images / "b.jpg")]


def test_folders_are_walked_in_order_and_each_image_once(images):
    found, left_out = index.find_images([str(images / "c.png"), str(images)])
    names = [image.path.removeprefix(str(images)) for image in found]
    assert names == ["/c.png", "/a.png", "/b.jpg", "/more/d.PNG"] and not left_out


def write_image(path, seed=0, size=(40, 40)):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pixels = random.Random(seed).randbytes(3 * size[0] * size[1])
    image.frombytes("RGB", size, pixels).save(path)


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        write_image(tmp_path / "photos" / f"{number}.png", number)
    return tmp_path / "photos"


def indexed(model, photos, out, *options):
    """Runs the command; (exit status, what the store holds by file name)."""
    status = cli.main(["index", str(photos), "--model", model, "-o", str(out), *options])
    store = PatchStore(out)
    return status, {os.path.basename(id): store[i] for i, id in enumerate(store.ids)}


def fuzz(folder, image, count):
    """Damaged, odd and good images; returns how many of each name start there are."""
    made, generator = {}, random.Random(0)
    for number in range(count):
        kind = ("good", "cut", "flipped", "noise", "empty", "long", "wrong")[number % 7]
        suffix = ("png", "jpg", "webp", "bmp", "gif", "tiff")[number // 7 % 6]
        path = folder / f"{kind}-{number}.{suffix}"
        made[kind] = made.get(kind, 0) + 1
        buffer, kind_of = io.BytesIO(), "jpeg" if suffix == "jpg" else suffix
        if kind == "long":
            path, kind_of = path.with_suffix(".png"), "png"
            image.new("L", (90_000, 1)).save(buffer, kind_of)
        else:
            pixels = generator.randbytes(3 * 24 * 24)
            image.frombytes("RGB", (24, 24), pixels).save(buffer, kind_of)
        data = bytearray(buffer.getvalue())
        if kind == "cut":
            data = data[: generator.randrange(4, len(data) // 2)]
        elif kind == "flipped":
            for _ in range(20):
                data[generator.randrange(len(data))] = generator.randrange(256)
        elif kind == "noise":
            data = generator.randbytes(200)
        elif kind == "empty":
            data = b""
        elif kind == "wrong":
            data = b"<html>not an image</html>"
        path.write_bytes(data)
    return made


@pytest.mark.filterwarnings("ignore")
def test_no_image_of_500_ends_the_index(model, tmp_path, capsys):
    """Damaged, empty, far too long, vanished and undecodable files: every good image is indexed."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    folder = tmp_path / "folder"
    folder.mkdir()
    made = fuzz(folder, image, 490)
    (folder / "is-a-folder.png").mkdir()
    (folder / "vanished.png").symlink_to("nowhere")
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.png")
    write_image(folder / "line\nend \u202e\U0001f600.png")
    write_image(os.fsencode(folder) + b"/latin \xe9.png")
    out = tmp_path / "store"
    status, found = indexed(model, folder, out, "--json")
    said = capsys.readouterr()
    done = json.loads(said.out)
    assert status == 3 and done["indexed"] == done["documents"] == len(found)
    left_out = {os.path.basename(entry["path"]) for entry in done["left_out"]}
    assert len(left_out) == len(done["left_out"]) == said.err.count("latemax index: left out: ")
    assert {"vanished.png", "loop.png", "pipe.png"} <= left_out
    by_kind = {kind: sum(name.startswith(kind) for name in found) for kind in made}
    assert by_kind["good"] == made["good"] and by_kind["noise"] == by_kind["empty"] == by_kind["wrong"] == 0
    # each file is in the store or named
    assert len(found) + len(left_out) == 490 + 5
    assert "line\nend \u202e\U0001f600.png" in found and "latin \\xe9.png" in found
    # the next run has the same result and encodes nothing
    status, again = indexed(model, folder, out, "--json")
    done = json.loads(capsys.readouterr().out)
    assert status == 3 and done["indexed"] == done["replaced"] == 0 and done["already"] == len(found)
    assert again.keys() == found.keys() and {os.path.basename(x["path"]) for x in done["left_out"]} == left_out


def test_an_image_that_spoils_its_batch_is_left_out(model, photos, tmp_path, capsys):
    pytest.importorskip("PIL.Image", reason="Pillow is not installed").new("L", (90_000, 1)).save(photos / "1a.png")
    status, found = indexed(model, photos, tmp_path / "store")
    assert status == 3 and list(found) == ["0.png", "1.png", "2.png"]
    assert f"left out: {photos}/1a.png: " in capsys.readouterr().err


def test_a_failure_of_the_model_is_no_fault_of_the_images(model, photos, tmp_path, capsys, monkeypatch):
    from latemax.encoders import PatchEncoder

    encode, calls, out = PatchEncoder.encode, [], tmp_path / "store"

    def failing(self, images, **options):
        calls.append(len(images))
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return encode(self, images, **options)

    monkeypatch.setattr(PatchEncoder, "encode", failing)
    assert cli.main(["index", str(photos), "--model", model, "-o", str(out), "--batch-size", "2"]) == 1
    said = capsys.readouterr().err
    assert said.endswith("latemax index: out of memory\n") and "left out" not in said
    assert calls == [1, 2, 1] and len(PatchStore(out)) == 2


def test_what_may_not_be_read_is_left_out(photos, monkeypatch):
    """A file and a folder without permission, as any user but root meets them."""
    closed, scan, status = photos / "closed", os.scandir, os.stat
    closed.mkdir()

    def denied(path):
        if os.fspath(path) in (str(closed), str(photos / "1.png")):
            raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", lambda path: denied(path) or scan(path))
    monkeypatch.setattr(os, "stat", lambda path, **options: denied(path) or status(path, **options))
    found, left_out = index.find_images([str(photos)])
    assert [os.path.basename(image.path) for image in found] == ["0.png", "2.png"]
    assert left_out == {str(closed): "Permission denied", str(photos / "1.png"): "Permission denied"}


def test_nothing_but_bad_images_is_status_1(model, photos, tmp_path, capsys):
    for path in photos.iterdir():
        path.write_bytes(b"")
    assert indexed(model, photos, tmp_path / "store") == (1, {})
    assert "0 images indexed, 3 left out" in capsys.readouterr().out


def test_an_image_that_vanishes_meanwhile_is_left_out(model, photos, tmp_path, capsys, monkeypatch):
    find = index.find_images

    def find_and_lose_one(paths):
        found = find(paths)
        (photos / "1.png").unlink()
        return found

    monkeypatch.setattr(index, "find_images", find_and_lose_one)
    status, found = indexed(model, photos, tmp_path / "store")
    assert status == 3 and list(found) == ["0.png", "2.png"]
    assert f"left out: {photos}/1.png: no such file or folder\n" in capsys.readouterr().err


def test_a_wrong_setting_is_no_fault_of_the_images(model, photos, tmp_path, capsys):
    """No image is blamed, and the error is one line."""
    out = str(tmp_path / "store")
    for options, text in (
        (["--size", "-3"], "size must be"),
        (["--device", "cuda:77"], "--device cuda:77 does not work here: "),
        (["--device", "nowhere"], "--device nowhere does not work here: "),
        (["--adapter", "nowhere"], "--adapter nowhere: no such file"),
    ):
        assert cli.main(["index", str(photos), "--model", model, "-o", out, *options]) == 1
        said = capsys.readouterr().err
        assert [text in line for line in said.splitlines() if line.startswith("latemax index: ")] == [True]
        assert "Traceback" not in said and "left out: " not in said


def test_other_spellings_of_an_image_are_one_document(model, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(photos)
    (photos / "link.png").symlink_to("0.png")
    names = ["0.png", "./0.png", str(photos / "0.png"), "../photos/0.png", "link.png"]
    out = str(tmp_path / "store")
    assert cli.main(["index", *names, "--model", model, "-o", out]) == 0
    assert PatchStore(out).ids == ["0.png"]
    for name in names:
        assert cli.main(["index", name, "--model", model, "-o", out]) == 0
    assert PatchStore(out).ids == ["0.png"]
    assert capsys.readouterr().out.count("0 images indexed, 1 already there") == 5


def test_a_model_by_a_relative_path_is_found_from_anywhere(model, photos, tmp_path, capsys, monkeypatch):
    (tmp_path / "vit").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    out = str(tmp_path / "store")
    for spelling in ("./vit", "vit/", str(tmp_path / "vit"), model):
        assert cli.main(["index", str(photos), "--model", spelling, "-o", out]) == 0
    assert PatchStore(out).meta["model"] == os.path.realpath(model)
    monkeypatch.chdir("/")
    assert cli.main(["search", out, "--image", str(photos / "1.png"), "-k", "1"]) == 0
    assert capsys.readouterr().out.endswith("1.png\n")


def test_a_changed_image_is_encoded_again(model, photos, tmp_path, capsys):
    out = tmp_path / "store"
    _, before = indexed(model, photos, out)
    write_image(photos / "1.png", 7)
    status, after = indexed(model, photos, out)
    assert status == 0 and "0 images indexed, 1 encoded again, 2 already there" in capsys.readouterr().out
    assert not torch.equal(before["1.png"], after["1.png"]) and torch.equal(before["0.png"], after["0.png"])
    assert list(after) == ["0.png", "1.png", "2.png"]
    # a change that leaves it unreadable: the earlier tokens stay, and it is named every time
    (photos / "1.png").write_bytes(b"")
    for _ in range(2):
        status, kept = indexed(model, photos, out)
        assert status == 3 and torch.equal(kept["1.png"], after["1.png"])
        assert f"left out: {photos}/1.png" in capsys.readouterr().err


def test_prune_removes_deleted_images_and_nothing_else(model, photos, tmp_path, capsys):
    out, other = tmp_path / "store", tmp_path / "other"
    other.mkdir()
    write_image(other / "far.png", 9)
    indexed(model, photos, out)
    indexed(model, other, out)
    with StoreWriter(out) as writer:
        writer.add(torch.ones(2, 32, dtype=torch.float16), str(photos / "added by hand"))
    (photos / "1.png").unlink()
    (other / "far.png").unlink()
    assert list(indexed(model, photos, out)[1]) == ["0.png", "1.png", "2.png", "far.png", "added by hand"]
    assert "0 images indexed, 2 already there, 1 deleted but kept (--prune removes them);" in capsys.readouterr().out
    status, found = indexed(model, photos, out, "--prune")
    assert status == 0 and list(found) == ["0.png", "2.png", "far.png", "added by hand"]
    assert "0 images indexed, 2 already there, 1 removed;" in capsys.readouterr().out
    # a deleted file by its name, and a folder without any image left
    assert list(indexed(model, other / "far.png", out, "--prune")[1]) == ["0.png", "2.png", "added by hand"]
    (photos / "0.png").unlink()
    (photos / "2.png").unlink()
    assert indexed(model, photos, out, "--prune")[0] == 0
    assert PatchStore(out).ids == [str(photos / "added by hand")]


def test_an_adapter_belongs_to_the_store(model, photos, tmp_path, capsys):
    from latemax import PatchEncoder, add_lora

    torch.manual_seed(0)
    encoder = PatchEncoder.from_pretrained(model, projection=16)
    lora = add_lora(encoder, rank=2)
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter)
    file, plain = tmp_path / "adapter.safetensors", tmp_path / "plain"
    lora.save(file)
    status, adapted = indexed(model, photos, tmp_path / "adapted", "--adapter", str(file))
    indexed(model, photos, plain)
    with torch.no_grad():
        expected = encoder.encode([photos / "0.png"]).tokens[0]
    assert status == 0 and torch.allclose(adapted["0.png"].float(), expected, atol=1e-3)
    capsys.readouterr()
    found = run_json(capsys, "search", tmp_path / "adapted", "--image", photos / "0.png", "--json")
    assert found["results"][0][0]["score"] == pytest.approx(16, abs=0.05)
    assert indexed_status(model, photos, plain, "--adapter", str(file)) == 1
    assert "meta must be what" in capsys.readouterr().err


def indexed_status(model, photos, out, *options):
    return cli.main(["index", str(photos), "--model", model, "-o", str(out), *options])


@pytest.mark.parametrize("path", ["a.png", "é \\ \\xff.png", "\\ \udcff\udce9\\xff \\\\.png", "\udc80", ""])
def test_text_of_paths_is_reversible(path):
    text = records.to_text(path)
    text.encode()
    assert (text if records.is_text(path) else records.to_path(text)) == path
    assert records.is_text(path) == (text == path)


def test_patches_of_a_crop_are_placed_on_the_whole_image(model, tmp_path, capsys):
    """The model crops the centre: of a 120 x 60 image the middle half, in 4 x 4 patches."""
    write_image(tmp_path / "wide.png", size=(120, 60))
    assert cli.main(["index", str(tmp_path / "wide.png"), "--model", model, "-o", str(tmp_path / "s")]) == 0
    capsys.readouterr()
    argv = ["search", tmp_path / "s", "--image", tmp_path / "wide.png", "--patches", "--json"]
    (row,) = run_json(capsys, *argv)["results"][0]
    places = {(p["row"], p["column"]): p["box"] for p in row["patches"]}
    assert len(places) == 16
    assert places[0, 0] == pytest.approx([0.25, 0, 0.375, 0.25])
    assert places[3, 3] == pytest.approx([0.625, 0.75, 0.75, 1])


def test_integer_ids_take_no_images(model, photos, tmp_path, capsys):
    with StoreWriter(tmp_path / "s", meta={"model": os.path.realpath(model), "size": None}) as writer:
        writer.add(torch.ones(2, 32, dtype=torch.float16))
    assert indexed_status(model, photos, tmp_path / "s") == 1
    assert "has integer ids" in capsys.readouterr().err
