"""``examples/train_grounding.py`` with a tiny random DINOv2 and the bundled photos, and the tables of its results.

No network.
"""

import importlib.util
import json
import math
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the example's encoder is a transformers model")
pytest.importorskip("safetensors", reason="the tiny model is saved as safetensors")
pytest.importorskip("skimage", reason="the example's photos come with scikit-image")
pytest.importorskip("sklearn", reason="two of the example's photos come with scikit-learn")
pytest.importorskip("matplotlib", reason="one of the example's photos comes with matplotlib")
pytest.importorskip("PIL", reason="the example reads photos with pillow")

import transformers

from latemax import PatchEncoder, add_lora

ROOT = Path(__file__).parents[1]


def load(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look up their module there
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


example = load("examples/train_grounding.py")
SMALL = replace(example.QUICK, n_train=48, n_test=8, batch=12, rank=4, dim=32)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The matrices are tiny: on busy cores a second thread costs more than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=112, patch_size=28
    )
    folder = tmp_path_factory.mktemp("tiny")
    transformers.Dinov2Model(config).save_pretrained(folder)
    square = {"height": 112, "width": 112}
    processor = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 112}, "do_center_crop": True,
                 "crop_size": square, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def photos():
    return example.load_photos()


@pytest.fixture(scope="module")
def encoder(folder):
    return PatchEncoder.from_pretrained(folder, normalize=False).requires_grad_(False)


@pytest.fixture(scope="module")
def canvases(encoder, photos):
    return example.encode(encoder, *example.compose(photos, SMALL.n_train, SMALL.size, 0), SMALL)


class TestData:
    def test_canvases_hold_the_photos_they_say(self, photos):
        plain = []
        for i, photo in enumerate(photos[:6]):
            image = photo.image.copy()
            image.paste((40 * i, 0, 0), (0, 0, *image.size))
            plain.append(replace(photo, image=image))
        images, which = example.compose(plain, 5, 56, seed=3)
        assert which.shape == (5, 4)
        for image, four in zip(images, which.tolist(), strict=True):
            assert image.size == (56, 56) and len(set(four)) == 4
            seen = [image.getpixel(at)[0] // 40 for at in ((14, 14), (42, 14), (14, 42), (42, 42))]
            assert seen == four

    def test_canvases_are_seeded(self, photos):
        first, again, other = (example.compose(photos, 3, 56, seed)[0] for seed in (0, 0, 1))
        assert [c.tobytes() for c in first] == [c.tobytes() for c in again]
        assert first[0].tobytes() != other[0].tobytes()

    def test_the_last_blocks_turn_hidden_into_the_frozen_vits_output(self, encoder, canvases):
        assert canvases.grid == (4, 4) and canvases.hidden.shape == canvases.final.shape == (48, 17, 32)
        tail = example.Tail(encoder.model.encoder.layer[-SMALL.blocks :], encoder.model.layernorm, canvases.grid)
        out, grid = tail(canvases.hidden)
        assert grid == (4, 4)
        assert (canvases.hidden - canvases.final).abs().max() > 0.1
        torch.testing.assert_close(out, canvases.final, rtol=0, atol=1e-5)

    def test_captions(self):
        words = [*example.FILLERS, "cat", "moon"]
        ids = example.captions(torch.tensor([[1, 0], [0, 1]]))
        assert [" ".join(words[i] for i in row) for row in ids.tolist()] == [
            "a photo of a moon and a cat",
            "a photo of a cat and a moon",
        ]
        assert ids.shape[1] == example.L_Q
        assert ids[:, example.NOUNS].tolist() == [[5, 4], [4, 5]]


class TestMetrics:
    def test_relevance_needs_both_photos(self):
        shown = torch.tensor([[0, 1, 2, 3], [4, 1, 0, 5], [1, 2, 3, 4]])
        found = example.relevance(torch.tensor([[0, 1], [3, 1], [0, 6]]), shown)
        assert found.tolist() == [[True, True, False], [True, False, True], [False, False, False]]

    def test_p_at_1(self):
        scores = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.7, 0.3], [0.6, 0.5]])
        relevant = torch.tensor([[False, True], [True, False], [True, True], [True, False]])
        assert example.p_at_1(scores, relevant) == 0.75

    def test_pointing(self):
        # Patches of a 4 x 4 grid: 0 1 | 2 3 / 4 5 | 6 7 // 8 9 | 10 11 / 12 13 | 14 15; -1 is CLS.
        argmax = torch.tensor([[0, 7], [9, 10], [5, 5], [-1, 12]])
        quadrants = torch.tensor([[0, 1], [2, 2], [0, 3], [0, 2]])
        assert example.pointing(argmax, quadrants, (4, 4)) == 5 / 8
        # 2 rows of 6: 0 1 2 | 3 4 5 // 6 7 8 | 9 10 11
        assert example.pointing(torch.tensor([[2, 3], [8, 9]]), torch.tensor([[0, 1], [2, 3]]), (2, 6)) == 1

    def test_scores(self):
        text = torch.zeros(1, 8, 2)
        text[0, :, 0] = 1
        text[0, 7] = torch.tensor([0.0, 1.0])
        # CLS, then two patches.
        tokens = torch.tensor([[[0.6, 0.8], [0.8, 0.6], [0.0, -1.0]]])
        pooled = (7 * 0.6 + 0.8) / math.sqrt(50)
        for how, expected in (("pooled", pooled), ("kept", (7 * 0.8 + 0.8) / 8), ("dropped", (7 * 0.8 + 0.6) / 8)):
            assert example.score(text, tokens, how).item() == pytest.approx(expected, abs=1e-6)

    def test_loss_ignores_other_right_answers(self):
        scores = torch.tensor([[0.5, 0.1], [0.3, 0.2]])
        scale = torch.tensor(10.0)
        own = torch.eye(2, dtype=torch.bool)

        def softplus(x):
            return math.log1p(math.exp(x))

        # Rows: 0.5 and 0.1, 0.2 and 0.3; columns: 0.5 and 0.3, 0.2 and 0.1.
        plain = (softplus(-4) + softplus(1)) / 4 + (softplus(-2) + softplus(-1)) / 4
        assert example.contrastive_loss(scores, own, scale).item() == pytest.approx(plain, abs=1e-6)
        # Canvas 0 also shows both photos of caption 1: that pair counts in neither direction.
        also = own | torch.tensor([[False, False], [True, False]])
        masked = (softplus(-4) + 0) / 4 + (0 + softplus(-1)) / 4
        assert example.contrastive_loss(scores, also, scale).item() == pytest.approx(masked, abs=1e-6)

    @pytest.fixture
    def ideal(self):
        """Names are unit directions, fillers are opposite; each of the 2 x 2 patches equals its photo's name."""
        photos = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [3, 2, 5, 4]])
        model = example.Retriever(8, 9, 9)
        with torch.no_grad():
            model.words.weight.zero_()
            model.words.weight[:4, 8] = -1
            model.words.weight[4:, :8] = torch.eye(8)
        patches = torch.nn.functional.one_hot(photos, 9).float()
        encoder = PatchEncoder(example.Tail([], nn.Identity(), (2, 2)), n_prefix=1)
        return model, encoder, patches, photos

    def test_evaluate_if_patches_equal_the_names(self, ideal):
        model, encoder, patches, photos = ideal
        nothing = torch.zeros(3, 1, 9)
        nothing[..., 8] = 1
        result = example.evaluate(model, encoder, torch.cat([nothing, patches], 1), photos, (2, 2))
        assert result["p_at_1_kept"] == result["p_at_1_dropped"] == 1
        assert result["pointing_kept"] == result["pointing_dropped"] == 1
        assert result["cls_wins"] == 0
        # There are two captions per canvas; (4, 5), (3, 2), (2, 3) and (5, 4) fit two canvases each.
        # The cosine of a name is 1 with its own patch and 0 with the other three.
        assert result["cosine"] == {"CLS": 0, "patches": 0.25, "maximum": 1}
        assert result["chance"] == {"p_at_1": pytest.approx(10 / 18), "pointing": 0.25, "cls_wins": 0.2}

    def test_evaluate_if_cls_is_the_argmax(self, ideal):
        model, encoder, patches, photos = ideal
        # The patches are less close to their names than CLS is to each of its four.
        vague = 0.2 * patches
        vague[..., 8] = math.sqrt(1 - 0.2**2)
        cls = patches.sum(1, keepdim=True)
        result = example.evaluate(model, encoder, torch.cat([cls, vague], 1), photos, (2, 2))
        assert result["cls_wins"] == 1
        assert result["pointing_kept"] == 0 and result["pointing_dropped"] == 1
        assert result["p_at_1_pooled"] == 1
        assert result["cosine"]["CLS"] == pytest.approx(0.5) and result["cosine"]["maximum"] == pytest.approx(0.5)

    def test_noun_maps_follow_the_quadrants(self, ideal):
        model, encoder, patches, photos = ideal
        maps = example.noun_maps(model, encoder, torch.cat([patches[:, 3:], patches], 1), photos)
        assert [(m["photo"], m["quadrant"]) for m in maps] == [(0, 0), (5, 1), (5, 2)]
        assert [m["cosines"] for m in maps] == [[0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]


class TestTraining:
    @pytest.mark.parametrize("how", example.OBJECTIVES)
    def test_loss_falls(self, how, canvases, photos):
        torch.manual_seed(0)
        model = example.Retriever(len(photos), 32, SMALL.dim)
        encoder = PatchEncoder(example.Tail([], nn.Identity(), canvases.grid), n_prefix=1, projection=model.projection)
        generator = torch.Generator().manual_seed(0)
        losses = example.train(model, encoder, canvases.final, canvases.photos, how, 80, 2e-2, SMALL, generator)
        assert statistics.mean(losses[-10:]) < 0.7 * statistics.mean(losses[:5]), losses

    @pytest.mark.parametrize("how", example.OBJECTIVES)
    def test_lora_learns_and_the_base_stays(self, how, encoder, canvases, photos):
        before = {k: v.clone() for k, v in encoder.model.state_dict().items()}
        torch.manual_seed(0)
        model = example.Retriever(len(photos), 32, SMALL.dim)
        tail = example.Tail(encoder.model.encoder.layer[-1:], encoder.model.layernorm, canvases.grid)
        wrapped = PatchEncoder(tail, n_prefix=1, projection=model.projection)
        lora = add_lora(wrapped, rank=4, alpha=8)
        assert len(lora.sites) == 2
        first = {k: v.clone() for k, v in lora.state_dict().items()}
        words, projection = model.words.weight.clone(), model.projection.weight.clone()
        generator = torch.Generator().manual_seed(0)
        example.train(model, wrapped, canvases.hidden, canvases.photos, how, 3, 1e-3, SMALL, generator, lora)
        for name, factor in lora.state_dict().items():
            assert not torch.equal(factor, first[name]), f"{name} did not move"
        assert not torch.equal(model.words.weight, words)
        assert not torch.equal(model.projection.weight, projection)
        lora.remove()
        after = encoder.model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[k], before[k]) for k in before)


def test_the_whole_example(folder, tmp_path, capsys):
    path = tmp_path / "new" / "result.json"
    arguments = ["--quick", "--seeds", "0", "1", "--model", str(folder), "--json", str(path)]
    example.main(arguments)
    result = json.loads(path.read_text())
    wanted = {(how, lora) for how in example.OBJECTIVES for lora in (False, True)}
    assert {(r["trained"], r["lora"], r["seed"]) for r in result["rows"]} == {(*w, s) for w in wanted for s in (0, 1)}
    assert {(r["trained"], r["lora"]) for r in result["summary"]} == wanted
    assert len(result["rows"]) == 12 and len(result["summary"]) == 6
    for row in result["rows"]:
        assert all(0 <= row[name] <= 1 for name in example.METRICS)
        assert row["chance"]["cls_wins"] == pytest.approx(1 / 17) and row["chance"]["pointing"] == 0.25
        assert ("maps" in row) == (row["seed"] == 0)
        assert all(math.isfinite(loss) for loss in row["losses"])
    for row in result["summary"]:
        mine = [r for r in result["rows"] if (r["trained"], r["lora"]) == (row["trained"], row["lora"])]
        for name in example.METRICS:
            values = [r[name] for r in mine]
            assert row["mean"][name] == pytest.approx(sum(values) / 2)
            assert row["sd"][name] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
    assert result["settings"]["steps"] == example.QUICK.steps and result["seeds"] == [0, 1]
    printed = capsys.readouterr().out
    assert printed.count(" no ") == printed.count(" yes ") == 3
    assert "over 2 seeds, held-out canvases" in printed


def docs_tables(*arguments):
    command = [sys.executable, "-m", "benchmarks.report", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


class TestDocsTables:
    def test_the_tables_in_the_docs_are_fresh(self):
        done = docs_tables("--check")
        assert done.returncode == 0, done.stdout + done.stderr

    def test_a_changed_number_is_detected_and_corrected(self, tmp_path):
        text = (ROOT / "docs" / "why-drop-cls.md").read_text()
        row = text.index("| MaxSim, CLS dropped", text.index("<!-- table:trained -->"))
        copy = tmp_path / "copy.md"
        copy.write_text(text[:row] + text[row:].replace("0.", "1.", 1))
        done = docs_tables("--check", "--file", copy)
        assert done.returncode == 1
        assert done.stdout == "stale: table:trained in copy.md\n"
        assert docs_tables("--file", copy).returncode == 0
        assert copy.read_text() == text

    def test_an_unknown_table_is_an_error(self, tmp_path):
        page = tmp_path / "page.md"
        page.write_text("<!-- table:nothing -->\n<!-- /table -->\n")
        done = docs_tables("--file", page)
        assert done.returncode == 1
        assert "page.md: no table is called nothing; aot, " in done.stderr
